// y = x W^T for a handful of rows of x (decoding): each row of W is streamed once, from memory, past all rows
// of x, which stay in the caches as fp32. Sums of fp32 products in fp32, in an order that depends on nothing
// but the width (and the level): a row's results are the same bits whatever rows are beside it.
#pragma once

#include "parallel.h"
#include "vec.h"

namespace fg::FG_LEVEL {

// x as fp32 in the order in which weights of type T are read.
template <class T, class X>
FG_INLINE void spread(const X* x, float* to, int64_t k) {
  for_lanes<1, kTwice<T>>(
      k, [&](int64_t j, int, auto lanes) FG_LAMBDA { store_scratch(to + j, load(x + j, lanes), lanes); });
}

// Bytes between what is read of a single row of W and what is asked for; of several, the next ones are asked
// for.
constexpr int64_t kAskAhead = 2048;

// sums[r * J + i] = sum over j of x[r][j] w[i][j], for R rows of x and J of W.
template <int R, int J, class T>
FG_INLINE void dot_rows(const float* x, int64_t ldx, const T* w, int64_t ldw, int64_t k, float* sums) {
  // One accumulator for each sum, though a chain waits 4 cycles: there are several rows of W, and a sum has
  // one order wherever it stands.
  F acc[R * J];
#pragma GCC unroll 32
  for (int i = 0; i < R * J; ++i) acc[i] = set(0.0f);
  for_lanes<1, kTwice<T>>(k, [&](int64_t j, int, auto lanes) FG_LAMBDA {
    decltype(load(w, lanes)) weights[J];
#pragma GCC unroll 4
    for (int i = 0; i < J; ++i) {
      const T* at = w + i * ldw + j;
      const char* ahead = reinterpret_cast<const char*>(J == 1 ? at : at + J * ldw);
      __builtin_prefetch(ahead + (J == 1 ? kAskAhead : 0), 0, J == 1 ? 3 : 2);
      weights[i] = load(at, lanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto row = load_scratch(x + r * ldx + j, lanes);
#pragma GCC unroll 4
      for (int i = 0; i < J; ++i) acc[r * J + i] = add_product(acc[r * J + i], row, weights[i]);
    }
  });
#pragma GCC unroll 32
  for (int i = 0; i < R * J; ++i) sums[i] = hsum(acc[i]);
}

// emit(r, n, sum) for `rows` rows of x and the rows [begin, end) of W. R rows of x at once, as many of W as
// there are registers for.
template <int R, class T, class Emit>
FG_INLINE void few_rows_of(const float* x, int64_t ldx, int64_t first, const T* w, int64_t ldw, int64_t k,
                           int64_t begin, int64_t end, const Emit& emit) {
  constexpr int J = R <= 4 ? 4 : kTwice<T> ? 2 : 3;
  float sums[R * J];
  int64_t n = begin;
  for (; n + J <= end; n += J) {
    dot_rows<R, J>(x + first * ldx, ldx, w + n * ldw, ldw, k, sums);
    for (int i = 0; i < J; ++i)
      for (int r = 0; r < R; ++r) emit(first + r, n + i, sums[r * J + i]);
  }
  for (; n < end; ++n) {
    dot_rows<R, 1>(x + first * ldx, ldx, w + n * ldw, ldw, k, sums);
    for (int r = 0; r < R; ++r) emit(first + r, n, sums[r]);
  }
}

// Stretches of W that stay in the second cache, while further rows of x pass over them.
constexpr int64_t kStretchBytes = 256 * 1024;

template <class T, class Emit>
FG_INLINE void few_rows(const float* x, int64_t ldx, int64_t rows, const T* w, int64_t ldw, int64_t k,
                        int64_t begin, int64_t end, const Emit& emit) {
  const int64_t row_bytes = max_of(1, k * static_cast<int64_t>(sizeof(T)));
  const int64_t stretch = rows <= 8 ? end - begin : max_of(12, kStretchBytes / row_bytes / 12 * 12);
  for (int64_t from = begin; from < end; from += stretch) {
    const int64_t to = min_of(from + stretch, end);
    int64_t r = 0;
    for (; r + 8 <= rows; r += 8) few_rows_of<8>(x, ldx, r, w, ldw, k, from, to, emit);
    if (r + 4 <= rows) few_rows_of<4>(x, ldx, r, w, ldw, k, from, to, emit), r += 4;
    if (r + 2 <= rows) few_rows_of<2>(x, ldx, r, w, ldw, k, from, to, emit), r += 2;
    if (r < rows) few_rows_of<1>(x, ldx, r, w, ldw, k, from, to, emit);
  }
}

}  // namespace fg::FG_LEVEL
