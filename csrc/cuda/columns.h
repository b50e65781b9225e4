// Sums over rows (gradients of weights and biases) in two stages of fixed order: no atomics, and the same
// bits every time. First each part of the rows gives one row of fp32 partial sums, then the parts are added.
#pragma once

#include "launch.h"
#include "reduce.h"
#include "vector.h"

namespace fg::FG_LEVEL {

constexpr int kColumnWarps = 8;  // of a block in the first stage: each takes every eighth row of the part

// First stage, one block: the sums of M values for 32 * N columns over one part of the rows, to partials
// [parts, M n]. body(row, j, left, acc): adds row's values for columns [j, j + N), of which `left` exist, to
// acc[M][N].
template <int M, int N, class Body>
FG_DEVICE void sum_columns(int64_t rows, int64_t n, int64_t parts, float* partials, const Body& body) {
  constexpr int kTile = kWarpSize * N;
  __shared__ float sums[kColumnWarps][kTile];
  const int64_t tiles = gridDim.x / parts, part = blockIdx.x / tiles;
  const int64_t first_column = (blockIdx.x - part * tiles) * kTile;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize,
            warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t size = (rows + parts - 1) / parts, begin = part * size;
  const int64_t end = begin + size < rows ? begin + size : rows;
  const int64_t j = first_column + lane * N;
  float acc[M][N] = {};
  for (int64_t i = begin + warp; i < end; i += kColumnWarps) body(i, j, n - j, acc);
  for (int m = 0; m < M; ++m) {
    __syncthreads();
#pragma unroll
    for (int e = 0; e < N; ++e) {
      float value = acc[0][e];
      if constexpr (M > 1) value = m == 0 ? acc[0][e] : acc[1][e];
      sums[warp][lane * N + e] = value;
    }
    __syncthreads();
    for (int c = static_cast<int>(threadIdx.x); c < kTile; c += kColumnWarps * kWarpSize) {
      if (first_column + c >= n) break;
      float sum = 0.0f;
      for (int w = 0; w < kColumnWarps; ++w) sum += sums[w][c];
      partials[(part * M + m) * n + first_column + c] = sum;
    }
  }
}

namespace {

constexpr int kSumWarps = 16;

// Second stage: partials [parts, columns] to first [n] and, where columns is 2 n, second [n]; null where not
// needed.
template <class P>
__global__ void __launch_bounds__(kSumWarps* kWarpSize)
    sum_parts_kernel(const float* partials, int64_t parts, int64_t columns, int64_t n, P* first, P* second) {
  __shared__ float sums[kSumWarps][kWarpSize];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize,
            warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kWarpSize + lane;
  float sum = 0.0f;
  if (j < columns) {
#pragma unroll 4
    for (int64_t p = warp; p < parts; p += kSumWarps) sum += partials[p * columns + j];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || j >= columns) return;
  sum = 0.0f;
  for (int w = 0; w < kSumWarps; ++w) sum += sums[w][lane];
  P* out = j < n ? first : second;
  if (out != nullptr) out[j < n ? j : j - n] = from_float<P>(sum);
}

template <class P>
void sum_parts(const Stream& on, const float* partials, int64_t parts, int64_t columns, int64_t n,
               void* first, void* second) {
  on.launch(sum_parts_kernel<P>, ceil_div(columns, kWarpSize), kSumWarps * kWarpSize, 0, partials, parts,
            columns, n, static_cast<P*>(first), static_cast<P*>(second));
}

}  // namespace
}  // namespace fg::FG_LEVEL
