// GELU of x + bias, and its gradient: gelu(z) = z * cdf(z), by the error function or its tanh approximation
// (Hendrycks and Gimpel, arXiv:1606.08415). z = x + bias is not rounded to the input's type.
//
// The maths are those of csrc/cpu/math.h: the smaller of cdf and 1 - cdf, `tail`, is found directly and never
// as 1 minus something, by half the instructions that erff or tanhf take (in 16 bits the kernel would not
// keep up with the memory otherwise). z is limited where tail is 0 in fp32, so that huge z stay finite; -inf
// gives NaN as in PyTorch
// (-inf * 0), and NaN passes.

#include "columns.h"

namespace fg::FG_LEVEL {

enum Approximate : int { kErf = 0, kTanh = 1 };

namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 2;  // loads under way in each thread

struct Tail {
  float a;     // min(|z|, limit)
  float e;     // the exponential that pdf is made of
  float tail;  // cdf(-a)
};

// Phi(-a) = exp(-a^2 / 2) R(a), R = erfcx(a / sqrt 2) / 2 as a polynomial in t = 1 / (1 + 0.42 a) (the form
// of Abramowitz and Stegun 7.1.26; coefficients: Lawson-weighted least squares). Relative error 1.7e-7 near
// 0, growing to 3e-5 where the tail is below 1e-6.
FG_DEVICE Tail tail_erf(float z) {
  const float a = fminf(fabsf(z), 15.0f);
  const float e = exp2f(a * a * -0.721347520f);
  const float t = reciprocal(fmaf(a, 0.42f, 1.0f));
  float r = fmaf(0.061168015f, t, -0.247368753f);
  r = fmaf(r, t, 0.277666241f);
  r = fmaf(r, t, 0.0578326918f);
  r = fmaf(r, t, 0.184951439f);
  r = fmaf(r, t, 0.165672347f);
  r = fmaf(r, t, 7.83085343e-05f);
  return {a, e, e * r};
}

// sigmoid(-2u) = e / (1 + e), e = exp(-2u), 2u = sqrt(8 / pi) (a + 0.044715 a^3).
FG_DEVICE Tail tail_tanh(float z) {
  const float a = fminf(fabsf(z), 12.0f);
  const float e = exp2f(-a * fmaf(a * a, 0.102943240f, 2.30220820f));
  return {a, e, e * reciprocal(e + 1.0f)};
}

template <int A>
FG_DEVICE float gelu(float z) {
  const Tail g = A == kErf ? tail_erf(z) : tail_tanh(z);
  return z > 0.0f ? fmaf(-g.a, g.tail, z) : z * g.tail;
}

template <int A>
FG_DEVICE float gelu_slope(float z) {
  const Tail g = A == kErf ? tail_erf(z) : tail_tanh(z);
  const float cdf = z < 0.0f ? g.tail : 1.0f - g.tail;
  if constexpr (A == kErf) return fmaf(z, g.e * 0.398942280f, cdf);
  // The sigmoid's derivative is tail (1 - tail) 2u'.
  const float du = fmaf(g.a * g.a, 0.214064449f, 1.59576912f);
  return fmaf(z, fmaf(-g.tail, g.tail, g.tail) * du, cdf);
}

struct Place {
  int64_t row, j;  // of a vector of N elements
};

// Rows are cut into `per_row` vectors each, so that a vector's bias is adjacent; division is dear in 64 bits.
template <int N>
FG_DEVICE Place place_of(int64_t vector, int64_t total, int64_t per_row) {
  const int64_t row = total < (int64_t{1} << 32)
                          ? static_cast<uint32_t>(vector) / static_cast<uint32_t>(per_row)
                          : vector / per_row;
  return {row, (vector - row * per_row) * N};
}

// y = gelu(x + bias), or with dy: y = dy * gelu'(x + bias). bias [n] or null.
template <class T, int A, bool IsGradient>
__global__ void __launch_bounds__(kThreads)
    pointwise_kernel(const T* dy, const T* x, const T* bias, T* y, int64_t rows, int64_t n, int64_t per_row) {
  constexpr int N = kVector<T>;
  const int64_t total = rows * per_row;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kVectors) + threadIdx.x;
  const bool whole = rows == 1 || n % N == 0;  // every row starts on 16 bytes if the tensor does
  float z[kVectors][N], g[kVectors][N];
#pragma unroll
  for (int u = 0; u < kVectors; ++u) {
    const int64_t vector = first + u * kThreads;
    if (vector >= total) break;
    const Place at = place_of<N>(vector, total, per_row);
    load(x + at.row * n + at.j, n - at.j, whole && is_aligned(x), z[u]);
    if constexpr (IsGradient) load(dy + at.row * n + at.j, n - at.j, whole && is_aligned(dy), g[u]);
  }
#pragma unroll
  for (int u = 0; u < kVectors; ++u) {
    const int64_t vector = first + u * kThreads;
    if (vector >= total) break;
    const Place at = place_of<N>(vector, total, per_row);
    if (bias != nullptr) {
      float b[N];
      load(bias + at.j, n - at.j, is_aligned(bias), b);
#pragma unroll
      for (int e = 0; e < N; ++e) z[u][e] += b[e];
    }
#pragma unroll
    for (int e = 0; e < N; ++e) z[u][e] = IsGradient ? g[u][e] * gelu_slope<A>(z[u][e]) : gelu<A>(z[u][e]);
    store(y + at.row * n + at.j, n - at.j, whole && is_aligned(y), z[u]);
  }
}

// dx (or null) and the partial sums of dbias.
template <class T, int A>
__global__ void __launch_bounds__(kColumnWarps* kWarpSize)
    columns_kernel(const T* dy, const T* x, const T* bias, T* dx, float* partials, int64_t rows, int64_t n,
                   int64_t parts) {
  constexpr int N = kVector<T>;
  const bool whole = n % N == 0;
  sum_columns<1, N>(rows, n, parts, partials, [&](int64_t i, int64_t j, int64_t left, float (&acc)[1][N]) {
    float z[N], g[N], b[N];
    load(x + i * n + j, left, whole && is_aligned(x), z);
    load(dy + i * n + j, left, whole && is_aligned(dy), g);
    load(bias + j, left, is_aligned(bias), b);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      g[e] *= gelu_slope<A>(z[e] + b[e]);
      acc[0][e] += g[e];
    }
    if (dx != nullptr) store(dx + i * n + j, left, whole && is_aligned(dx), g);
  });
}

template <class Body>
void with_kind(int dtype, int approximate, const Body& body) {
  with_dtype(dtype, [&](auto type) {
    if (approximate == kErf) {
      body(type, Constant<kErf>{});
    } else {
      body(type, Constant<kTanh>{});
    }
  });
}

template <class T, int A, bool IsGradient>
void pointwise(const Stream& on, const void* dy, const void* x, const void* bias, void* y, int64_t rows,
               int64_t n) {
  if (bias == nullptr) n *= rows, rows = 1;  // rows mean nothing
  const int64_t per_row = ceil_div(n, kVector<T>);
  on.launch(pointwise_kernel<T, A, IsGradient>, ceil_div(rows * per_row, kThreads * kVectors), kThreads, 0,
            static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<const T*>(bias),
            static_cast<T*>(y), rows, n, per_row);
}

}  // namespace

// x [rows, n] contiguous; bias [n] or null.
void gelu_fwd(const void* x, const void* bias, void* y, int64_t rows, int64_t n, int dtype, int approximate,
              void* stream, int device) {
  const Stream on(stream, device);
  with_kind(dtype, approximate, [&](auto type, auto kind) {
    pointwise<typename decltype(type)::type, decltype(kind)::value, false>(on, nullptr, x, bias, y, rows, n);
  });
}

// dx, dbias: null where not needed; bias null where there is none. partials: fp32 [parts, n], used for dbias.
void gelu_bwd(const void* dy, const void* x, const void* bias, void* dx, void* dbias, float* partials,
              int64_t rows, int64_t n, int64_t parts, int dtype, int approximate, void* stream, int device) {
  const Stream on(stream, device);
  with_kind(dtype, approximate, [&](auto type, auto kind) {
    using T = typename decltype(type)::type;
    constexpr int A = decltype(kind)::value;
    if (dbias == nullptr) {
      if (dx != nullptr) pointwise<T, A, true>(on, dy, x, bias, dx, rows, n);
      return;
    }
    on.launch(columns_kernel<T, A>, ceil_div(n, kWarpSize * kVector<T>) * parts, kColumnWarps * kWarpSize, 0,
              static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<const T*>(bias),
              static_cast<T*>(dx), partials, rows, n, parts);
    sum_parts<T>(on, partials, parts, n, n, dbias, nullptr);
  });
}

}  // namespace fg::FG_LEVEL

FG_EXPORTS(gelu, FG_EXPORT(gelu_fwd), FG_EXPORT(gelu_bwd))
