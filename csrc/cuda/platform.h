// What differs between nvcc and a host compiler, and nothing else.
//
// The same .cu sources compile twice: by nvcc for GPUs, and with -DFG_HOST_EMULATION by any C++17 compiler,
// where emulate.h runs every thread of a block as a fiber. So the whole proof of the kernels, tails, masks
// and reductions included, runs on a machine without a GPU.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef FG_HOST_EMULATION

#include <cmath>
#include <cstring>

#include "emulate.h"

#define FG_DEVICE inline __attribute__((always_inline))

namespace fg::FG_LEVEL {

FG_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

FG_DEVICE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

FG_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

// 1 / x: on a GPU 1 ulp for 2^-126 <= |x| <= 2^126, 0 beyond.
FG_DEVICE float reciprocal(float x) { return 1.0f / x; }

}  // namespace fg::FG_LEVEL

#else  // nvcc

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define FG_DEVICE __device__ __forceinline__

namespace fg::FG_LEVEL {

FG_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
FG_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
FG_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }
FG_DEVICE float reciprocal(float x) { return __fdividef(1.0f, x); }

// Dynamic shared memory, whose size is an argument of `launch`.
template <class T>
FG_DEVICE T* shared_memory() {
  extern __shared__ __align__(16) unsigned char fg_shared_memory[];
  return reinterpret_cast<T*>(fg_shared_memory);
}

}  // namespace fg::FG_LEVEL

#endif
