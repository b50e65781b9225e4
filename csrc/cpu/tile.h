// Products of small tiles, and the packings they read: what the attention kernels are made of.
//
//   c[i][lane] += sum over k of a[i][k] * b[k][lane]
//
// a is read one element at a time and spread over all lanes, b and c by vectors. In registers are kRows x V
// vectors of c. An element is a float, or, where the CPU multiplies pairs of bf16 into fp32 sums, such a pair
// along k: 32 bits either way, so that packings and products are the same code. Pairs below 2^-126 count as
// zero in those products.
#pragma once

#include "parallel.h"
#include "vec.h"

namespace fg::FG_LEVEL {

constexpr int kRows = W == 16 ? 8 : 4;
constexpr int kVecs =
    3;  // of one panel: with kRows of them in registers the multipliers are never short of work
constexpr int kLanes = kVecs * W;

FG_INLINE int64_t round_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }

struct Floats {
  static constexpr int kEach = 1;  // numbers along k in one element
  using Stored = float;
  FG_INLINE static F multiply_add(F a, F b, F c) { return fma(a, b, c); }
};

#if defined(__AVX512BF16__)
#define FG_BF16_PAIRS 1
struct Pairs {
  static constexpr int kEach = 2;
  using Stored = bf16;
  FG_INLINE static F multiply_add(F a, F b, F c) {
    return {_mm512_dpbf16_ps(c.v, bit_cast<__m512bh>(a.v), bit_cast<__m512bh>(b.v))};
  }
};
#endif

FG_INLINE F spread(const float* p) {
  float x;
  std::memcpy(&x, p, sizeof(x));
  return set(x);
}

// What becomes of c: it starts as nothing, as itself, or as itself times one factor per lane; or the sum,
// made by itself first, is added to it: in many sums of some hundred products each, errors grow less than in
// one.
enum class Start { kZero, kAdd, kScale, kAddLast };

// rows must be a multiple of kRows; a, b and c count in elements of 32 bits. a[i][k] is at a + i * row + k *
// step. Distances may be Constants, which then are in the instructions. `ahead`: an address from which on a
// cache line is asked for with each k, into the second cache, as the next products read it; or Nothing.
struct Nothing {};
template <class Kind, int V, Start S, class Row = int64_t, class Step = int64_t, class Ldb = int64_t,
          class Ahead = Nothing>
inline void product(const float* a, Row row, Step step, const float* b, Ldb ldb, int64_t n, float* c,
                    int64_t ldc, int64_t rows, const float* factors = nullptr, Ahead ahead = {}) {
  for (int64_t first = 0; first < rows; first += kRows) {
    F acc[kRows][V];
    float* const to = c + first * ldc;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int u = 0; u < V; ++u) {
        constexpr bool kFresh = S == Start::kZero || S == Start::kAddLast;
        if constexpr (S == Start::kAddLast) prefetch(to + i * ldc + u * W);
        acc[i][u] = kFresh ? set(0.0f) : load(to + i * ldc + u * W, Full{});
        if constexpr (S == Start::kScale) acc[i][u] = acc[i][u] * load(factors + u * W, Full{});
      }
    }
    const float* from = a + first * row;
    for (int64_t k = 0; k < n; ++k) {
      F column[V];
#pragma GCC unroll 4
      for (int u = 0; u < V; ++u) column[u] = load(b + k * ldb + u * W, Full{});
      if constexpr (!__is_base_of(Nothing, Ahead)) __builtin_prefetch(ahead + k * 64, 0, 2);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const F x = spread(from + i * row + k * step);
#pragma GCC unroll 4
        for (int u = 0; u < V; ++u) acc[i][u] = Kind::multiply_add(x, column[u], acc[i][u]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int u = 0; u < V; ++u) {
        if constexpr (S == Start::kAddLast) acc[i][u] = acc[i][u] + load(to + i * ldc + u * W, Full{});
        store(to + i * ldc + u * W, acc[i][u], Full{});
      }
    }
  }
}

// body(Constant<V>{}) for the vectors of a panel, 1 to kVecs.
template <class Body>
FG_INLINE void with_vecs(int64_t vecs, const Body& body) {
  if (vecs >= 3) return body(Constant<3>{});
  if (vecs == 2) return body(Constant<2>{});
  return body(Constant<1>{});
}

// As `product` over `vecs` vectors of b and c, however many they are.
template <class Kind, Start S>
inline void wide_product(const float* a, int64_t row, int64_t step, const float* b, int64_t ldb, int64_t n,
                         float* c, int64_t ldc, int64_t rows, int64_t vecs) {
  // Four vectors as two and two: three and one would leave the second half short of independent sums.
  for (int64_t u = 0; u < vecs;) {
    const int64_t left = vecs - u, now = left == 4 ? 2 : min_of(left, 3);
    with_vecs(now, [&](auto v) FG_LAMBDA {
      product<Kind, decltype(v)::value, S>(a, row, step, b + u * W, ldb, n, c + u * W, ldc, rows);
    });
    u += now;
  }
}

// --- W x W elements of 32 bits, rows to columns ---

FG_INLINE void transpose(F (&x)[W]) {
#if defined(__AVX512F__)
  __m512 t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
    const __m512d c = _mm512_castps_pd(t[i + 2]), d = _mm512_castps_pd(t[i + 3]);
    x[i].v = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    x[i + 1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    x[i + 2].v = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    x[i + 3].v = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  // x[4 g + j] holds columns j, j + 4, j + 8, j + 12 of rows 4 g … 4 g + 3.
#pragma GCC unroll 16
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_f32x4(x[j].v, x[4 + j].v, 0x88);
    t[4 + j] = _mm512_shuffle_f32x4(x[j].v, x[4 + j].v, 0xdd);
    t[8 + j] = _mm512_shuffle_f32x4(x[8 + j].v, x[12 + j].v, 0x88);
    t[12 + j] = _mm512_shuffle_f32x4(x[8 + j].v, x[12 + j].v, 0xdd);
  }
#pragma GCC unroll 16
  for (int j = 0; j < 4; ++j) {
    x[j].v = _mm512_shuffle_f32x4(t[j], t[8 + j], 0x88);
    x[8 + j].v = _mm512_shuffle_f32x4(t[j], t[8 + j], 0xdd);
    x[4 + j].v = _mm512_shuffle_f32x4(t[4 + j], t[12 + j], 0x88);
    x[12 + j].v = _mm512_shuffle_f32x4(t[4 + j], t[12 + j], 0xdd);
  }
#else
  float from[W][W];
  for (int i = 0; i < W; ++i) store(from[i], x[i], Full{});
  float to[W][W];
  for (int i = 0; i < W; ++i) {
    for (int j = 0; j < W; ++j) to[j][i] = from[i][j];
  }
  for (int i = 0; i < W; ++i) x[i] = load(to[i], Full{});
#endif
}

// The elements first … of a row of `count` numbers, as many as a vector holds; zeros beyond the row.
template <class Kind, class T>
FG_INLINE F load_elements(const T* row, int64_t first, int64_t count) {
#if FG_BF16_PAIRS
  if constexpr (Kind::kEach == 2) {
    static_assert(sizeof(T) == 2);
    const int64_t left = count - 2 * first;
    const __mmask32 there = left >= 32 ? 0xffffffffu : (1u << (left < 0 ? 0 : left)) - 1;
    return {bit_cast<__m512>(_mm512_maskz_loadu_epi16(there, row + 2 * first))};
  } else
#endif
  {
    const int64_t left = count - first;
    if (left >= W) return load(row + first, Full{});
    if (left <= 0) return set(0.0f);
    return keep(load(row + first, Part{static_cast<int>(left)}), Part{static_cast<int>(left)}, set(0.0f));
  }
}

// Elements along a row of `width` numbers.
template <class Kind>
FG_INLINE int64_t elements(int64_t width) {
  return ceil_div(width, Kind::kEach);
}

// to[e][r] = element e of row r for r < lanes, lanes a multiple of W; zeros from `rows` on. e <
// elements(width).
template <class Kind, class T>
inline void pack_columns(const T* from, int64_t stride, int64_t rows, int64_t width, float* to,
                         int64_t lanes) {
  for (int64_t r = 0; r < lanes; r += W) {
    for (int64_t e = 0; e < elements<Kind>(width); e += W) {
      F block[W];
      for (int i = 0; i < W; ++i) {
        block[i] = r + i < rows ? load_elements<Kind>(from + (r + i) * stride, e, width) : set(0.0f);
      }
      transpose(block);
      const int64_t there = min_of(W, elements<Kind>(width) - e);
      for (int i = 0; i < there; ++i) store(to + (e + i) * lanes + r, block[i], Full{});
    }
  }
}

// to[r][e], as the rows are, `width` rounded up to ld elements; zeros beyond, and from `rows` to `padded`.
template <class Kind, class T>
inline void pack_rows(const T* from, int64_t stride, int64_t rows, int64_t padded, int64_t width, float* to,
                      int64_t ld) {
  for (int64_t r = 0; r < padded; ++r) {
    for (int64_t e = 0; e < ld; e += W) {
      const F x = r < rows ? load_elements<Kind>(from + r * stride, e, width) : set(0.0f);
      const int64_t left = ld - e;
      if (left >= W) {
        store(to + r * ld + e, x, Full{});
      } else {
        store(to + r * ld + e, x, Part{static_cast<int>(left)});
      }
    }
  }
}

// The elements along the rows' index, to[r / kEach][d]: floats as they are, pairs of two rows. ld as in
// pack_rows, but in numbers.
template <class Kind, class T>
inline void pack_along(const T* from, int64_t stride, int64_t rows, int64_t padded, int64_t width, float* to,
                       int64_t ld) {
#if FG_BF16_PAIRS
  if constexpr (Kind::kEach == 2) {
    for (int64_t r = 0; r < padded; r += 2) {
      for (int64_t d = 0; d < ld; d += W) {
        const int64_t left = width - d;
        const __mmask16 there =
            left >= W ? 0xffff : static_cast<__mmask16>((1u << (left < 0 ? 0 : left)) - 1);
        const __mmask16 low = r < rows ? there : 0, high = r + 1 < rows ? there : 0;
        const __m256i a = _mm256_maskz_loadu_epi16(low, from + r * stride + d);
        const __m256i b = _mm256_maskz_loadu_epi16(high, from + (r + 1) * stride + d);
        const __m512i both =
            _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
        const int64_t space = ld - d;
        const __mmask16 stored = space >= W ? 0xffff : static_cast<__mmask16>((1u << space) - 1);
        _mm512_mask_storeu_epi32(to + r / 2 * ld + d, stored, both);
      }
    }
    return;
  }
#endif
  pack_rows<Kind>(from, stride, rows, padded, width, to, ld);
}

// to[r][d] = from[d][r], the inverse of pack_columns for floats, times factors[r]: `rows` rows of `width`
// numbers.
template <class T>
inline void unpack_columns(const float* from, int64_t lanes, int64_t rows, int64_t width,
                           const float* factors, T* to, int64_t stride) {
  for (int64_t r = 0; r < rows; r += W) {
    const F factor = load(factors + r, Full{});
    for (int64_t d = 0; d < width; d += W) {
      F block[W];
      for (int i = 0; i < W; ++i)
        block[i] = d + i < width ? load(from + (d + i) * lanes + r, Full{}) * factor : set(0.0f);
      transpose(block);
      const int64_t left = width - d, there = min_of(W, rows - r);
      for (int i = 0; i < there; ++i) {
        if (left >= W) {
          store(to + (r + i) * stride + d, block[i], Full{});
        } else {
          store(to + (r + i) * stride + d, block[i], Part{static_cast<int>(left)});
        }
      }
    }
  }
}

}  // namespace fg::FG_LEVEL
