// CUDA's execution model on the host, for tests: blocks run one after the other, the threads of a block are
// fibers.
//
// A fiber runs until it comes to a shuffle or a barrier and waits there until every thread of its warp (or
// block) that has not returned has come to the same place; threads that wait in different places are an
// error, not a hang. Values are exchanged by the scheduler. 1-D grids and blocks, full warp masks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) alignas(n)
#define __shared__ \
  static thread_local  // a block's threads are fibers of one thread, and blocks do not overlap

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

extern thread_local Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace fg::emulation {

// Waits for the warp, and returns what lane `source` brought.
uint64_t exchange(uint64_t value, int source, unsigned mask, const char* file, int line);
void wait_for_block(const char* file, int line);
int lane();
[[noreturn]] void fail(const char* what, const char* file, int line);
unsigned char* dynamic_shared_memory();

// Runs call(kernel) in every thread of the grid; std::runtime_error with the reason if threads diverge at a
// barrier.
void run_grid(int64_t grid, int block, size_t shared_bytes, void (*call)(void*), void* kernel);

template <class T>
T exchange_value(T value, int source, unsigned mask, const char* file, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  word = exchange(word, source, mask, file, line);
  std::memcpy(&value, &word, sizeof value);
  return value;
}

}  // namespace fg::emulation

#define FG_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(FG_HERE) { fg::emulation::wait_for_block(file, line); }

inline void __syncwarp(unsigned mask = 0xffffffffu, FG_HERE) {
  fg::emulation::exchange(0, fg::emulation::lane(), mask, file, line);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int = 32, FG_HERE) {
  return fg::emulation::exchange_value(value, source & 31, mask, file, line);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int = 32, FG_HERE) {
  return fg::emulation::exchange_value(value, fg::emulation::lane() ^ lane_mask, mask, file, line);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int = 32, FG_HERE) {
  const int source = fg::emulation::lane() + delta;
  return fg::emulation::exchange_value(value, source < 32 ? source : fg::emulation::lane(), mask, file, line);
}

template <class T>
inline T __ldg(const T* p) {
  return *p;
}

namespace fg::FG_LEVEL {

template <class T>
inline T* shared_memory() {
  return reinterpret_cast<T*>(emulation::dynamic_shared_memory());
}

}  // namespace fg::FG_LEVEL
