// RMSNorm over the last dimension, and its gradient.
//
//   y = s * rstd * w,  s = x + residual rounded to the residual's type,  rstd = 1 / sqrt(mean(s^2) + eps)
//   dx = rstd * (w dy - xhat * c) + dstream,  c = mean(w dy * xhat),  xhat = s * rstd
//   dw = sum_rows dy * xhat
//
// Each row is read from memory once: the second of its two passes finds it in cache, in its own type, which
// is cheaper to widen again than to keep in fp32. So that memory is read while it is written, forward sums
// the squares of a row while it writes the row before, and backward asks for the next row. (Backward in
// forward's way has too many streams: slower in fp32 at every width.)

#include "export.h"
#include "norm.h"
#include "parallel.h"
#include "reduce.h"

namespace fg::FG_LEVEL {
namespace {

// How far ahead of its use memory is asked for, in elements.
template <class T>
constexpr int64_t kAhead = 1024 / sizeof(T);

struct Forward {
  const void *x, *residual;
  void *y, *stream;
  float* rstd;
  int64_t n, x_stride, residual_stride;
  float eps;
};

// The order of a row's sum is the same wherever the row stands, so its bits are, too.
template <class T, class R, bool HasResidual>
void forward_rows(const Forward& a, const float* w, int64_t begin, int64_t end) {
  const float inverse_n = a.n > 0 ? 1.0f / static_cast<float>(a.n) : 0.0f;
  const auto squared = [&](int64_t i, int64_t j, auto lanes) FG_LAMBDA {
    const T* x = static_cast<const T*>(a.x) + i * a.x_stride + j;
    F s = load(x, lanes);
    prefetch(x + kAhead<T>);
    if constexpr (HasResidual) {
      const R* residual = static_cast<const R*>(a.residual) + i * a.residual_stride + j;
      R* stream = static_cast<R*>(a.stream) + i * a.n + j;
      store(stream, s + load(residual, lanes), lanes);
      s = load(stream, lanes);  // rounded
      prefetch(residual + kAhead<R>);
    }
    return s * s;
  };
  float squares = sum_lanes(a.n, [&](int64_t j, auto lanes) FG_LAMBDA { return squared(begin, j, lanes); });
  for (int64_t i = begin; i < end; ++i) {
    const float inverse = 1.0f / __builtin_sqrtf(squares * inverse_n + a.eps);
    store_scalar(a.rstd + i, inverse);
    const R* s;
    if constexpr (HasResidual) {
      s = static_cast<const R*>(a.stream) + i * a.n;
    } else {
      s = static_cast<const R*>(a.x) + i * a.x_stride;
    }
    T* y = static_cast<T*>(a.y) + i * a.n;
    const F rstd = set(inverse);
    const auto scale = [&](int64_t j, auto lanes)
                           FG_LAMBDA { store(y + j, load(s + j, lanes) * rstd * load(w + j, lanes), lanes); };
    if (i + 1 < end) {
      squares = sum_lanes(a.n, [&](int64_t j, auto lanes) FG_LAMBDA {
        scale(j, lanes);
        return squared(i + 1, j, lanes);
      });
    } else {
      for_lanes<2>(a.n, [&](int64_t j, int, auto lanes) FG_LAMBDA { scale(j, lanes); });
    }
  }
}

struct Backward {
  const void *dy, *dstream, *x;
  const float* rstd;
  void *dx, *dresidual;
  int64_t n, dy_stride, x_stride;
};

// T: type of dy and dx; X: type of x (the stream), dstream and dresidual. dw is added to, unless null.
template <class T, class X>
void backward_rows(const Backward& a, const float* w, float* dw, int64_t begin, int64_t end) {
  const int64_t n = a.n;
  const float inverse_n = n > 0 ? 1.0f / static_cast<float>(n) : 0.0f;
  for (int64_t i = begin; i < end; ++i) {
    const T* dy = static_cast<const T*>(a.dy) + i * a.dy_stride;
    const X* x = static_cast<const X*>(a.x) + i * a.x_stride;
    const F rstd = set(load_scalar(a.rstd + i));
    const auto first_pass = [&](auto with_dw) FG_LAMBDA {
      return sum_lanes(n, [&](int64_t j, auto lanes) FG_LAMBDA {
        const F g = load(dy + j, lanes);
        const F xhat = load(x + j, lanes) * rstd;
        if constexpr (decltype(with_dw)::value) store(dw + j, fma(g, xhat, load(dw + j, lanes)), lanes);
        return keep(g * load(w + j, lanes) * xhat, lanes, set(0.0f));  // 0 * rstd may be NaN
      });
    };
    const float sum = dw != nullptr ? first_pass(Constant<true>{}) : first_pass(Constant<false>{});
    if (a.dx == nullptr) continue;
    T* dx = static_cast<T*>(a.dx) + i * n;
    const X* dstream = static_cast<const X*>(a.dstream) + (a.dstream != nullptr ? i * n : 0);
    X* dresidual = static_cast<X*>(a.dresidual) + (a.dresidual != nullptr ? i * n : 0);
    const F c = set(sum * inverse_n);
    for_lanes<2>(n, [&](int64_t j, int, auto lanes) FG_LAMBDA {
      const F xhat = load(x + j, lanes) * rstd;
      F d = rstd * fnma(xhat, c, load(dy + j, lanes) * load(w + j, lanes));
      if (a.dstream != nullptr) d = d + load(dstream + j, lanes);
      store(dx + j, d, lanes);
      if (a.dresidual != nullptr) store(dresidual + j, d, lanes);
      prefetch(dy + a.dy_stride + j);
      prefetch(x + a.x_stride + j);
    });
  }
}

// A part's rows, its dw into `sum` (null where dw is not needed).
template <class T, class X>
void backward_part(const Backward& a, const float* w, float* sum, int64_t begin, int64_t end) {
  if (sum == nullptr) return backward_rows<T, X>(a, w, nullptr, begin, end);
  const uint64_t bytes = static_cast<uint64_t>(a.n) * sizeof(float);
  std::memset(sum, 0, bytes);
  if (end - begin <= kFlushRows) return backward_rows<T, X>(a, w, sum, begin, end);
  Scratch dw(a.n);
  for (int64_t i = begin; i < end; i += kFlushRows) {
    std::memset(dw.data, 0, bytes);
    backward_rows<T, X>(a, w, dw.data, i, min_of(i + kFlushRows, end));
    add_into(sum, dw.data, a.n);
  }
}

}  // namespace

// residual and stream, weight: null where absent. Strides are between rows, in elements; y, stream are
// contiguous.
void rms_norm_fwd(const void* x, const void* residual, const void* weight, void* y, void* stream, float* rstd,
                  int64_t rows, int64_t n, int64_t x_stride, int64_t residual_stride, int x_dtype,
                  int residual_dtype, int weight_dtype, double eps, int num_threads) {
  const Parameter w(weight, weight_dtype, n, 1.0f);
  const Forward a{x, residual, y, stream, rstd, n, x_stride, residual_stride, static_cast<float>(eps)};
  parallel_chunks(rows, rows_per_chunk(rows, n), rows * n, num_threads, [&](int64_t begin, int64_t end) {
    if (residual == nullptr) {
      return with_dtype(x_dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        forward_rows<T, T, false>(a, w.data, begin, end);
      });
    }
    with_dtypes(x_dtype, residual_dtype, [&](auto type, auto residual_type) {
      using T = typename decltype(type)::type;
      using R = typename decltype(residual_type)::type;
      forward_rows<T, R, true>(a, w.data, begin, end);
    });
  });
}

// dx, dresidual, dw: null where not needed; dstream null where there is none.
void rms_norm_bwd(const void* dy, const void* dstream, const void* x, const void* weight, const float* rstd,
                  void* dx, void* dresidual, void* dw, int64_t rows, int64_t n, int64_t dy_stride,
                  int64_t x_stride, int dy_dtype, int x_dtype, int weight_dtype, int num_threads) {
  const Parameter w(weight, weight_dtype, n, 1.0f);
  const Backward a{dy, dstream, x, rstd, dx, dresidual, n, dy_stride, x_stride};
  const Parts parts(rows);
  Scratch sums(dw != nullptr ? parts.count * n : 0);
  const int64_t step = dw != nullptr ? parts.size : rows_per_chunk(rows, n);
  parallel_chunks(rows, max_of(1, step), rows * n, num_threads, [&](int64_t begin, int64_t end) {
    float* own = dw != nullptr ? sums.data + begin / step * n : nullptr;
    with_dtypes(dy_dtype, x_dtype, [&](auto type, auto x_type) {
      backward_part<typename decltype(type)::type, typename decltype(x_type)::type>(a, w.data, own, begin,
                                                                                    end);
    });
  });
  if (dw == nullptr) return;
  with_dtype(weight_dtype, [&](auto type) {
    using P = typename decltype(type)::type;
    reduce_parts(sums.data, parts.count, n, n, static_cast<P*>(dw), num_threads);
  });
}

}  // namespace fg::FG_LEVEL

FG_EXPORTS(rms_norm, FG_EXPORT(rms_norm_fwd), FG_EXPORT(rms_norm_bwd))
