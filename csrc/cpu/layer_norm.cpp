// LayerNorm over the last dimension, and its gradient.
//
//   y = (s - mean) * rstd * w + b,  s = x + residual rounded to the residual's type
//   dx = rstd * (w dy - c1 - xhat * c2) + dstream,  c1 = mean(w dy), c2 = mean(w dy * xhat)
//   dw = sum_rows dy * xhat,  db = sum_rows dy,  xhat = (s - mean) * rstd

#include "export.h"
#include "norm_rows.h"

namespace fg::FG_LEVEL {

// residual and stream, weight, bias: null where absent. Strides are between rows, in elements; y, stream are
// contiguous.
void layer_norm_fwd(const void* x, const void* residual, const void* weight, const void* bias, void* y,
                    void* stream, float* mean, float* rstd, int64_t rows, int64_t n, int64_t x_stride,
                    int64_t residual_stride, int x_dtype, int residual_dtype, int weight_dtype, double eps,
                    int num_threads) {
  const bool two = takes_twice(x_dtype);
  const Parameter w(weight, weight_dtype, n, 1.0f, two), b(bias, weight_dtype, n, 0.0f, two);
  const Forward a{x,
                  residual,
                  w.data,
                  b.data,
                  y,
                  stream,
                  mean,
                  rstd,
                  rows,
                  n,
                  x_stride,
                  residual_stride,
                  static_cast<float>(eps)};
  norm_forward<true>(a, x_dtype, residual_dtype, num_threads);
}

// dx, dresidual, dw, db: null where not needed; dstream null where there is none.
void layer_norm_bwd(const void* dy, const void* dstream, const void* x, const void* weight, const float* mean,
                    const float* rstd, void* dx, void* dresidual, void* dw, void* db, int64_t rows, int64_t n,
                    int64_t dy_stride, int64_t x_stride, int dy_dtype, int x_dtype, int weight_dtype,
                    int num_threads) {
  const bool two = takes_twice(dy_dtype);
  const Parameter w(weight, weight_dtype, n, 1.0f, two);
  const Backward a{dy, dstream, x, w.data, mean, rstd, dx, dresidual, rows, n, dy_stride, x_stride};
  norm_backward<true>(a, dw, db, dy_dtype, x_dtype, weight_dtype, num_threads);
}

}  // namespace fg::FG_LEVEL

FG_EXPORTS(layer_norm, FG_EXPORT(layer_norm_fwd), FG_EXPORT(layer_norm_bwd))
