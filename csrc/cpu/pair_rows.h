// x W^T for a handful of rows of x and a W of int8 or bf16 by products of pairs, twice as many in an
// instruction as of fp32. Every sum has one order, which depends on nothing but the width: a row's results
// are the same bits whatever rows are beside it.
//
//   int8   x = scale * int16 with scale = largest magnitude / 32767: at most 2^-16 of the largest in a row is
//   lost;
//          sums are exact within a stretch of columns
//   bf16   x rounded to bf16, sums in fp32; subnormals of either count as zero
#pragma once

#include "parallel.h"
#include "vec.h"

namespace fg::FG_LEVEL {

template <class T>
constexpr bool kByPairs = false;

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
template <>
constexpr bool kByPairs<i8> = true;
template <>
constexpr bool kByPairs<bf16> = true;

constexpr int64_t kInPairs = 2 * W;  // numbers in a vector
// Columns after which sums are moved on. A lane of int32 takes two products of at most 127 * 32768 from each
// vector; four lanes of so many fit one.
constexpr int64_t kStretch = 64 * kInPairs;

// body(j, x[j, j + W)) up to a whole vector of pairs, with zeros beyond k.
template <class Body>
FG_INLINE void for_padded(const float* x, int64_t k, const Body& body) {
  for (int64_t j = 0; j < ceil_div(k, kInPairs) * kInPairs; j += W) {
    body(j, j + W <= k ? load(x + j, Full{})
            : j < k    ? load(x + j, Part{static_cast<int>(k - j)})
                       : set(0.0f));
  }
}

// A row x [k] as `to` wants it, and its scale: NaN if one of x is NaN or infinite; so is then all that is
// made of it.
FG_INLINE float narrow_row(const float* x, int64_t k, int16_t* to, i8) {
  F largest = set(0.0f), poison = set(0.0f);
  for_lanes<1>(k, [&](int64_t j, int, auto lanes) FG_LAMBDA {
    const F v = load(x + j, lanes);
    largest = vmax(vabs(v), largest);
    poison = fma(v, set(0.0f), poison);
  });
  const float scale = hmax(vmax(largest * set(1.0f / 32767.0f), set(0x1p-120f)));
  const F inverse = set(1.0f / scale);
  for_padded(x, k, [&](int64_t j, F v) FG_LAMBDA {
    const __m512i rounded = _mm512_cvtps_epi32((v * inverse).v);
    _mm256_storeu_si256(reinterpret_cast<__m256i_u*>(to + j), _mm512_cvtsepi32_epi16(rounded));
  });
  return scale + hsum(poison);
}
FG_INLINE float narrow_row(const float* x, int64_t k, int16_t* to, bf16) {
  for_padded(x, k, [&](int64_t j, F v) FG_LAMBDA { store(reinterpret_cast<bf16*>(to + j), v, Full{}); });
  return 1.0f;
}

FG_INLINE __m512i load_pairs(const i8* p, Full) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(p)));
}
FG_INLINE __m512i load_pairs(const i8* p, Part part) {
  return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8((1u << part.n) - 1, p));
}
FG_INLINE __m512i load_pairs(const bf16* p, Full) { return _mm512_loadu_si512(p); }
FG_INLINE __m512i load_pairs(const bf16* p, Part part) {
  return _mm512_maskz_loadu_epi16((1u << part.n) - 1, p);
}

// acc + the products of pairs. As instructions by name: of the intrinsic GCC 12 makes one and two copies.
FG_INLINE void add_pairs(__m512i& acc, __m512i a, __m512i b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}
FG_INLINE void add_pairs(__m512& acc, __m512i a, __m512i b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}

template <class T>
struct SumsOf {
  using type = __m512;
};
template <>
struct SumsOf<i8> {
  using type = __m512i;
};

// In each quarter four sums over its lanes, of each of four vectors.
FG_INLINE __m512 quarters(const __m512i* a) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
  return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd)));
}
FG_INLINE __m512 quarters(const __m512* a) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  return _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
}
FG_INLINE __m128 sum_quarters(__m512 a) {
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

// out[r * ldo + i] = sum over j of x[r][j] w[i][j], for R rows of x and J <= 4 of W.
template <int R, int J, class T>
FG_INLINE void pair_tile(const int16_t* x, int64_t ldx, const T* w, int64_t ldw, int64_t k, float* out,
                         int64_t ldo) {
  __m128 total[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) total[r] = _mm_setzero_ps();
  for (int64_t from = 0; from < k; from += kStretch) {
    typename SumsOf<T>::type acc[R][4] = {};
    const auto step = [&](int64_t j, auto lanes) FG_LAMBDA {
      __m512i weights[J];
#pragma GCC unroll 4
      for (int i = 0; i < J; ++i) {
        __builtin_prefetch(w + (i + J) * ldw + j, 0, 2);  // the next rows
        weights[i] = load_pairs(w + i * ldw + j, lanes);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m512i row = _mm512_loadu_si512(x + r * ldx + j);
#pragma GCC unroll 4
        for (int i = 0; i < J; ++i) add_pairs(acc[r][i], row, weights[i]);
      }
    };
    const int64_t to = min_of(k, from + kStretch);
    int64_t j = from;
    for (; j + kInPairs <= to; j += kInPairs) step(j, Full{});
    if (j < to) step(j, Part{static_cast<int>(to - j)});
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) total[r] = _mm_add_ps(total[r], sum_quarters(quarters(acc[r])));
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
    _mm_mask_storeu_ps(out + r * ldo, static_cast<__mmask8>((1u << J) - 1), total[r]);
}

template <int J, class T>
FG_INLINE void pair_tiles(const int16_t* x, int64_t ldx, int64_t rows, const T* w, int64_t ldw, int64_t k,
                          float* out, int64_t ldo) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) pair_tile<4, J>(x + r * ldx, ldx, w, ldw, k, out + r * ldo, ldo);
  x += r * ldx, out += r * ldo, rows -= r;
  if (rows == 3) pair_tile<3, J>(x, ldx, w, ldw, k, out, ldo);
  if (rows == 2) pair_tile<2, J>(x, ldx, w, ldw, k, out, ldo);
  if (rows == 1) pair_tile<1, J>(x, ldx, w, ldw, k, out, ldo);
}

// out[r * ldo + i] for `rows` rows of x and n of W, without the scales of either.
template <class T>
inline void pair_rows(const int16_t* x, int64_t ldx, int64_t rows, const T* w, int64_t ldw, int64_t k,
                      int64_t n, float* out, int64_t ldo) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) pair_tiles<4>(x, ldx, rows, w + i * ldw, ldw, k, out + i, ldo);
  for (; i < n; ++i) pair_tiles<1>(x, ldx, rows, w + i * ldw, ldw, k, out + i, ldo);
}
#endif

}  // namespace fg::FG_LEVEL
