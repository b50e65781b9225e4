// Sums over rows: per fixed part in fp32, then over the parts in order.
#pragma once

#include "parallel.h"
#include "vec.h"

namespace fg::FG_LEVEL {

inline void add_into(float* to, const float* from, int64_t n) {
  for_lanes<1>(n, [&](int64_t j, int, auto lanes)
                      FG_LAMBDA { store(to + j, load(to + j, lanes) + load(from + j, lanes), lanes); });
}

// out[j] = sum over parts of sums[part * stride + j], rounded once; out may be null. Two: whether the sums
// are in the order of vectors taken Twice.
template <bool Two = false, class T>
void reduce_parts(const float* sums, int64_t parts, int64_t stride, int64_t n, T* out, int num_threads) {
  if (out == nullptr) return;
  parallel_chunks(n, 1024, parts * n, num_threads, [&](int64_t begin, int64_t end) {
    for_lanes<1, Two>(end - begin, [&](int64_t k, int, auto lanes) FG_LAMBDA {
      const auto part = [&](int64_t p)
                            FG_LAMBDA { return load_scratch(sums + p * stride + begin + k, lanes); };
      // Pairwise: equal rows, as .sum() sends them, all err to the same side.
      decltype(part(0)) level[7];  // at most 64 parts
      for (int64_t p = 0; p < parts; ++p) {
        auto total = part(p);
        int d = 0;
        for (int64_t full = p; full & 1; full >>= 1) total = level[d++] + total;
        level[d] = total;
      }
      auto total = each([](F) FG_LAMBDA { return set(0.0f); }, part(0));
      for (int d = 0; d < 7; ++d) {
        if (parts >> d & 1) total = total + level[d];
      }
      store(out + begin + k, total, lanes);
    });
  });
}

}  // namespace fg::FG_LEVEL
