// LayerNorm over the last dimension, and its gradient.
//
//   y = (s - mean) * rstd * w + b,  s = x + residual rounded to the residual's type
//   dx = rstd * (w dy - c1 - xhat * c2) + dstream,  c1 = mean(w dy), c2 = mean(w dy * xhat), xhat = (s -
//   mean) * rstd dw = sum_rows dy * xhat,  db = sum_rows dy
//
// Each row is read from memory once; the passes that follow find it in cache, in its own type: converting it
// again costs less than what fp32 scratch would take from the caches. Statistics are two-pass with a
// correction: sum(s - mean) repairs what rounding did to the mean, so that data with a large mean is safe
// (Chan, Golub, LeVeque 1983, eq. 1.7).

#include "export.h"
#include "norm.h"
#include "parallel.h"
#include "reduce.h"
#include "stream.h"

namespace fg::FG_LEVEL {
namespace {

struct Stats {
  float mean, shift, rstd;  // the mean is mean + shift: kept apart, because (x - mean) is exact for x near it
};

// `written`: what is stored to next, asked for while memory is idle.
template <class R, class T>
FG_INLINE Stats row_stats(const R* row, float sum, int64_t n, float eps, const T* written) {
  const float inverse_n = n > 0 ? 1.0f / static_cast<float>(n) : 0.0f;
  const float mean = sum * inverse_n;
  float d_sum = 0.0f, d_squares = 0.0f;
  for (int64_t begin = 0; begin < n; begin += kSegment) {
    const int64_t count = min_of(kSegment, n - begin);
    F s[2] = {set(0.0f), set(0.0f)}, q[4] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
    for_lanes<4>(count, [&](int64_t j, int u, auto lanes) FG_LAMBDA {
      prefetch(written + begin + j);
      const F d = keep(load(row + begin + j, lanes) - set(mean), lanes, set(0.0f));
      s[u % 2] = s[u % 2] + d;
      q[u] = fma(d, d, q[u]);
    });
    d_sum += hsum(s[0] + s[1]);
    d_squares += hsum((q[0] + q[1]) + (q[2] + q[3]));
  }
  const float shift = d_sum * inverse_n;
  const float variance = (d_squares - d_sum * shift) * inverse_n;
  return {mean, shift, 1.0f / __builtin_sqrtf((variance > 0.0f ? variance : variance * 0.0f) + eps)};
}

struct Forward {
  const void *x, *residual;
  void *y, *stream;
  float *mean, *rstd;
  int64_t rows, n, x_stride, residual_stride;
  float eps;
};

template <class T, class R, bool HasResidual>
void forward_rows(const Forward& a, const float* w, const float* b, int64_t begin, int64_t end) {
  const Streaming streaming(a.rows * a.n * static_cast<int64_t>(sizeof(T)));
  for (int64_t i = begin; i < end; ++i) {
    const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
    const R *residual = nullptr, *row;  // R is T without a residual
    float sum;
    if constexpr (HasResidual) {
      residual = static_cast<const R*>(a.residual) + i * a.residual_stride;
      R* stream = static_cast<R*>(a.stream) + i * a.n;
      row = stream;  // y is of the rounded stream
      sum = sum_lanes(a.n, [&](int64_t j, auto lanes) FG_LAMBDA {
        store(stream + j, load(x + j, lanes) + load(residual + j, lanes), lanes);
        return load(stream + j, lanes);
      });
    } else {
      row = x;
      sum = sum_lanes(a.n, [&](int64_t j, auto lanes) FG_LAMBDA { return load(x + j, lanes); });
    }
    T* y = static_cast<T*>(a.y) + i * a.n;
    const Stats stats = row_stats(row, sum, a.n, a.eps, streaming.on ? x + a.x_stride : y);
    store_scalar(a.mean + i, stats.mean + stats.shift);
    store_scalar(a.rstd + i, stats.rstd);
    const F mean = set(stats.mean), rstd = set(stats.rstd), minus_offset = set(-stats.shift * stats.rstd);
    for_lanes_out<2>(y, a.n, streaming.on, [&](int64_t j, int, auto lanes) FG_LAMBDA {
      const F xhat = fma(load(row + j, lanes) - mean, rstd, minus_offset);
      put(y + j, fma(xhat, load(w + j, lanes), load(b + j, lanes)), lanes);
      prefetch(x + a.x_stride + j);
      if constexpr (HasResidual) {
        prefetch(residual + a.residual_stride + j);
        prefetch(row + a.n + j);
      }
    });
  }
}

struct Backward {
  const void *dy, *dstream, *x;
  const float *mean, *rstd;
  void *dx, *dresidual;
  int64_t rows, n, dy_stride, x_stride;
};

// R rows at once: dw and db, which every row adds to, are then read and written once for all of them.
//
// T: type of dy and dx; X: type of x (the stream), dstream and dresidual. dw and db are added to; null if not
// needed.
template <class T, class X, int R, bool Params>
FG_INLINE void backward_block(const Backward& a, const float* w, float* dw, float* db, int64_t first,
                              bool streaming) {
  const int64_t n = a.n;
  const float inverse_n = n > 0 ? 1.0f / static_cast<float>(n) : 0.0f;
  const T* dy = static_cast<const T*>(a.dy) + first * a.dy_stride;
  const X* x = static_cast<const X*>(a.x) + first * a.x_stride;
  F mean[R], rstd[R];
  float c1[R] = {}, c2[R] = {};
  for (int r = 0; r < R; ++r) {
    mean[r] = set(load_scalar(a.mean + first + r));
    rstd[r] = set(load_scalar(a.rstd + first + r));
  }
  T* dx = static_cast<T*>(a.dx) + (a.dx != nullptr ? first * n : 0);
  for (int64_t segment = 0; segment < n; segment += kSegment) {
    F s1[R], s2[R];
    for (int r = 0; r < R; ++r) s1[r] = s2[r] = set(0.0f);
    for_lanes<1>(min_of(kSegment, n - segment), [&](int64_t k, int, auto lanes) FG_LAMBDA {
      const int64_t j = segment + k;
      const F weight = load(w + j, lanes);
      F dw_j, db_j;
      if constexpr (Params) {
        dw_j = load(dw + j, lanes);
        db_j = load(db + j, lanes);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const F g = load(dy + r * a.dy_stride + j, lanes);
        const F h = keep((load(x + r * a.x_stride + j, lanes) - mean[r]) * rstd[r], lanes, set(0.0f));
        const F wg = g * weight;
        s1[r] = s1[r] + wg;
        s2[r] = fma(wg, h, s2[r]);
        if constexpr (Params) {
          dw_j = fma(g, h, dw_j);
          db_j = g + db_j;
        }
      }
      if constexpr (Params) {
        store(dw + j, dw_j, lanes);
        store(db + j, db_j, lanes);
      }
    });
    for (int r = 0; r < R; ++r) {
      c1[r] += hsum(s1[r]);
      c2[r] += hsum(s2[r]);
    }
  }
  if (a.dx == nullptr) return;
  for (int r = 0; r < R; ++r) {
    const T* dy_r = dy + r * a.dy_stride;
    const X* x_r = x + r * a.x_stride;
    T* dx_r = dx + r * n;
    const int64_t at = (first + r) * n;
    const X* dstream = static_cast<const X*>(a.dstream) + (a.dstream != nullptr ? at : 0);
    X* dresidual = static_cast<X*>(a.dresidual) + (a.dresidual != nullptr ? at : 0);
    const F m1 = set(c1[r] * inverse_n), m2 = set(c2[r] * inverse_n);
    for_lanes_out<2>(dx_r, n, streaming, [&](int64_t j, int, auto lanes) FG_LAMBDA {
      const F h = (load(x_r + j, lanes) - mean[r]) * rstd[r];
      prefetch(dy_r + R * a.dy_stride + j);
      prefetch(x_r + R * a.x_stride + j);
      F d = rstd[r] * fnma(h, m2, load(dy_r + j, lanes) * load(w + j, lanes) - m1);
      if (a.dstream != nullptr) d = d + load(dstream + j, lanes);
      put(dx_r + j, d, lanes);
      if (a.dresidual != nullptr) store(dresidual + j, d, lanes);
    });
  }
}

constexpr int kBlockRows = 4;
constexpr int64_t kBlockBytes =
    256 * 1024;  // of dy and x, which the second pass reads again from the inner cache

template <class T, class X, bool Params>
void backward_rows(const Backward& a, const float* w, float* dw, float* db, int64_t begin, int64_t end) {
  const Streaming streaming(a.dx != nullptr ? a.rows * a.n * static_cast<int64_t>(sizeof(T)) : 0);
  int64_t i = begin;
  if (kBlockRows * a.n * static_cast<int64_t>(sizeof(T) + sizeof(X)) <= kBlockBytes) {
    for (; i + kBlockRows <= end; i += kBlockRows)
      backward_block<T, X, kBlockRows, Params>(a, w, dw, db, i, streaming.on);
  }
  for (; i < end; ++i) backward_block<T, X, 1, Params>(a, w, dw, db, i, streaming.on);
}

// A part's rows, its dw and db (side by side) into `sums`, which may be null.
template <class T, class X>
void backward_part(const Backward& a, const float* w, float* sums, int64_t begin, int64_t end) {
  const int64_t n = a.n;
  if (sums == nullptr) return backward_rows<T, X, false>(a, w, nullptr, nullptr, begin, end);
  std::memset(sums, 0, static_cast<uint64_t>(2 * n) * sizeof(float));
  if (end - begin <= kFlushRows) return backward_rows<T, X, true>(a, w, sums, sums + n, begin, end);
  Scratch scratch(2 * n);
  float* dw = scratch.data;
  for (int64_t i = begin; i < end; i += kFlushRows) {
    std::memset(dw, 0, static_cast<uint64_t>(2 * n) * sizeof(float));
    backward_rows<T, X, true>(a, w, dw, dw + n, i, min_of(i + kFlushRows, end));
    add_into(sums, dw, 2 * n);
  }
}

}  // namespace

// residual and stream, weight, bias: null where absent. Strides are between rows, in elements; y, stream are
// contiguous.
void layer_norm_fwd(const void* x, const void* residual, const void* weight, const void* bias, void* y,
                    void* stream, float* mean, float* rstd, int64_t rows, int64_t n, int64_t x_stride,
                    int64_t residual_stride, int x_dtype, int residual_dtype, int weight_dtype, double eps,
                    int num_threads) {
  const Parameter w(weight, weight_dtype, n, 1.0f), b(bias, weight_dtype, n, 0.0f);
  const Forward a{
      x, residual, y, stream, mean, rstd, rows, n, x_stride, residual_stride, static_cast<float>(eps)};
  parallel_chunks(rows, rows_per_chunk(rows, n), rows * n, num_threads, [&](int64_t begin, int64_t end) {
    if (residual == nullptr) {
      return with_dtype(x_dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        forward_rows<T, T, false>(a, w.data, b.data, begin, end);
      });
    }
    with_dtypes(x_dtype, residual_dtype, [&](auto type, auto residual_type) {
      using T = typename decltype(type)::type;
      using R = typename decltype(residual_type)::type;
      forward_rows<T, R, true>(a, w.data, b.data, begin, end);
    });
  });
}

// dx, dresidual, dw, db: null where not needed; dstream null where there is none.
void layer_norm_bwd(const void* dy, const void* dstream, const void* x, const void* weight, const float* mean,
                    const float* rstd, void* dx, void* dresidual, void* dw, void* db, int64_t rows, int64_t n,
                    int64_t dy_stride, int64_t x_stride, int dy_dtype, int x_dtype, int weight_dtype,
                    int num_threads) {
  const Parameter w(weight, weight_dtype, n, 1.0f);
  const bool need_params = dw != nullptr || db != nullptr;
  const Backward a{dy, dstream, x, mean, rstd, dx, dresidual, rows, n, dy_stride, x_stride};
  const Parts parts(rows);
  Scratch sums(need_params ? parts.count * 2 * n : 0);
  const int64_t step = need_params ? parts.size : rows_per_chunk(rows, n);
  parallel_chunks(rows, max_of(1, step), rows * n, num_threads, [&](int64_t begin, int64_t end) {
    float* own = need_params ? sums.data + begin / step * 2 * n : nullptr;
    with_dtypes(dy_dtype, x_dtype, [&](auto type, auto x_type) {
      backward_part<typename decltype(type)::type, typename decltype(x_type)::type>(a, w.data, own, begin,
                                                                                    end);
    });
  });
  if (!need_params) return;
  with_dtype(weight_dtype, [&](auto type) {
    using P = typename decltype(type)::type;
    reduce_parts(sums.data, parts.count, 2 * n, n, static_cast<P*>(dw), num_threads);
    reduce_parts(sums.data + n, parts.count, 2 * n, n, static_cast<P*>(db), num_threads);
  });
}

}  // namespace fg::FG_LEVEL

FG_EXPORTS(layer_norm, FG_EXPORT(layer_norm_fwd), FG_EXPORT(layer_norm_bwd))
