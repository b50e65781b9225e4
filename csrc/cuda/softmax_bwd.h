// Gradient of softmax's input: ds = p * (g - sum p g), g = dy * keep / (1 - dropout), dx = scale * ds.
#pragma once

#include "softmax.h"

namespace fg::FG_LEVEL {
namespace {

struct Backward {
  Problem problem;
  const void *dy, *p;
  void* dx;      // may be null
  float* sums;   // per row sum p g and sum ds, for dmask; may be null
  int first_at;  // p's
  bool dy_aligned, dx_aligned;
};

// p and g = dy * keep / (1 - dropout) of a group's next pieces, 0 outside the row, and the sum of their
// products.
template <bool kDropping, class T, int kPieces, class Index>
FG_DEVICE float load_gradients(const Backward& a, int64_t row_at, Index begin, Index step, Index n,
                               float (&p)[kPieces][kVector<T>], float (&g)[kPieces][kVector<T>]) {
  constexpr int V = kVector<T>;
  const T *p_row = static_cast<const T*>(a.p) + row_at, *dy_row = static_cast<const T*>(a.dy) + row_at;
  uint4 p_raw[kPieces], dy_raw[kPieces];
  fetch(p_row, begin, step, n, true, p_raw);
  fetch(dy_row, begin, step, n, a.dy_aligned, dy_raw);
  const uint32_t kept = kDropping ? kept_bits<kPieces, V>(a.problem, row_at + begin, step) : 0;
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    const Index at = begin + k * step;
    take(p_row, at, n, true, p_raw[k], 1.0f, 0.0f, p[k]);
    take(dy_row, at, n, a.dy_aligned, dy_raw[k], 1.0f, 0.0f, g[k]);
    float part = 0.0f;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (kDropping) g[k][i] = a.problem.dropped(g[k][i], kept >> (k * V + i) & 1);
      part += p[k][i] * g[k][i];
    }
    sum += part;
  }
  return sum;
}

// dx of a group's next pieces; returns the sum of ds.
template <class T, int kPieces, class Index>
FG_DEVICE float write_gradients(const Backward& a, int64_t row_at, Index begin, Index step, float inner,
                                float (&p)[kPieces][kVector<T>], const float (&g)[kPieces][kVector<T>]) {
  constexpr int V = kVector<T>;
  const Index cols = static_cast<Index>(a.problem.cols);
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    const Index at = begin + k * step;
    if (at >= cols) continue;
    float part = 0.0f;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float ds = p[k][i] * (g[k][i] - inner);
      part += ds;
      p[k][i] = ds * a.problem.scale;
    }
    sum += part;
    if (a.dx != nullptr) put(static_cast<T*>(a.dx) + row_at, at, cols, a.dx_aligned, p[k]);
  }
  return sum;
}

template <class Group>
FG_DEVICE void write_sums(const Backward& a, Group& group, int64_t row, float inner, float own_ds) {
  if (a.sums == nullptr) return;
  const float ds = group.reduce(own_ds, 0.0f, Add());
  if (group.rank() != 0) return;
  a.sums[2 * row] = inner;
  a.sums[2 * row + 1] = ds;
}

template <class Group, bool kDropping, class T, int kPieces>
__global__ void __launch_bounds__(Group::kIsBlock ? block_threads(true) : kWarps * kWarpSize,
                                  Group::kIsBlock ? 1 : 4) softmax_bwd_kernel(const Backward a) {
  constexpr int V = kVector<T>;
  Group group;
  const int64_t cols = a.problem.cols, groups = blockDim.x / group.size();
  const int step = group.size() * V;
  for (int64_t row = blockIdx.x * groups + threadIdx.x / group.size(); row < a.problem.rows;
       row += gridDim.x * groups) {
    const int64_t at = row * cols;
    const int begin = group.rank() * V - shift_of<T>(a, at), n = static_cast<int>(a.problem.visible(row));
    float p[kPieces][V], g[kPieces][V];
    const float own = load_gradients<kDropping, T>(a, at, begin, step, n, p, g);
    const float inner = group.reduce(own, 0.0f, Add());
    write_sums(a, group, row, inner, write_gradients<T>(a, at, begin, step, inner, p, g));
  }
}

// For rows that no block holds: read twice.
template <bool kDropping, class T, int kPieces>
__global__ void __launch_bounds__(block_threads(true), 1) softmax_bwd_twice_kernel(const Backward a) {
  constexpr int V = kVector<T>;
  Block group;
  const int64_t cols = a.problem.cols, step = group.size() * V, tile = step * kPieces;
  for (int64_t row = blockIdx.x; row < a.problem.rows; row += gridDim.x) {
    const int64_t at = row * cols, n = a.problem.visible(row), first = group.rank() * V - shift_of<T>(a, at);
    float p[kPieces][V], g[kPieces][V], inner = 0.0f, ds = 0.0f;
    for (int64_t begin = first; begin < n; begin += tile)
      inner += load_gradients<kDropping, T>(a, at, begin, step, n, p, g);
    inner = group.reduce(inner, 0.0f, Add());
    for (int64_t begin = first; begin < cols; begin += tile) {
      load_gradients<kDropping, T>(a, at, begin, step, n, p, g);
      ds += write_gradients<T>(a, at, begin, step, inner, p, g);
    }
    write_sums(a, group, row, inner, ds);
  }
}

}  // namespace
}  // namespace fg::FG_LEVEL
