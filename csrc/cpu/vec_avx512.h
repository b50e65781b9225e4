// AVX-512 (x86-64-v4): 16 lanes, masked loads and stores for tails. Included by vec.h.
#pragma once

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms inside GCC's own header
#pragma GCC diagnostic ignored "-Wuninitialized"
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
FG_INLINE F fms(F a, F b, F c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }    // a * b - c
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

// The entries of a table of 32, aligned, that the lowest five bits of each lane say.
#define FG_LOOKUP 1
FG_INLINE F lookup(const float* table, F index) {
  return {_mm512_permutex2var_ps(_mm512_load_ps(table), _mm512_castps_si512(index.v),
                                 _mm512_load_ps(table + 16))};
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

// One permutation, zeros in the even places, where vpmovzxwd would need a shift after it.
FG_INLINE F widen_bf16(__m256i bits) {
  alignas(64) static constexpr uint16_t kPlaces[32] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                                       0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  const __m512i places = _mm512_load_si512(kPlaces);
  return {
      _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, places, _mm512_castsi256_si512(bits)))};
}
FG_INLINE __m256i narrow_bf16_integer(F a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
constexpr int kSubnormal = 0x20;  // vcvtneps2bf16 reads those as zero: they are left to integer rounding
FG_INLINE __m256i narrow_bf16(F a) {
#ifdef __AVX512BF16__
  if (__builtin_expect(_mm512_fpclass_ps_mask(a.v, kSubnormal) == 0, 1)) {
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v));
  }
#endif
  return narrow_bf16_integer(a);
}

template <class Lanes>
FG_INLINE auto load(const bf16* p, Lanes lanes) {
  if constexpr (__is_base_of(Twice, Lanes)) {
    const __m512i both = _mm512_loadu_si512(p);
    return Halves<F>{{_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))},
                     {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-65536)))}};
  } else {
    return widen_bf16(load16(p, lanes));
  }
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

FG_INLINE F load(const i8* p, Full) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i_u*>(p))))};
}
FG_INLINE F load(const i8* p, Part part) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(part.n).v, p)))};
}

#define FG_TWICE 1
#if defined(__AVX512BF16__)
// Subnormals become zero.
FG_INLINE __m512i pair_up(F even, F odd) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd.v, even.v));
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), halves);
}
#endif

FG_INLINE __m512i narrow_bf16(Halves<F> a) {
#if defined(__AVX512BF16__)
  const __mmask16 even = _mm512_fpclass_ps_mask(a.even.v, kSubnormal);
  const __mmask16 odd = _mm512_fpclass_ps_mask(a.odd.v, kSubnormal);
  if (__builtin_expect(_kortestz_mask16_u8(even, odd), 1)) return pair_up(a.even, a.odd);
#endif
  return _mm512_or_si512(_mm512_cvtepu16_epi32(narrow_bf16_integer(a.even)),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow_bf16_integer(a.odd)), 16));
}
FG_INLINE void store(bf16* p, Halves<F> a, Twice) { _mm512_storeu_si512(p, narrow_bf16(a)); }

// fp32 beside it: two permutations, so that what is used once for many rows should be there as bf16 as well.
FG_INLINE __m512i counted(int first, int step_even, int step_odd) {
  alignas(64) int lanes[W];
  for (int i = 0; i < W; ++i) lanes[i] = first + i / 2 * step_even + (i % 2) * step_odd;
  return _mm512_load_si512(lanes);
}
FG_INLINE Halves<F> load(const float* p, Twice) {
  const __m512 a = _mm512_loadu_ps(p), b = _mm512_loadu_ps(p + W);
  const __m512i even = counted(0, 4, 2), odd = counted(1, 4, 2);  // 0, 2, 4, … and 1, 3, 5, …
  return {{_mm512_permutex2var_ps(a, even, b)}, {_mm512_permutex2var_ps(a, odd, b)}};
}
FG_INLINE void store(float* p, Halves<F> a, Twice) {
  const __m512i low = counted(0, 1, W), high = counted(W / 2, 1, W);  // 0, 16, 1, 17, … and 8, 24, …
  _mm512_storeu_ps(p, _mm512_permutex2var_ps(a.even.v, low, a.odd.v));
  _mm512_storeu_ps(p + W, _mm512_permutex2var_ps(a.even.v, high, a.odd.v));
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
