// The two products of attention for a handful of queries (decoding): features lie in the lanes instead of
// queries, and keys and values are streamed once from where they are, unpacked. The softmax between them is
// the tiles' own.
#pragma once

#include "attention.h"

namespace fg::FG_LEVEL {

constexpr int64_t kFew = 4;  // queries; from five on a panel's sixteen lanes are the faster ones

// scores[j][r] = sum over d of k[j][d] q[r][d], [key][query] as in a tile, zeros in the other lanes. q: fp32
// rows, ldq numbers apart, zeros beyond the width.
template <class T>
inline void few_scores(const float* q, int64_t ldq, int64_t queries, const T* k, int64_t stride, int64_t keys,
                       int64_t padded, int64_t width, float* scores, int64_t lanes) {
  std::memset(scores, 0, static_cast<uint64_t>(padded * lanes) * sizeof(float));
  for (int64_t j = 0; j < keys; j += W) {
    const int64_t there = min_of(W, keys - j);
    for (int64_t r = 0; r < queries; ++r) {
      F sums[W];
      const auto add = [&](int64_t d, auto part) FG_LAMBDA {
        const F x = load(q + r * ldq + d, Full{});
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          if (there == W || i < there)
            sums[i] = fma(keep(load(k + (j + i) * stride + d, part), part, set(0.0f)), x, sums[i]);
        }
      };
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) sums[i] = set(0.0f);
      int64_t d = 0;
      if (there == W) {
        for (; d + W <= width; d += W) {
          const F x = load(q + r * ldq + d, Full{});
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) sums[i] = fma(load(k + (j + i) * stride + d, Full{}), x, sums[i]);
        }
      } else {
        for (; d + W <= width; d += W) add(d, Full{});
      }
      if (d < width) add(d, Part{static_cast<int>(width - d)});
      transpose(sums);
#pragma GCC unroll 16
      for (int half = W / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) sums[i] = sums[i] + sums[i + half];
      }
      alignas(64) float dots[W];
      store(dots, sums[0], Full{});
      for (int64_t i = 0; i < there; ++i) scores[(j + i) * lanes + r] = dots[i];
    }
  }
}

// acc[r][d] = acc[r][d] * factors[r] + sum over j of weights[j][r] v[j][d]; lda a multiple of W.
template <class T>
inline void few_values(const float* weights, int64_t lanes, int64_t queries, const T* v, int64_t stride,
                       int64_t keys, int64_t width, const float* factors, float* acc, int64_t lda) {
  for (int64_t r = 0; r < queries; ++r) {
    for (int64_t first = 0; first < width; first += 8 * W) {
      const int64_t count = min_of(8 * W, width - first);
      F sums[8];
      for (int i = 0; i < 8; ++i) {
        const bool there = i * W < count;
        sums[i] = there ? load(acc + r * lda + first + i * W, Full{}) * set(factors[r]) : set(0.0f);
      }
      int64_t j = 0;
      if (count == 4 * W) {  // the usual width: two sums for each vector, or one would wait for the other
        for (; j + 2 <= keys; j += 2) {
          const F p0 = set(weights[j * lanes + r]), p1 = set(weights[(j + 1) * lanes + r]);
          const T *row = v + j * stride + first, *next = row + stride;
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            sums[i] = fma(p0, load(row + i * W, Full{}), sums[i]);
            sums[4 + i] = fma(p1, load(next + i * W, Full{}), sums[4 + i]);
          }
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          sums[i] = sums[i] + sums[4 + i];
          sums[4 + i] = set(0.0f);
        }
      }
      for (; j < keys; ++j) {
        const F p = set(weights[j * lanes + r]);
        const T* row = v + j * stride + first;
        if (count == 8 * W) {
#pragma GCC unroll 8
          for (int i = 0; i < 8; ++i) sums[i] = fma(p, load(row + i * W, Full{}), sums[i]);
          continue;
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          const int64_t left = count - i * W;
          if (left >= W) {
            sums[i] = fma(p, load(row + i * W, Full{}), sums[i]);
          } else if (left > 0) {
            const Part part{static_cast<int>(left)};
            sums[i] = fma(p, keep(load(row + i * W, part), part, set(0.0f)), sums[i]);
          }
        }
      }
      for (int i = 0; i * W < count; ++i) store(acc + r * lda + first + i * W, sums[i], Full{});
    }
  }
}

}  // namespace fg::FG_LEVEL
