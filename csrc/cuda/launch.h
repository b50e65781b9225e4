// Launching kernels: on the caller's device and stream, every return code checked. Nothing here allocates or
// synchronises, so that every launch can be captured in a CUDA graph.
//
// An exported function (export.h) takes `void* stream, int device` last and begins with `const Stream
// on(stream, device);`. Errors are exceptions; the binding turns them into Python's, with the op's name
// before them.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../common/export.h"
#include "platform.h"

namespace fg::FG_LEVEL {
namespace {

constexpr int kMaxThreads = 1024;  // of a block
constexpr int64_t kMaxGrid =
    (int64_t{1} << 31) - 1;  // of a grid in x; in y and z it is 65535: they are not used

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The whole warps that `threads` threads need, within a block's limit.
inline int whole_warps(int64_t threads) {
  return static_cast<int>(std::min<int64_t>(kMaxThreads, std::max<int64_t>(1, ceil_div(threads, 32)) * 32));
}

template <class T>
struct Same {
  using type = T;
};

#ifndef FG_HOST_EMULATION

[[maybe_unused]] inline void check(cudaError_t code, const char* call) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // an error that is not sticky is not kept for the next call
  throw std::runtime_error("CUDA error " + std::to_string(static_cast<int>(code)) + " " +
                           cudaGetErrorString(code) + " (" + call + ")");
}

#endif

// Makes the device the current one for its lifetime.
class Stream {
 public:
#ifdef FG_HOST_EMULATION
  Stream(void*, int) {}
#else
  Stream(void* stream, int device) : stream_(static_cast<cudaStream_t>(stream)) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device) {
      check(cudaSetDevice(device), "cudaSetDevice");
      changed_ = true;
    }
  }
  ~Stream() {
    if (changed_) cudaSetDevice(previous_);  // it was current a moment ago; a destructor cannot throw
  }
#endif
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  // Runs kernel(args...) in `grid` blocks of `block` threads; nothing if the grid is empty.
  template <class... P>
  void launch(void (*kernel)(P...), int64_t grid, int block, size_t shared_bytes,
              typename Same<P>::type... args) const {
    if (grid == 0) return;
    if (grid < 0 || grid > kMaxGrid)
      throw std::runtime_error("a grid of " + std::to_string(grid) + " blocks, the limit is 2^31 - 1");
#ifdef FG_HOST_EMULATION
    if (block < 1 || block > kMaxThreads)
      throw std::runtime_error("CUDA error 9 invalid configuration argument (cudaLaunchKernel)");
    auto body = [&] { kernel(args...); };
    emulation::run_grid(
        grid, block, shared_bytes, [](void* f) { (*static_cast<decltype(body)*>(f))(); }, &body);
#else
    const void* function = reinterpret_cast<const void*>(kernel);
    if (shared_bytes > 48 * 1024)
      check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes)),
            "cudaFuncSetAttribute");
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
    check(cudaLaunchKernel(function, dim3(static_cast<unsigned>(grid)), dim3(static_cast<unsigned>(block)),
                           pointers, shared_bytes, stream_),
          "cudaLaunchKernel");
#endif
  }

#ifndef FG_HOST_EMULATION
 private:
  cudaStream_t stream_;
  int previous_ = 0;
  bool changed_ = false;
#endif
};

}  // namespace
}  // namespace fg::FG_LEVEL
