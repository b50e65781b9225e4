// What both directions of softmax share: the problem, and rows that end in zeros.
#pragma once

#include "parallel.h"
#include "philox.h"
#include "stream.h"

namespace fg::FG_LEVEL {
namespace {

// Rows from this width on are read twice, without scratch: exponentials, as wide in fp32, would not fit in
// the core's second cache beside x, y and the next row.
constexpr int64_t kWide = 16 * 1024;

struct Problem {
  int64_t rows, cols, queries;  // queries = 0 without causality
  float scale;
  bool dropping;
  Dropout dropout;

  // Of an output, whether exponentials or the gradient. Rows that end in zeros are streamed only if they
  // begin with a cache line: then the one line in which values end is stored plainly, and no line in both
  // ways. Where scratch is in the order of vectors taken Twice, so must be the output.
  template <class T>
  int64_t streamed(const T* y, bool gradient) const {
    const bool any_place = queries == 0 && (gradient || wide());
    if (any_place) return y != nullptr ? rows * cols * static_cast<int64_t>(sizeof(T)) : 0;
    return queries == 0 || in_lines(y, cols) ? streamed_bytes(y, rows, cols) : 0;
  }

  bool wide() const { return cols >= kWide; }

  int64_t visible(int64_t row) const {
    if (queries == 0) return cols;
    return min_of(cols, max_of(0, row % queries + 1 + cols - queries));
  }
};

template <class T>
void fill_zero(T* y, int64_t begin, int64_t end, bool streaming = false) {
  if (begin >= end) return;
  const int64_t bytes = (end - begin) * static_cast<int64_t>(sizeof(T));
  if (streaming) return stream_zeros(y + begin, bytes);
  std::memset(static_cast<void*>(y + begin), 0, static_cast<uint64_t>(bytes));
}

Problem problem(int64_t rows, int64_t cols, int64_t queries, double scale, int64_t threshold,
                double keep_scale, const void* rng) {
  Problem a{rows, cols, queries, static_cast<float>(scale), rng != nullptr, {}};
  if (rng != nullptr) {
    uint64_t seed_offset[2];
    std::memcpy(seed_offset, rng, sizeof(seed_offset));
    a.dropout = {seed_offset[0], seed_offset[1], static_cast<uint32_t>(threshold),
                 static_cast<float>(keep_scale)};
  }
  return a;
}

}  // namespace
}  // namespace fg::FG_LEVEL
