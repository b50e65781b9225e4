// RMSNorm over the last dimension, and its gradient.
//
//   y = s * rstd * w,  s = x + residual rounded to the residual's type,  rstd = 1 / sqrt(mean(s^2) + eps)
//   dx = rstd * (w dy - xhat * c) + dstream,  c = mean(w dy * xhat),  xhat = s * rstd
//   dw = sum_rows dy * xhat

#include "export.h"
#include "norm_rows.h"

namespace fg::FG_LEVEL {

// residual and stream, weight: null where absent. Strides are between rows, in elements; y, stream are
// contiguous.
void rms_norm_fwd(const void* x, const void* residual, const void* weight, void* y, void* stream, float* rstd,
                  int64_t rows, int64_t n, int64_t x_stride, int64_t residual_stride, int x_dtype,
                  int residual_dtype, int weight_dtype, double eps, int num_threads) {
  const bool two = takes_twice(x_dtype);
  const Parameter w(weight, weight_dtype, n, 1.0f, two);
  const Forward a{x,
                  residual,
                  w.data,
                  nullptr,
                  y,
                  stream,
                  nullptr,
                  rstd,
                  rows,
                  n,
                  x_stride,
                  residual_stride,
                  static_cast<float>(eps)};
  norm_forward<false>(a, x_dtype, residual_dtype, num_threads);
}

// dx, dresidual, dw: null where not needed; dstream null where there is none.
void rms_norm_bwd(const void* dy, const void* dstream, const void* x, const void* weight, const float* rstd,
                  void* dx, void* dresidual, void* dw, int64_t rows, int64_t n, int64_t dy_stride,
                  int64_t x_stride, int dy_dtype, int x_dtype, int weight_dtype, int num_threads) {
  const bool two = takes_twice(dy_dtype);
  const Parameter w(weight, weight_dtype, n, 1.0f, two);
  const Backward a{dy, dstream, x, w.data, nullptr, rstd, dx, dresidual, rows, n, dy_stride, x_stride};
  norm_backward<false>(a, dw, nullptr, dy_dtype, x_dtype, weight_dtype, num_threads);
}

}  // namespace fg::FG_LEVEL

FG_EXPORTS(rms_norm, FG_EXPORT(rms_norm_fwd), FG_EXPORT(rms_norm_bwd))
