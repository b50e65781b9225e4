// Work in fixed parts: how rows are split depends on the shape alone, never on the number of threads, so that
// every sum has one order and results are bitwise the same for any thread count.
#pragma once

#include <omp.h>

#include <cstdint>
#include <cstdlib>

namespace fg {

// Whether this process was forked after the module was loaded (bind/cpu.cpp). libgomp believes that the
// threads of the parent are still there and waits for them for ever, so that a child computes with one: the
// results are the same.
extern bool in_forked_child;

}  // namespace fg

namespace fg::FG_LEVEL {

// Below this many elements a second thread costs more (a few microseconds) than it saves.
constexpr int64_t kParallelElements = 32 * 1024;

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Up to this many elements rows are split as PyTorch splits them, one stretch for each thread: from op to op
// they stay in that core's cache. Above, they come from memory anyway, and whichever thread is free takes the
// next.
constexpr int64_t kCachedElements = 1024 * 1024;

// body(begin, end, thread) over [0, count) in chunks of `chunk`; thread < max(1, num_threads), whatever
// parallel region this is called from.
template <class Body>
inline void parallel_chunks_by_thread(int64_t count, int64_t chunk, int64_t elements, int num_threads,
                                      const Body& body) {
  const int64_t chunks = ceil_div(count, chunk);
  const bool alone = elements < kParallelElements || in_forked_child;
  const int threads = alone ? 1 : static_cast<int>(min_of(chunks, num_threads));
  if (threads <= 1) {  // no OpenMP region: entering one costs more than a small tensor
    for (int64_t c = 0; c < chunks; ++c) body(c * chunk, min_of((c + 1) * chunk, count), 0);
    return;
  }
  if (elements <= kCachedElements) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < chunks; ++c)
      body(c * chunk, min_of((c + 1) * chunk, count), omp_get_thread_num());
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t c = 0; c < chunks; ++c) body(c * chunk, min_of((c + 1) * chunk, count), omp_get_thread_num());
}

// body(begin, end), the same way.
template <class Body>
inline void parallel_chunks(int64_t count, int64_t chunk, int64_t elements, int num_threads,
                            const Body& body) {
  parallel_chunks_by_thread(count, chunk, elements, num_threads,
                            [&](int64_t begin, int64_t end, int) { body(begin, end); });
}

// Rows per chunk, where no sum depends on it: some 16 chunks a thread to balance them, of at least 4K and at
// most 64K elements to hide the hand-out. Fewer and larger ones leave a thread the rows that it has asked for
// ahead: also of the widest rows a few stay together.
inline int64_t rows_per_chunk(int64_t rows, int64_t cols, int num_threads) {
  const int64_t chunks = 16 * max_of(1, num_threads), share = rows * cols / chunks;
  const int64_t together = min_of(8, rows / chunks);
  return max_of(max_of(1, together), min_of(64 * 1024, max_of(4 * 1024, share)) / max_of(1, cols));
}

// Fixed parts for sums over rows: at least 32 rows each, at most 64 parts.
struct Parts {
  int64_t rows, count, size;
  explicit Parts(int64_t rows) : rows(rows), count(min_of(64, ceil_div(rows, 32))), size(0) {
    if (count > 0) {
      size = ceil_div(rows, count);
      count = ceil_div(rows, size);
    }
  }
};

// Rows added into one accumulator before it is flushed into the part's own: two levels keep long sums
// accurate.
constexpr int64_t kFlushRows = 16;

// fp32 scratch memory, aligned to a cache line; small sizes live on the stack.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    const uint64_t bytes = (static_cast<uint64_t>(floats) * 4 + 127) & ~uint64_t{63};
    if (bytes <= sizeof(local_)) {
      data = local_;
      return;
    }
    heap_ = std::malloc(bytes + 64);
    if (heap_ == nullptr) __builtin_trap();
    data = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(heap_) + 63) & ~uintptr_t{63});
  }
  ~Scratch() { std::free(heap_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* data = nullptr;

 private:
  void* heap_ = nullptr;
  alignas(64) float local_[4096];
};

}  // namespace fg::FG_LEVEL
