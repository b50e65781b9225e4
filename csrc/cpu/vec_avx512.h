// AVX-512 (x86-64-v4): 16 lanes, masked loads and stores for tails. Included by vec.h.
#pragma once

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms inside GCC's own header
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace fg::FG_LEVEL {

constexpr int W = 16;

struct F {
  __m512 v;
};
struct M {
  __mmask16 v;
};

FG_INLINE F set(float x) { return {_mm512_set1_ps(x)}; }
FG_INLINE F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
FG_INLINE F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
FG_INLINE F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
FG_INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }    // a * b + c
FG_INLINE F fnma(F a, F b, F c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a * b
FG_INLINE F vmin(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
FG_INLINE F vmax(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
FG_INLINE F vabs(F a) { return {_mm512_abs_ps(a.v)}; }
// -min(|a|, limit); limit for NaN. vrangeps: the smaller magnitude (imm bits 1:0 = 2), sign set (bits 3:2 =
// 3).
FG_INLINE F negative_limited(F a, float limit) { return {_mm512_range_ps(a.v, _mm512_set1_ps(limit), 0xe)}; }
FG_INLINE M operator<(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
FG_INLINE M operator|(M a, M b) { return {static_cast<__mmask16>(a.v | b.v)}; }
FG_INLINE bool any(M m) { return m.v != 0; }
FG_INLINE M none() { return {0}; }
FG_INLINE F select(M m, F a, F b) { return {_mm512_mask_blend_ps(m.v, b.v, a.v)}; }
FG_INLINE M first_lanes(int n) { return {static_cast<__mmask16>((1u << n) - 1)}; }
FG_INLINE float hsum(F a) { return _mm512_reduce_add_ps(a.v); }
FG_INLINE float hmax(F a) { return _mm512_reduce_max_ps(a.v); }

// For 2^w: w - floor(w), in [0, 1], and a * 2^floor(w) with gradual underflow (0 at w = -inf).
FG_INLINE F fraction(F w) { return {_mm512_reduce_ps(w.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
FG_INLINE F scale_floor(F a, F w) { return {_mm512_scalef_ps(a.v, w.v)}; }
// 1 / a within 1 ulp for normal a whose inverse is normal: one Newton step on a 14-bit start, half the cost
// of vdivps.
FG_INLINE F reciprocal(F a) {
  const F start{_mm512_rcp14_ps(a.v)};
  return fma(start, fnma(a, start, set(1.0f)), start);
}

FG_INLINE F load(const float* p, Full) { return {_mm512_loadu_ps(p)}; }
FG_INLINE F load(const float* p, Part part) { return {_mm512_maskz_loadu_ps(first_lanes(part.n).v, p)}; }
FG_INLINE void store(float* p, F a, Full) { _mm512_storeu_ps(p, a.v); }
FG_INLINE void store(float* p, F a, Part part) { _mm512_mask_storeu_ps(p, first_lanes(part.n).v, a.v); }

FG_INLINE __m256i load16(const void* p, Full) { return _mm256_loadu_si256(static_cast<const __m256i_u*>(p)); }
FG_INLINE __m256i load16(const void* p, Part part) {
  return _mm256_maskz_loadu_epi16(first_lanes(part.n).v, p);
}
FG_INLINE void store16(void* p, __m256i a, Full) { _mm256_storeu_si256(static_cast<__m256i_u*>(p), a); }
FG_INLINE void store16(void* p, __m256i a, Part part) {
  _mm256_mask_storeu_epi16(p, first_lanes(part.n).v, a);
}

FG_INLINE F widen_bf16(__m256i bits) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
FG_INLINE __m256i narrow_bf16_integer(F a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
FG_INLINE __m256i narrow_bf16(F a) {
#ifdef __AVX512BF16__
  constexpr int kSubnormal = 0x20;  // vcvtneps2bf16 reads subnormals as zero: leave those to integer rounding
  if (__builtin_expect(_mm512_fpclass_ps_mask(a.v, kSubnormal) == 0, 1)) {
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v));
  }
#endif
  return narrow_bf16_integer(a);
}

template <class Lanes>
FG_INLINE F load(const bf16* p, Lanes lanes) {
  return widen_bf16(load16(p, lanes));
}
template <class Lanes>
FG_INLINE F load(const f16* p, Lanes lanes) {
  return {_mm512_cvtph_ps(load16(p, lanes))};
}
template <class Lanes>
FG_INLINE void store(bf16* p, F a, Lanes lanes) {
  store16(p, narrow_bf16(a), lanes);
}
template <class Lanes>
FG_INLINE void store(f16* p, F a, Lanes lanes) {
  store16(p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), lanes);
}

// Bytes of a boolean tensor: true where not zero, false in lanes beyond a part.
FG_INLINE M load_bool(const uint8_t* p, Full) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i_u*>(p));
  return {_mm_test_epi8_mask(bytes, bytes)};
}
FG_INLINE M load_bool(const uint8_t* p, Part part) {
  const __m128i bytes = _mm_maskz_loadu_epi8(first_lanes(part.n).v, p);
  return {_mm_test_epi8_mask(bytes, bytes)};
}

FG_INLINE M at_least(const uint32_t* words, uint32_t threshold) {
  return {_mm512_cmpge_epu32_mask(_mm512_loadu_si512(words), _mm512_set1_epi32(static_cast<int>(threshold)))};
}

// 64-bit lanes for Philox: product of the low 32 bits of each lane.
using U64 = __m512i;
FG_INLINE U64 multiply32(U64 a, U64 b) { return _mm512_mul_epu32(a, b); }

}  // namespace fg::FG_LEVEL
