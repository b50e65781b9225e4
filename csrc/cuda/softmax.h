// What the kernels of softmax.cu share: the problem, the mask, and rows in pieces of 16 bytes.
#pragma once

#include "dtype.h"
#include "philox.h"
#include "reduce.h"
#include "vector.h"

namespace fg::FG_LEVEL {
namespace {

enum MaskKind : int { kNoMask = 0, kBoolMask = 1, kFloatMask = 2 };

constexpr float kInf = __builtin_huge_valf();

// Drops NaN, which comes back through the sum of exponentials: one instruction an element.
struct MaxOfNumbers {
  FG_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};

FG_DEVICE float exp_of(float x) { return exp2f(x * 1.4426950408889634f); }

// Division by 64-bit numbers takes a hundred instructions: only where 32 bits do not hold them.
FG_DEVICE bool fits32(int64_t x) { return static_cast<uint64_t>(x) >> 32 == 0; }

struct Problem {
  int64_t rows, cols, queries;  // queries = 0 without causality
  float scale;
  const int64_t* rng;  // null without dropout
  uint32_t threshold;
  float keep_scale;

  FG_DEVICE int64_t visible(int64_t row) const {
    if (queries == 0) return cols;
    const int64_t q =
        fits32(row) ? static_cast<uint32_t>(row) % static_cast<uint32_t>(queries) : row % queries;
    const int64_t n = q + 1 + cols - queries;
    return n < 0 ? 0 : n < cols ? n : cols;
  }

  FG_DEVICE float dropped(float x, bool kept) const { return kept ? x * keep_scale : 0.0f; }
};

// A mask read where it lies: row indices are split over up to four dimensions, each with its stride.
struct Mask {
  const void* data;
  int kind;
  bool fp32;               // else a float mask has x's dtype
  int64_t n1, n2, n3;      // sizes of the inner three (the outermost takes what is left)
  int64_t s0, s1, s2, s3;  // strides in elements, 0 where broadcast
  int64_t column_stride;

  FG_DEVICE int64_t offset(int64_t row) const {
    return fits32(row) ? offset_of(static_cast<uint32_t>(row)) : offset_of(static_cast<uint64_t>(row));
  }

 private:
  template <class Index>
  FG_DEVICE int64_t offset_of(Index row) const {
    const Index m1 = static_cast<Index>(n1), m2 = static_cast<Index>(n2), m3 = static_cast<Index>(n3);
    const int64_t i3 = row % m3, i2 = row / m3 % m2, i1 = row / m3 / m2 % m1, i0 = row / m3 / m2 / m1;
    return i0 * s0 + i1 * s1 + i2 * s2 + i3 * s3;
  }
};

// Rows of x that share a row of the mask: the row index split over up to four dimensions, of which `shared`
// (bit d for dimension d) are those the mask is broadcast over.
struct Sharing {
  int64_t size[4];
  int shared;

  // Number of groups (of_shared false) or of the members of each.
  inline int64_t count(bool of_shared) const {
    int64_t result = 1;
    for (int d = 0; d < 4; ++d) result *= ((shared >> d & 1) != 0) == of_shared ? size[d] : 1;
    return result;
  }

  // row = part_of_row(group, false) + part_of_row(member, true)
  FG_DEVICE int64_t part_of_row(int64_t index, bool of_shared) const {
    int64_t row = 0, step = 1;
#pragma unroll
    for (int d = 3; d >= 0; --d) {
      if (((shared >> d & 1) != 0) == of_shared && size[d] > 1) {
        int64_t quotient;
        if (fits32(index) && fits32(size[d])) {
          quotient = static_cast<uint32_t>(index) / static_cast<uint32_t>(size[d]);
        } else {
          quotient = index / size[d];
        }
        row += (index - quotient * size[d]) * step;
        index = quotient;
      }
      step *= size[d];
    }
    return row;
  }
};

// Elements that a thread holds: in a warp with a short or a longer row, and in a block.
constexpr int kFew = 8, kMany = 32, kInBlock = 16;
constexpr int kWarps = 4;  // of a block whose warps have a row each

// At most, for one row: only the plain forward kernel does with the 64 registers that 1024 threads leave
// each.
constexpr int block_threads(bool needs_registers) { return needs_registers ? 512 : 1024; }

// A row in pieces of 16 bytes of memory, so that rows of any length and place are read by whole accesses but
// for their ends. Piece c holds the columns [c * kVector - shift, (c + 1) * kVector - shift), the first ones
// maybe below 0.
//
// aligned: the tensor's pieces begin on 16 bytes; a tensor that lies otherwise than the output does not, and
// is read element by element.

// Where `at`, a row's first element in its tensor, lies within its 16 bytes, if the tensor's first is at
// args.first_at.
template <class T, class Args>
FG_DEVICE int shift_of(const Args& a, int64_t at) {
  return static_cast<int>((a.first_at + at) & (kVector<T> - 1));
}

template <class T, class Index>
FG_DEVICE bool is_whole(Index begin, Index end, bool aligned) {
  return aligned && begin >= 0 && begin + kVector<T> <= end;
}

// Whole pieces first, all of them: as many loads as there are pieces are under way before the first is used.
template <class T, int kPieces, class Index>
FG_DEVICE void fetch(const T* row, Index begin, Index step, Index end, bool aligned, uint4 (&raw)[kPieces]) {
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    const Index at = begin + k * step;
    raw[k] = uint4{0, 0, 0, 0};
    if (is_whole<T>(at, end, aligned)) raw[k] = load16(row + at);
  }
}

// The piece at `begin`, fetched if it is whole: times scale, and `fill` outside [0, end).
template <class T, class Index>
FG_DEVICE void take(const T* row, Index begin, Index end, bool aligned, const uint4& raw, float scale,
                    float fill, float (&v)[kVector<T>]) {
  if (is_whole<T>(begin, end, aligned)) {
    load_vector(reinterpret_cast<const T*>(&raw), v);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) v[i] *= scale;
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      const Index j = begin + i;
      v[i] = j >= 0 && j < end ? to_float(row[j]) * scale : fill;
    }
  }
}

template <class T, class Index>
FG_DEVICE void put(T* row, Index begin, Index end, bool aligned, const float (&v)[kVector<T>]) {
  if (is_whole<T>(begin, end, aligned)) {
    store_vector(row + begin, v);
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      const Index j = begin + i;
      if (j >= 0 && j < end) row[j] = from_float<T>(v[i]);
    }
  }
}

// Bit k * V + i says whether dropout keeps element first + k * step + i. A loop, since the code of one Philox
// is long enough; the seed is read on the device, so that a CUDA graph sees a new one.
template <int kPieces, int V>
FG_DEVICE uint32_t kept_bits(const Problem& a, int64_t first, int64_t step) {
  const uint64_t seed = static_cast<uint64_t>(a.rng[0]);
  const uint64_t from = static_cast<uint64_t>(a.rng[1]) + static_cast<uint64_t>(first);
  uint32_t kept = 0;
#pragma unroll 2
  for (int b = 0; b < kPieces * V; ++b)
    kept |= static_cast<uint32_t>(philox(seed, from + b / V * step + b % V) >= a.threshold) << b;
  return kept;
}

}  // namespace
}  // namespace fg::FG_LEVEL
