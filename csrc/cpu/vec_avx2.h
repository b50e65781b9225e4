// AVX2 with FMA and F16C (x86-64-v3): 8 lanes. Included by vec.h.
#pragma once

#include <immintrin.h>

namespace fg::FG_LEVEL {

constexpr int W = 8;

struct F {
  __m256 v;
};
struct M {
  __m256 v;  // all ones or all zeros in each lane
};

FG_INLINE F set(float x) { return {_mm256_set1_ps(x)}; }
FG_INLINE F operator+(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
FG_INLINE F operator-(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
FG_INLINE F operator*(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
FG_INLINE F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
FG_INLINE F fms(F a, F b, F c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
FG_INLINE F fnma(F a, F b, F c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a * b
FG_INLINE F vmin(F a, F b) { return {_mm256_min_ps(a.v, b.v)}; }
FG_INLINE F vmax(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }
FG_INLINE F vabs(F a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
// -min(|a|, limit); limit for NaN.
FG_INLINE F negative_limited(F a, float limit) { return set(0.0f) - vmin(vabs(a), set(limit)); }
FG_INLINE M operator<(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
FG_INLINE M operator|(M a, M b) { return {_mm256_or_ps(a.v, b.v)}; }
FG_INLINE bool any(M m) { return _mm256_movemask_ps(m.v) != 0; }
FG_INLINE M none() { return {_mm256_setzero_ps()}; }
FG_INLINE F select(M m, F a, F b) { return {_mm256_blendv_ps(b.v, a.v, m.v)}; }

FG_INLINE __m256i first_lanes_integer(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FG_INLINE M first_lanes(int n) { return {_mm256_castsi256_ps(first_lanes_integer(n))}; }

FG_INLINE float hsum(F a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
FG_INLINE float hmax(F a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

// For 2^w with w <= 1: w - floor(w), in [0, 1], and a * 2^floor(w) with gradual underflow. 2^-160 is 0, so
// that w can be limited there; two steps, because 2^-149 itself is no factor of a normal number.
FG_INLINE F limited(F w) { return vmax(set(-160.0f), w); }
FG_INLINE F fraction(F w) { return limited(w) - F{_mm256_floor_ps(limited(w).v)}; }
FG_INLINE F scale_floor(F a, F w) {
  const __m256i whole = _mm256_cvtps_epi32(_mm256_floor_ps(limited(w).v)), half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second))};
}
FG_INLINE F reciprocal(F a) { return {_mm256_div_ps(_mm256_set1_ps(1.0f), a.v)}; }

FG_INLINE F load(const float* p, Full) { return {_mm256_loadu_ps(p)}; }
FG_INLINE F load(const float* p, Part part) { return {_mm256_maskload_ps(p, first_lanes_integer(part.n))}; }
FG_INLINE void store(float* p, F a, Full) { _mm256_storeu_ps(p, a.v); }
FG_INLINE void store(float* p, F a, Part part) { _mm256_maskstore_ps(p, first_lanes_integer(part.n), a.v); }

FG_INLINE __m128i load16(const void* p, Full) { return _mm_loadu_si128(static_cast<const __m128i_u*>(p)); }
FG_INLINE __m128i load16(const void* p, Part part) {
  alignas(16) uint16_t lanes[W] = {};
  for (int i = 0; i < part.n; ++i) std::memcpy(lanes + i, static_cast<const char*>(p) + 2 * i, 2);
  return _mm_load_si128(reinterpret_cast<const __m128i*>(lanes));
}
FG_INLINE void store16(void* p, __m128i a, Full) { _mm_storeu_si128(static_cast<__m128i_u*>(p), a); }
FG_INLINE void store16(void* p, __m128i a, Part part) {
  alignas(16) uint16_t lanes[W];
  _mm_store_si128(reinterpret_cast<__m128i*>(lanes), a);
  for (int i = 0; i < part.n; ++i) std::memcpy(static_cast<char*>(p) + 2 * i, lanes + i, 2);
}

FG_INLINE F widen_bf16(__m128i bits) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
FG_INLINE __m128i narrow_bf16(F a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

template <class Lanes>
FG_INLINE F load(const bf16* p, Lanes lanes) {
  return widen_bf16(load16(p, lanes));
}
template <class Lanes>
FG_INLINE F load(const f16* p, Lanes lanes) {
  return {_mm256_cvtph_ps(load16(p, lanes))};
}
template <class Lanes>
FG_INLINE void store(bf16* p, F a, Lanes lanes) {
  store16(p, narrow_bf16(a), lanes);
}
template <class Lanes>
FG_INLINE void store(f16* p, F a, Lanes lanes) {
  store16(p, _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), lanes);
}

FG_INLINE F load(const i8* p, Full) { return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadu_si64(p)))}; }
FG_INLINE F load(const i8* p, Part part) {
  i8 lanes[W] = {};
  for (int i = 0; i < part.n; ++i) lanes[i] = p[i];
  return load(lanes, Full{});
}

// Bytes of a boolean tensor: true where not zero, false in lanes beyond a part.
FG_INLINE M load_bool(const uint8_t* p, Part part) {
  uint64_t bytes = 0;
  for (int i = 0; i < part.n; ++i) bytes |= static_cast<uint64_t>(p[i]) << (8 * i);
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(bytes)));
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(wide, _mm256_setzero_si256()))};
}
FG_INLINE M load_bool(const uint8_t* p, Full) {
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadu_si64(p));
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(wide, _mm256_setzero_si256()))};
}

FG_INLINE M at_least(const uint32_t* words, uint32_t threshold) {
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(words));
  const __m256i b = _mm256_set1_epi32(static_cast<int>(threshold));
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(a, b), a))};
}

// 64-bit lanes for Philox: product of the low 32 bits of each lane.
using U64 = __m256i;
FG_INLINE U64 multiply32(U64 a, U64 b) { return _mm256_mul_epu32(a, b); }

}  // namespace fg::FG_LEVEL
