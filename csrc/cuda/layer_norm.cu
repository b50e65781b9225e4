// LayerNorm over the last dimension, and its gradient.
//
//   y = (s - mean) * rstd * w + b,  s = x + residual rounded to the residual's type
//   dx = rstd * (w dy - c1 - xhat * c2) + dstream,  c1 = mean(w dy), c2 = mean(w dy * xhat), xhat = (s -
//   mean) * rstd dw = sum_rows dy * xhat,  db = sum_rows dy
//
// A row belongs to a group of threads, a warp or a block, and stays in its registers for all passes; rows too
// long for that are read again for every pass (by then they are in the cache). Statistics are two-pass with a
// correction: sum(s - mean) repairs what rounding did to the mean, so that data with a large mean is safe
// (Chan, Golub, LeVeque 1983, eq. 1.7).

#include "columns.h"

namespace fg::FG_LEVEL {
namespace {

constexpr int kWarpColumns = 1024;    // forward: rows up to here belong to a warp
constexpr int kBlockColumns = 16384;  // and up to here stay in a block's registers
constexpr int kWarpColumnsBwd = 512;  // backward, which also holds dw and db
constexpr int kBlockColumnsBwd = 8192;
constexpr int kPerThread = 16;  // elements of a row in each thread of a block
constexpr int kWarpsFwd = 4, kWarpsBwd = 8;
constexpr int kThreadsBwd = kBlockColumnsBwd / kPerThread;

// A pass over a thread's part of a row: body(k, j) for its k-th vector, which starts at column j. K: vectors
// in each thread, some of which may lie past the end; 0: as many as there are, one after the other, k = 0.
template <int K, int N, class Group, class Body>
FG_DEVICE void each_vector(const Group& group, int64_t n, const Body& body) {
  if constexpr (K > 0) {
#pragma unroll
    for (int k = 0; k < K; ++k) body(k, static_cast<int64_t>(k * group.size() + group.rank()) * N);
  } else {
    for (int64_t j = group.rank() * N; j < n; j += group.size() * N) body(0, j);
  }
}

// Parameters [n] of type T or float; `fill` where there are none.
template <class T, int N>
FG_DEVICE void load_parameter(const void* p, bool is_float, int64_t j, int64_t left, float (&v)[N],
                              float fill) {
  if (p == nullptr) {
#pragma unroll
    for (int e = 0; e < N; ++e) v[e] = fill;
  } else if (is_float) {
    load(static_cast<const float*>(p) + j, left, is_aligned(p), v);
  } else {
    load(static_cast<const T*>(p) + j, left, is_aligned(p), v);
  }
}

struct Forward {
  const void *x, *residual, *weight, *bias;
  void *y, *stream;
  float *mean, *rstd;
  int64_t rows, n, x_stride, residual_stride;
  float eps;
  bool float_parameters;
};

template <class T, class R, class Group, int K>
__global__ void __launch_bounds__(Group::kIsBlock ? kMaxThreads : kWarpsFwd * kWarpSize)
    forward_kernel(Forward a) {
  constexpr int N = kVector<T>;
  Group group;
  const int64_t i = Group::kIsBlock ? static_cast<int64_t>(blockIdx.x)
                                    : static_cast<int64_t>(blockIdx.x) * kWarpsFwd + threadIdx.x / kWarpSize;
  if (i >= a.rows) return;
  const int64_t n = a.n;
  const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
  const R* residual = static_cast<const R*>(a.residual) + (a.residual != nullptr ? i * a.residual_stride : 0);
  R* stream = static_cast<R*>(a.stream) + (a.residual != nullptr ? i * n : 0);
  T* y = static_cast<T*>(a.y) + i * n;
  const float inverse_n = n > 0 ? 1.0f / static_cast<float>(n) : 0.0f;
  float row[K > 0 ? K : 1][N];
  const auto read_again = [&](int64_t j, float fill, float (&s)[N]) {
    if (a.residual != nullptr) {
      load(stream + j, n - j, is_aligned(stream), s, fill);
    } else {
      load(x + j, n - j, is_aligned(x), s, fill);
    }
  };

  float sum = 0.0f;
  each_vector<K, N>(group, n, [&](int k, int64_t j) {
    float (&s)[N] = row[k];
    load(x + j, n - j, is_aligned(x), s);
    if (a.residual != nullptr) {
      float r[N];
      load(residual + j, n - j, is_aligned(residual), r);
#pragma unroll
      for (int e = 0; e < N; ++e) s[e] += r[e];
      store(stream + j, n - j, is_aligned(stream), s);
#pragma unroll
      for (int e = 0; e < N; ++e) s[e] = rounded_to<R>(s[e]);  // y is of the rounded stream
    }
#pragma unroll
    for (int e = 0; e < N; ++e) sum += s[e];
  });
  const float mean = group.reduce(sum, 0.0f, Add()) * inverse_n;

  TwoSums d_sums{0.0f, 0.0f};
  each_vector<K, N>(group, n, [&](int k, int64_t j) {
    if constexpr (K == 0) read_again(j, mean, row[0]);
    const int left = static_cast<int>(n - j < N ? n - j : N);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const float d = e < left ? row[k][e] - mean : 0.0f;
      d_sums.a += d;
      d_sums.b = fmaf(d, d, d_sums.b);
    }
  });
  d_sums = group.reduce(d_sums, TwoSums{0.0f, 0.0f}, AddTwo());
  const float shift =
      d_sums.a * inverse_n;  // the mean is mean + shift: apart, as (x - mean) is exact for x near it
  const float variance = (d_sums.b - d_sums.a * shift) * inverse_n;
  const float rstd = 1.0f / sqrtf((variance > 0.0f ? variance : variance * 0.0f) + a.eps);
  if (group.rank() == 0) {
    a.mean[i] = mean + shift;
    a.rstd[i] = rstd;
  }

  const float offset = shift * rstd;
  each_vector<K, N>(group, n, [&](int k, int64_t j) {
    if constexpr (K == 0) read_again(j, mean, row[0]);
    float w[N], b[N];
    load_parameter<T>(a.weight, a.float_parameters, j, n - j, w, 1.0f);
    load_parameter<T>(a.bias, a.float_parameters, j, n - j, b, 0.0f);
#pragma unroll
    for (int e = 0; e < N; ++e) b[e] = fmaf((row[k][e] - mean) * rstd - offset, w[e], b[e]);
    store(y + j, n - j, is_aligned(y), b);
  });
}

struct Backward {
  const void *dy, *dstream, *x, *weight;
  const float *mean, *rstd;
  void *dx, *dresidual;
  float* partials;  // [parts, 2 n], dw and db side by side; null if neither is needed
  int64_t rows, n, dy_stride, x_stride, parts;
  bool float_parameters;
};

// T: type of dy and dx; X: type of x (the stream), dstream and dresidual.
template <class T, class X>
struct BackwardRow {
  static constexpr int N = kVector<T>;
  const Backward& a;
  const T* dy;
  const X* x;
  float mean, rstd;

  FG_DEVICE BackwardRow(const Backward& a, int64_t i)
      : a(a),
        dy(static_cast<const T*>(a.dy) + i * a.dy_stride),
        x(static_cast<const X*>(a.x) + i * a.x_stride),
        mean(a.mean[i]),
        rstd(a.rstd[i]) {}

  // dy and xhat of columns [j, j + N): 0 past the end.
  FG_DEVICE void read(int64_t j, float (&g)[N], float (&h)[N]) const {
    load(dy + j, a.n - j, is_aligned(dy), g);
    load(x + j, a.n - j, is_aligned(x), h, mean);
#pragma unroll
    for (int e = 0; e < N; ++e) h[e] = (h[e] - mean) * rstd;
  }

  FG_DEVICE void write(int64_t i, int64_t j, const float (&wdy)[N], const float (&h)[N], float c1,
                       float c2) const {
    const int64_t n = a.n;
    float d[N];
#pragma unroll
    for (int e = 0; e < N; ++e) d[e] = rstd * fmaf(-h[e], c2, wdy[e] - c1);
    if (a.dstream != nullptr) {
      const X* dstream = static_cast<const X*>(a.dstream) + i * n;
      float s[N];
      load(dstream + j, n - j, is_aligned(dstream), s);
#pragma unroll
      for (int e = 0; e < N; ++e) d[e] += s[e];
    }
    T* dx = static_cast<T*>(a.dx) + i * n;
    store(dx + j, n - j, is_aligned(dx), d);
    if (a.dresidual == nullptr) return;
    X* dresidual = static_cast<X*>(a.dresidual) + i * n;
    store(dresidual + j, n - j, is_aligned(dresidual), d);
  }
};

// Rows in registers: dx, and with partials the sums of dw and db over the rows of the block.
template <class T, class X, class Group, int K>
__global__ void __launch_bounds__(Group::kIsBlock ? kThreadsBwd : kWarpsBwd * kWarpSize,
                                  1)  // without the 1 ptxas spills to fit one more block
    backward_kernel(Backward a) {
  constexpr int N = kVector<T>;
  Group group;
  const int64_t n = a.n;
  const int64_t groups = Group::kIsBlock ? 1 : kWarpsBwd;
  const int warp = Group::kIsBlock ? 0 : static_cast<int>(threadIdx.x) / kWarpSize;
  const float inverse_n = n > 0 ? 1.0f / static_cast<float>(n) : 0.0f;
  float dw[K][N] = {}, db[K][N] = {};
  for (int64_t i = blockIdx.x * groups + warp; i < a.rows; i += gridDim.x * groups) {
    const BackwardRow<T, X> row(a, i);
    float h[K][N], wdy[K][N];
    TwoSums c{0.0f, 0.0f};
    each_vector<K, N>(group, n, [&](int k, int64_t j) {
      float w[N];
      row.read(j, wdy[k], h[k]);
      load_parameter<T>(a.weight, a.float_parameters, j, n - j, w, 1.0f);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        dw[k][e] = fmaf(wdy[k][e], h[k][e], dw[k][e]);
        db[k][e] += wdy[k][e];
        wdy[k][e] *= w[e];
        c.a += wdy[k][e];
        c.b = fmaf(wdy[k][e], h[k][e], c.b);
      }
    });
    if (a.dx == nullptr) continue;
    c = group.reduce(c, TwoSums{0.0f, 0.0f}, AddTwo());
    each_vector<K, N>(group, n, [&](int k, int64_t j) {
      if (j < n) row.write(i, j, wdy[k], h[k], c.a * inverse_n, c.b * inverse_n);
    });
  }
  if (a.partials == nullptr) return;
  float* out = a.partials + blockIdx.x * 2 * n;
  if constexpr (Group::kIsBlock) {
    each_vector<K, N>(group, n, [&](int k, int64_t j) {
      store(out + j, n - j, is_aligned(out), dw[k]);
      store(out + n + j, n - j, is_aligned(out + n), db[k]);
    });
  } else {  // the warps' sums one after the other
    __shared__ float sums[2][kWarpColumnsBwd];
    for (int turn = 0; turn < kWarpsBwd; ++turn) {
      if (turn == warp) {
        each_vector<K, N>(group, n, [&](int k, int64_t j) {
#pragma unroll
          for (int e = 0; e < N; ++e) {
            sums[0][j + e] = (turn > 0 ? sums[0][j + e] : 0.0f) + dw[k][e];
            sums[1][j + e] = (turn > 0 ? sums[1][j + e] : 0.0f) + db[k][e];
          }
        });
      }
      __syncthreads();
    }
    for (int64_t j = threadIdx.x; j < n; j += kWarpsBwd * kWarpSize) {
      out[j] = sums[0][j];
      out[n + j] = sums[1][j];
    }
  }
}

// Long rows: dx alone, reading twice.
template <class T, class X>
__global__ void __launch_bounds__(kThreadsBwd) backward_long_kernel(Backward a) {
  constexpr int N = kVector<T>;
  Block group;
  const int64_t i = blockIdx.x, n = a.n;
  const BackwardRow<T, X> row(a, i);
  const float inverse_n = 1.0f / static_cast<float>(n);
  float wdy[N], h[N], w[N];
  const auto read = [&](int64_t j) {
    row.read(j, wdy, h);
    load_parameter<T>(a.weight, a.float_parameters, j, n - j, w, 1.0f);
#pragma unroll
    for (int e = 0; e < N; ++e) wdy[e] *= w[e];
  };
  TwoSums c{0.0f, 0.0f};
  each_vector<0, N>(group, n, [&](int, int64_t j) {
    read(j);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      c.a += wdy[e];
      c.b = fmaf(wdy[e], h[e], c.b);
    }
  });
  c = group.reduce(c, TwoSums{0.0f, 0.0f}, AddTwo());
  each_vector<0, N>(group, n, [&](int, int64_t j) {
    read(j);
    row.write(i, j, wdy, h, c.a * inverse_n, c.b * inverse_n);
  });
}

// Long rows: the sums of dw and db.
template <class T, class X>
__global__ void __launch_bounds__(kColumnWarps* kWarpSize) parameters_kernel(Backward a) {
  constexpr int N = kVector<T>;
  sum_columns<2, N>(a.rows, a.n, a.parts, a.partials, [&](int64_t i, int64_t j, int64_t, float (&acc)[2][N]) {
    float g[N], h[N];
    BackwardRow<T, X>(a, i).read(j, g, h);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      acc[0][e] = fmaf(g[e], h[e], acc[0][e]);
      acc[1][e] += g[e];
    }
  });
}

template <class T, class R>
void forward(const Stream& on, const Forward& a) {
  constexpr int N = kVector<T>;
  if (a.n <= kWarpColumns) {
    constexpr int K = kWarpColumns / (kWarpSize * N);
    on.launch(forward_kernel<T, R, Warp, K>, ceil_div(a.rows, kWarpsFwd), kWarpsFwd * kWarpSize, 0, a);
  } else if (a.n <= kBlockColumns) {
    const int threads = whole_warps(ceil_div(a.n, kPerThread));
    on.launch(forward_kernel<T, R, Block, kPerThread / N>, a.rows, threads, 0, a);
  } else {
    on.launch(forward_kernel<T, R, Block, 0>, a.rows, kMaxThreads, 0, a);
  }
}

template <class T, class X>
void backward(const Stream& on, const Backward& a) {
  constexpr int N = kVector<T>;
  const bool need_sums = a.partials != nullptr;
  if (a.n <= kWarpColumnsBwd) {
    constexpr int K = kWarpColumnsBwd / (kWarpSize * N);
    const int64_t grid = need_sums ? a.parts : ceil_div(a.rows, kWarpsBwd);
    on.launch(backward_kernel<T, X, Warp, K>, grid, kWarpsBwd * kWarpSize, 0, a);
  } else if (a.n <= kBlockColumnsBwd) {
    const int threads = whole_warps(ceil_div(a.n, kPerThread));
    on.launch(backward_kernel<T, X, Block, kPerThread / N>, need_sums ? a.parts : a.rows, threads, 0, a);
  } else {
    if (a.dx != nullptr) on.launch(backward_long_kernel<T, X>, a.rows, kThreadsBwd, 0, a);
    if (need_sums)
      on.launch(parameters_kernel<T, X>, ceil_div(a.n, kWarpSize * N) * a.parts, kColumnWarps * kWarpSize, 0,
                a);
  }
}

template <class Body>
void with_dtypes(int t, int x, const Body& body) {  // the wider type is t itself or fp32
  with_dtype(t, [&](auto type) {
    if (x == F32) {
      body(type, Type<float>{});
    } else {
      body(type, type);
    }
  });
}

}  // namespace

// residual and stream, weight, bias: null where absent. Strides are between rows, in elements; y, stream are
// contiguous.
void layer_norm_fwd(const void* x, const void* residual, const void* weight, const void* bias, void* y,
                    void* residual_stream, float* mean, float* rstd, int64_t rows, int64_t n,
                    int64_t x_stride, int64_t residual_stride, int x_dtype, int residual_dtype,
                    int weight_dtype, double eps, void* stream, int device) {
  const Stream on(stream, device);
  const Forward a{x,
                  residual,
                  weight,
                  bias,
                  y,
                  residual_stream,
                  mean,
                  rstd,
                  rows,
                  n,
                  x_stride,
                  residual_stride,
                  static_cast<float>(eps),
                  weight_dtype == F32};
  with_dtypes(x_dtype, residual == nullptr ? x_dtype : residual_dtype, [&](auto type, auto residual_type) {
    forward<typename decltype(type)::type, typename decltype(residual_type)::type>(on, a);
  });
}

// dx, dresidual, dw, db: null where not needed; dstream null where there is none. partials: fp32 [parts, 2
// n], null where neither dw nor db is needed.
void layer_norm_bwd(const void* dy, const void* dstream, const void* x, const void* weight, const float* mean,
                    const float* rstd, void* dx, void* dresidual, void* dw, void* db, float* partials,
                    int64_t rows, int64_t n, int64_t dy_stride, int64_t x_stride, int64_t parts, int dy_dtype,
                    int x_dtype, int weight_dtype, void* stream, int device) {
  const Stream on(stream, device);
  const Backward a{dy,   dstream,   x,         weight,   mean,
                   rstd, dx,        dresidual, partials, rows,
                   n,    dy_stride, x_stride,  parts,    weight_dtype == F32};
  with_dtypes(dy_dtype, x_dtype, [&](auto type, auto x_type) {
    backward<typename decltype(type)::type, typename decltype(x_type)::type>(on, a);
  });
  if (partials == nullptr) return;
  with_dtype(weight_dtype, [&](auto type) {
    sum_parts<typename decltype(type)::type>(on, partials, parts, 2 * n, n, dw, db);
  });
}

}  // namespace fg::FG_LEVEL

FG_EXPORTS(layer_norm, FG_EXPORT(layer_norm_fwd), FG_EXPORT(layer_norm_bwd))
