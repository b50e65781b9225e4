// The row loops of LayerNorm and of RMSNorm, which is LayerNorm without centring and without a bias.
//
// Each row is read from memory once; the passes that follow find it in cache, in its own type: converting it
// again costs less than what fp32 scratch would take from the caches. While some rows are computed, the next
// ones are asked for.
#pragma once

#include "norm.h"
#include "parallel.h"
#include "reduce.h"
#include "stream.h"

namespace fg::FG_LEVEL {
namespace {

// Asks for a line that the next rows need, into the core's second cache: the first has no room for it beside
// the rows in work. u: as for_lanes<2> gives it, for a line holds two vectors of 16-bit elements.
template <class T, class Lanes>
FG_INLINE void prefetch_row(const T* p, int u, Lanes) {
  if (__is_base_of(Twice, Lanes) || W * sizeof(T) >= 64 || u % 2 == 0) __builtin_prefetch(p, 0, 2);
}

struct Forward {
  const void *x, *residual;
  const float *w, *b;
  void *y, *stream;
  float *mean, *rstd;
  int64_t rows, n, x_stride, residual_stride;
  float eps;
};

// What a row is shifted by and scaled with.
struct Stats {
  float mean, shift, rstd;  // the mean is mean + shift: kept apart, because (x - mean) is exact for x near it
};

// Two-pass with a correction: sum(s - mean) repairs what rounding did to the mean, so that data with a large
// mean is safe (Chan, Golub, LeVeque 1983, eq. 1.7). `next`: a row that is asked for meanwhile.
template <bool Two, class R, class T>
FG_INLINE Stats centred_stats(const R* row, float sum, int64_t n, float eps, const T* next) {
  const float inverse_n = n > 0 ? 1.0f / static_cast<float>(n) : 0.0f;
  const float mean = sum * inverse_n;
  float d_sum = 0.0f, d_squares = 0.0f;
  for (int64_t begin = 0; begin < n; begin += kSegment) {
    F s[4] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)}, q[4] = {s[0], s[0], s[0], s[0]};
    for_lanes<4, Two>(min_of(kSegment, n - begin), [&](int64_t k, int u, auto lanes) FG_LAMBDA {
      const int64_t j = begin + k;
      prefetch_row(next + j, u, lanes);
      const auto d = keep(load(row + j, lanes) - set(mean), lanes, set(0.0f));
      s[u] = add(s[u], d);
      q[u] = add_product(q[u], d, d);
    });
    d_sum += hsum((s[0] + s[1]) + (s[2] + s[3]));
    d_squares += hsum((q[0] + q[1]) + (q[2] + q[3]));
  }
  const float shift = d_sum * inverse_n;
  const float variance = (d_squares - d_sum * shift) * inverse_n;
  return {mean, shift, 1.0f / __builtin_sqrtf((variance > 0.0f ? variance : variance * 0.0f) + eps)};
}

// T: type of x and y; R: type of residual and stream, T without them. Where T is taken Twice, w and b are in
// that order.
template <class T, class R, bool kCentered, bool HasResidual>
void forward_rows(const Forward& a, int64_t begin, int64_t end) {
  constexpr bool Two = kTwice<T>;
  const Streaming streaming(streamed_bytes(static_cast<const T*>(a.y), a.rows, a.n));
  // What the pass for the variance asks for: y, which a plain store reads first, or the next row.
  const bool y_first = !streaming.on;
  const int64_t n = a.n;
  const float *w = a.w, *b = a.b;
  for (int64_t i = begin; i < end; ++i) {
    const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
    const T* x_next = x + a.x_stride;
    T* y = static_cast<T*>(a.y) + i * n;
    const R *residual_next = nullptr, *row;  // y is of the rounded stream
    const auto summed = [](auto v) FG_LAMBDA {
      if constexpr (kCentered)
        return v;
      else
        return v * v;
    };
    float sum;
    if constexpr (HasResidual) {
      const R* residual = static_cast<const R*>(a.residual) + i * a.residual_stride;
      R* stream = static_cast<R*>(a.stream) + i * n;
      residual_next = residual + a.residual_stride;
      row = stream;
      sum = sum_lanes<Two>(n, [&](int64_t j, auto lanes) FG_LAMBDA {
        store(stream + j, load(x + j, lanes) + load(residual + j, lanes), lanes);
        return summed(load(stream + j, lanes));
      });
    } else {
      row = x;
      sum = sum_lanes<Two>(n, [&](int64_t j, auto lanes) FG_LAMBDA { return summed(load(x + j, lanes)); });
    }
    Stats stats;
    if constexpr (kCentered) {
      stats = centred_stats<Two>(row, sum, n, a.eps, y_first ? y : x_next);
      store_scalar(a.mean + i, stats.mean + stats.shift);
    } else {
      const float inverse_n = n > 0 ? 1.0f / static_cast<float>(n) : 0.0f;
      stats = {0.0f, 0.0f, 1.0f / __builtin_sqrtf(sum * inverse_n + a.eps)};
    }
    store_scalar(a.rstd + i, stats.rstd);
    const F mean = set(stats.mean), rstd = set(stats.rstd), minus_offset = set(-stats.shift * stats.rstd);
    for_lanes_out<2, Two>(y, n, streaming.on, [&](int64_t j, int u, auto lanes) FG_LAMBDA {
      const auto v = load(row + j, lanes);
      if constexpr (kCentered) {
        put(y + j,
            fma(fma(v - mean, rstd, minus_offset), load_scratch(w + j, lanes), load_scratch(b + j, lanes)),
            lanes);
      } else {
        put(y + j, v * rstd * load_scratch(w + j, lanes), lanes);
      }
      if (!kCentered || y_first) prefetch_row(x_next + j, u, lanes);
      if constexpr (HasResidual) prefetch_row(residual_next + j, u, lanes);
    });
  }
}

template <bool kCentered>
void norm_forward(const Forward& a, int x_dtype, int residual_dtype, int num_threads) {
  parallel_chunks(a.rows, rows_per_chunk(a.rows, a.n, num_threads), a.rows * a.n, num_threads,
                  [&](int64_t begin, int64_t end) {
                    if (a.residual == nullptr) {
                      return with_dtype(x_dtype, [&](auto type) {
                        using T = typename decltype(type)::type;
                        forward_rows<T, T, kCentered, false>(a, begin, end);
                      });
                    }
                    with_dtypes(x_dtype, residual_dtype, [&](auto type, auto residual_type) {
                      using T = typename decltype(type)::type;
                      using R = typename decltype(residual_type)::type;
                      forward_rows<T, R, kCentered, true>(a, begin, end);
                    });
                  });
}

struct Backward {
  const void *dy, *dstream, *x;
  const float *w, *mean, *rstd;
  void *dx, *dresidual;
  int64_t rows, n, dy_stride, x_stride;
};

// kRows rows at once: dw and db, which every row adds to, are then read and written once for all of them.
// Memory is read in both passes: the next rows of x are asked for in the first, of dy and dstream in the
// second.
//
// T: type of dy and dx; X: type of x (the stream), dstream and dresidual. dw and db are added to. Where T is
// taken Twice, w, dw and db are in that order.
template <class T, class X, bool kCentered, bool Params, int kRows>
FG_INLINE void backward_block(const Backward& a, float* dw, float* db, int64_t first, bool streaming) {
  constexpr bool Two = kTwice<T>;
  const int64_t n = a.n, dy_stride = a.dy_stride, x_stride = a.x_stride;
  const float* w = a.w;
  const float inverse_n = n > 0 ? 1.0f / static_cast<float>(n) : 0.0f;
  const T* dy = static_cast<const T*>(a.dy) + first * dy_stride;
  const X* x = static_cast<const X*>(a.x) + first * x_stride;
  F mean[kRows], rstd[kRows];
  float c1[kRows] = {}, c2[kRows] = {}, inverse[kRows];
  for (int r = 0; r < kRows; ++r) {
    if constexpr (kCentered) mean[r] = set(load_scalar(a.mean + first + r));
    inverse[r] = load_scalar(a.rstd + first + r);
    rstd[r] = set(inverse[r]);
  }
  const auto centred = [&](auto v, int r) FG_LAMBDA {
    if constexpr (kCentered)
      return v - mean[r];
    else
      return v;
  };
  for (int64_t segment = 0; segment < n; segment += kSegment) {
    F s1[kRows], s2[kRows];
    for (int r = 0; r < kRows; ++r) s1[r] = s2[r] = set(0.0f);
    for_lanes<Two ? 1 : 2, Two>(min_of(kSegment, n - segment), [&](int64_t k, int u, auto lanes) FG_LAMBDA {
      const int64_t j = segment + k;
      const auto weight = load_scratch(w + j, lanes);
      decltype(load_scratch(w, lanes)) dw_j, db_j;
      if constexpr (Params) {
        dw_j = load_scratch(dw + j, lanes);
        if constexpr (kCentered) db_j = load_scratch(db + j, lanes);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const auto g = load(dy + r * dy_stride + j, lanes);
        prefetch_row(x + (kRows + r) * x_stride + j, u, lanes);
        // The row's rstd comes last, where it is a factor of sums: c2, dw's multiply-add, dx.
        const auto gx = keep(g * centred(load(x + r * x_stride + j, lanes), r), lanes, set(0.0f));
        s2[r] = add_product(s2[r], gx, weight);
        if constexpr (kCentered) s1[r] = add_product(s1[r], g, weight);
        if constexpr (Params) {
          dw_j = fma(gx, rstd[r], dw_j);
          if constexpr (kCentered) db_j = db_j + g;
        }
      }
      if constexpr (Params) {
        store_scratch(dw + j, dw_j, lanes);
        if constexpr (kCentered) store_scratch(db + j, db_j, lanes);
      }
    });
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kCentered) c1[r] += hsum(s1[r]);
      c2[r] += hsum(s2[r]) * inverse[r];
    }
  }
  if (a.dx == nullptr) return;
  T* dx = static_cast<T*>(a.dx) + first * n;
  for (int r = 0; r < kRows; ++r) {
    const T* dy_r = dy + r * dy_stride;
    const X* x_r = x + r * x_stride;
    T* dx_r = dx + r * n;
    const int64_t at = (first + r) * n;
    const X* dstream = static_cast<const X*>(a.dstream) + (a.dstream != nullptr ? at : 0);
    X* dresidual = static_cast<X*>(a.dresidual) + (a.dresidual != nullptr ? at : 0);
    const F m1 = set(-c1[r] * inverse_n), m2 = set(c2[r] * inverse_n * inverse[r]);
    for_lanes_out<2, Two>(dx_r, n, streaming, [&](int64_t j, int u, auto lanes) FG_LAMBDA {
      prefetch_row(dy_r + kRows * dy_stride + j, u, lanes);
      auto d = load(dy_r + j, lanes);
      if constexpr (kCentered) {
        d = fma(d, load_scratch(w + j, lanes), m1);
      } else {
        d = d * load_scratch(w + j, lanes);
      }
      d = fnma(centred(load(x_r + j, lanes), r), m2, d) * rstd[r];
      if (a.dstream != nullptr) {
        d = d + load(dstream + j, lanes);
        prefetch_row(dstream + kRows * n + j, u, lanes);
      }
      put(dx_r + j, d, lanes);
      if (a.dresidual != nullptr) store(dresidual + j, d, lanes);
    });
  }
}

// The second pass reads a block's dy and x again, from cache up to this many bytes. Beyond the second cache,
// too, that costs less than reading and writing wide dw and db for every row.
constexpr int64_t kBlockBytes = 2 * 1024 * 1024;
constexpr int kBlockRows = 4;

template <class T, class X, bool kCentered, bool Params>
void backward_rows(const Backward& a, float* dw, float* db, int64_t begin, int64_t end) {
  const Streaming streaming(streamed_bytes(static_cast<const T*>(a.dx), a.rows, a.n));
  int64_t i = begin;
  if (kBlockRows * a.n * static_cast<int64_t>(sizeof(T) + sizeof(X)) <= kBlockBytes) {
    for (; i + kBlockRows <= end; i += kBlockRows)
      backward_block<T, X, kCentered, Params, kBlockRows>(a, dw, db, i, streaming.on);
  }
  for (; i < end; ++i) backward_block<T, X, kCentered, Params, 1>(a, dw, db, i, streaming.on);
}

// Sums for dw, then (centred) for db, both from the start of a cache line.
inline int64_t line_up(int64_t n) { return ceil_div(n, 16) * 16; }
template <bool kCentered>
inline int64_t sums_size(int64_t n) {
  return (kCentered ? 2 : 1) * line_up(n);
}

// A part's rows, its dw and db into `sums`, which may be null.
template <class T, class X, bool kCentered>
void backward_part(const Backward& a, float* sums, int64_t begin, int64_t end) {
  const int64_t floats = sums_size<kCentered>(a.n);
  const uint64_t bytes = static_cast<uint64_t>(floats) * sizeof(float);
  if (sums == nullptr) return backward_rows<T, X, kCentered, false>(a, nullptr, nullptr, begin, end);
  std::memset(sums, 0, bytes);
  if (end - begin <= kFlushRows)
    return backward_rows<T, X, kCentered, true>(a, sums, sums + line_up(a.n), begin, end);
  Scratch scratch(floats);
  float* dw = scratch.data;
  for (int64_t i = begin; i < end; i += kFlushRows) {
    std::memset(dw, 0, bytes);
    backward_rows<T, X, kCentered, true>(a, dw, dw + line_up(a.n), i, min_of(i + kFlushRows, end));
    add_into(sums, dw, floats);
  }
}

// dw, db: null where not needed.
template <bool kCentered>
void norm_backward(const Backward& a, void* dw, void* db, int dy_dtype, int x_dtype, int weight_dtype,
                   int num_threads) {
  const int64_t n = a.n, floats = sums_size<kCentered>(n);
  const bool need_params = dw != nullptr || db != nullptr;
  const Parts parts(a.rows);
  Scratch sums(need_params ? parts.count * floats : 0);
  const int64_t step = need_params ? parts.size : rows_per_chunk(a.rows, n, num_threads);
  parallel_chunks(a.rows, max_of(1, step), a.rows * n, num_threads, [&](int64_t begin, int64_t end) {
    float* own = need_params ? sums.data + begin / step * floats : nullptr;
    with_dtypes(dy_dtype, x_dtype, [&](auto type, auto x_type) {
      using T = typename decltype(type)::type;
      using X = typename decltype(x_type)::type;
      backward_part<T, X, kCentered>(a, own, begin, end);
    });
  });
  if (!need_params) return;
  const auto reduce = [&](const float* from, void* to) {
    with_dtype(weight_dtype, [&](auto type) {
      using P = typename decltype(type)::type;
      if constexpr (kTwice<bf16> && !__is_same(P, f16)) {
        if (takes_twice(dy_dtype))
          return reduce_parts<true>(from, parts.count, floats, n, static_cast<P*>(to), num_threads);
      }
      reduce_parts(from, parts.count, floats, n, static_cast<P*>(to), num_threads);
    });
  };
  reduce(sums.data, dw);
  if constexpr (kCentered) reduce(sums.data + line_up(n), db);
}

}  // namespace
}  // namespace fg::FG_LEVEL
