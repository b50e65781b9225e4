// x W^T for a handful of rows of x and a W of int8: x as int16, products of pairs added up in int32 (VNNI),
// two numbers of W in the time of one as fp32. Within a stretch of kExact columns the sums are exact, so that
// no order of them matters; a row's results are the same bits whatever rows are beside it.
//
// x = scale * int16 with scale = largest magnitude / 32767: what is lost is at most 2^-16 of the largest in a
// row.
#pragma once

#include "parallel.h"
#include "vec.h"

namespace fg::FG_LEVEL {

#if defined(__AVX512VNNI__)
constexpr bool kInt16Pairs = true;
constexpr int64_t kPairs = 2 * W;  // numbers in a vector of int16
// A lane takes two products of at most 127 * 32768 from each vector; four lanes of so many fit an int32.
constexpr int64_t kExact = 64 * kPairs;

// The scale of a row x [k], which is written as int16 to `to`, with zeros up to a whole vector. NaN if one of
// x is NaN or infinite: so is then all that is made of the row.
FG_INLINE float quantize_row(const float* x, int64_t k, int16_t* to) {
  F largest = set(0.0f), poison = set(0.0f);
  for_lanes<1>(k, [&](int64_t j, int, auto lanes) FG_LAMBDA {
    const F v = load(x + j, lanes);
    largest = vmax(vabs(v), largest);
    poison = fma(v, set(0.0f), poison);
  });
  const float scale = hmax(vmax(largest * set(1.0f / 32767.0f), set(0x1p-120f)));
  const F inverse = set(1.0f / scale);
  for_lanes<1>(ceil_div(k, kPairs) * kPairs, [&](int64_t j, int, auto) FG_LAMBDA {
    const F v = j + W <= k ? load(x + j, Full{})
                : j < k    ? load(x + j, Part{static_cast<int>(k - j)})
                           : set(0.0f);
    const __m512i rounded = _mm512_cvtps_epi32((v * inverse).v);
    _mm256_storeu_si256(reinterpret_cast<__m256i_u*>(to + j), _mm512_cvtsepi32_epi16(rounded));
  });
  return scale + hsum(poison);
}

FG_INLINE __m512i load_int8(const i8* p, Full) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(p)));
}
FG_INLINE __m512i load_int8(const i8* p, Part part) {
  return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8((1u << part.n) - 1, p));
}

// acc + the products of pairs. As an instruction by name: of the intrinsic GCC 12 makes one and two copies.
FG_INLINE void add_pairs(__m512i& acc, __m512i a, __m512i b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}

// The sums of the lanes of each of four.
FG_INLINE __m128 sums_of(const __m512i* a) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
  // In each quarter the four sums over its lanes.
  const __m512 quarters =
      _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd)));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

// out[r * ldo + i] = sum over j of x[r][j] w[i][j], for R rows of x and J <= 4 of W.
template <int R, int J>
FG_INLINE void int8_tile(const int16_t* x, int64_t ldx, const i8* w, int64_t ldw, int64_t k, float* out,
                         int64_t ldo) {
  __m128 total[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) total[r] = _mm_setzero_ps();
  for (int64_t from = 0; from < k; from += kExact) {
    __m512i acc[R][4];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) acc[r][i] = _mm512_setzero_si512();
    const auto step = [&](int64_t j, auto lanes) FG_LAMBDA {
      __m512i weights[J];
#pragma GCC unroll 4
      for (int i = 0; i < J; ++i) {
        __builtin_prefetch(w + (i + J) * ldw + j, 0, 2);  // the next rows
        weights[i] = load_int8(w + i * ldw + j, lanes);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m512i row = _mm512_loadu_si512(x + r * ldx + j);
#pragma GCC unroll 4
        for (int i = 0; i < J; ++i) add_pairs(acc[r][i], row, weights[i]);
      }
    };
    const int64_t to = min_of(k, from + kExact);
    int64_t j = from;
    for (; j + kPairs <= to; j += kPairs) step(j, Full{});
    if (j < to) step(j, Part{static_cast<int>(to - j)});
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) total[r] = _mm_add_ps(total[r], sums_of(acc[r]));
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
    _mm_mask_storeu_ps(out + r * ldo, static_cast<__mmask8>((1u << J) - 1), total[r]);
}

template <int J>
FG_INLINE void int8_tiles(const int16_t* x, int64_t ldx, int64_t rows, const i8* w, int64_t ldw, int64_t k,
                          float* out, int64_t ldo) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) int8_tile<4, J>(x + r * ldx, ldx, w, ldw, k, out + r * ldo, ldo);
  x += r * ldx, out += r * ldo, rows -= r;
  if (rows == 3) int8_tile<3, J>(x, ldx, w, ldw, k, out, ldo);
  if (rows == 2) int8_tile<2, J>(x, ldx, w, ldw, k, out, ldo);
  if (rows == 1) int8_tile<1, J>(x, ldx, w, ldw, k, out, ldo);
}

// out[r * ldo + i] for `rows` rows of x and n of W, without the scales of either.
inline void int8_rows(const int16_t* x, int64_t ldx, int64_t rows, const i8* w, int64_t ldw, int64_t k,
                      int64_t n, float* out, int64_t ldo) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) int8_tiles<4>(x, ldx, rows, w + i * ldw, ldw, k, out + i, ldo);
  for (; i < n; ++i) int8_tiles<1>(x, ldx, rows, w + i * ldw, ldw, k, out + i, ldo);
}

#else
constexpr bool kInt16Pairs = false;
float quantize_row(const float* x, int64_t k, int16_t* to);
void int8_rows(const int16_t* x, int64_t ldx, int64_t rows, const i8* w, int64_t ldw, int64_t k, int64_t n,
               float* out, int64_t ldo);
#endif

}  // namespace fg::FG_LEVEL
