// Reductions over the threads that share a row: a warp by shuffles, a block by shuffles and shared memory.
// The order is fixed, and every thread gets the same bits.
//
// A value is a float or a struct of floats (several sums at the price of one barrier; the maximum and sum of
// an online softmax); op(a, b) combines two and must give the same for op(b, a).
#pragma once

#include "platform.h"

namespace fg::FG_LEVEL {

constexpr int kWarpSize = 32;
constexpr int kMaxWarps = 32;  // of a block
constexpr unsigned kFullMask = 0xffffffffu;

struct Add {
  FG_DEVICE float operator()(float a, float b) const { return a + b; }
};

// NaN wins, as in PyTorch; fmaxf would drop it.
struct Max {
  FG_DEVICE float operator()(float a, float b) const { return a > b || a != a ? a : b; }
};

struct TwoSums {
  float a, b;
};

struct AddTwo {
  FG_DEVICE TwoSums operator()(TwoSums x, TwoSums y) const { return {x.a + y.a, x.b + y.b}; }
};

template <class T>
FG_DEVICE T shuffle_xor(T value, int lane_mask) {
  static_assert(sizeof(T) % sizeof(float) == 0);
  constexpr int kWords = sizeof(T) / sizeof(float);
  union {
    T value;
    float words[kWords];
  } bits{value};
#pragma unroll
  for (int i = 0; i < kWords; ++i) bits.words[i] = __shfl_xor_sync(kFullMask, bits.words[i], lane_mask);
  return bits.value;
}

template <class T, class Op>
FG_DEVICE T warp_reduce(T value, Op op) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value = op(value, shuffle_xor(value, mask));
  return value;
}

// The threads of a warp as one group. Several such groups, each with a row of its own, share a block.
struct Warp {
  static constexpr bool kIsBlock = false;
  FG_DEVICE int rank() const { return static_cast<int>(threadIdx.x) % kWarpSize; }
  FG_DEVICE int size() const { return kWarpSize; }

  template <class T, class Op>
  FG_DEVICE T reduce(T value, T /*identity*/, Op op) {
    return warp_reduce(value, op);
  }
};

// The threads of a block, a multiple of 32, as one group.
struct Block {
  static constexpr bool kIsBlock = true;
  int phase = 0;  // which of two buffers: one barrier a reduction is enough, as the next one uses the other
  FG_DEVICE int rank() const { return static_cast<int>(threadIdx.x); }
  FG_DEVICE int size() const { return static_cast<int>(blockDim.x); }

  template <class T, class Op>
  FG_DEVICE T reduce(T value, T identity, Op op) {
    __shared__ float buffer[2][kMaxWarps * sizeof(T) / sizeof(float)];
    T* shared = reinterpret_cast<T*>(buffer[phase]);
    phase ^= 1;
    const int lane = rank() % kWarpSize, warp = rank() / kWarpSize;
    value = warp_reduce(value, op);
    if (lane == 0) shared[warp] = value;
    __syncthreads();
    return warp_reduce(lane < size() / kWarpSize ? shared[lane] : identity, op);
  }
};

}  // namespace fg::FG_LEVEL
