// Softmax over the last dimension of [.., Tq, Tk]: scale, mask, causal, dropout; and its gradient.
//
//   s = scale * x + mask,  p = exp(s - max s) / sum exp(s - max s),  y = p * keep / (1 - dropout)
//   ds = p * (g - sum p g),  g = dy * keep / (1 - dropout),  dx = scale * ds,  dmask = sum of ds where the
//   mask is shared (softmax_mask.h)
//
// A short row belongs to a warp, a longer one to a block, which hold it in registers: it is read once. What
// does not fit is read twice, the first time for an online maximum and sum (Milakov and Gimelshein, "Online
// normalizer calculation for softmax", 2018). Columns that causality hides are neither read nor anything but
// zero; x under a False in a boolean mask is replaced, never added to.

#include "launch.h"
#include "softmax.h"
#include "softmax_bwd.h"
#include "softmax_mask.h"

namespace fg::FG_LEVEL {
namespace {

struct Forward {
  Problem problem;
  Mask mask;
  const void* x;
  void *y, *p;                // p, the probabilities before dropout, is null without dropout
  int first_at;               // y's first element within its 16 bytes
  bool x_aligned, p_aligned;  // lie in their 16 bytes as y does
};

// Bit k * kVector + i says whether the element s[k][i] is in [0, n) and not under a False.
template <class T, int kPieces, class Index>
FG_DEVICE uint32_t seen_bits(const Mask& mask, int64_t mask_at, Index begin, Index step, Index n) {
  constexpr int V = kVector<T>;
  const bool boolean = mask.kind == kBoolMask;
  uint32_t seen = 0;
#pragma unroll 1
  for (int k = 0; k < kPieces; ++k) {
    const Index at = begin + k * step;
    const uint8_t* m = static_cast<const uint8_t*>(mask.data) + mask_at + at * mask.column_stride;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const bool inside = at + i >= 0 && at + i < n;
      if (inside && (!boolean || m[i * mask.column_stride] != 0)) seen |= 1u << (k * V + i);
    }
  }
  return seen;
}

template <class M, int kPieces, int V, class Index>
FG_DEVICE void add_mask(const M* mask, int64_t column_stride, Index begin, Index step, uint32_t seen,
                        float (&s)[kPieces][V]) {
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    const M* m = mask + (begin + k * step) * column_stride;
#pragma unroll
    for (int i = 0; i < V; ++i)
      if ((seen >> (k * V + i) & 1) != 0) s[k][i] += to_float(m[i * column_stride]);
  }
}

// Scores of a group's next pieces and their maximum; -inf where nothing is seen.
template <bool kMasked, class T, int kPieces, class Index>
FG_DEVICE float load_scores(const Forward& a, const T* x, int64_t mask_at, Index begin, Index step, Index n,
                            float (&s)[kPieces][kVector<T>], uint32_t& seen) {
  constexpr int V = kVector<T>;
  static_assert(kPieces * V <= 32);
  uint4 raw[kPieces];
  fetch(x, begin, step, n, a.x_aligned, raw);
  seen = kMasked ? seen_bits<T, kPieces>(a.mask, mask_at, begin, step, n) : 0;
#pragma unroll
  for (int k = 0; k < kPieces; ++k)
    take(x, begin + k * step, n, a.x_aligned, raw[k], a.problem.scale, -kInf, s[k]);
  if (kMasked && a.mask.kind == kFloatMask) {
    if (a.mask.fp32) {
      add_mask(static_cast<const float*>(a.mask.data) + mask_at, a.mask.column_stride, begin, step, seen, s);
    } else {
      add_mask(static_cast<const T*>(a.mask.data) + mask_at, a.mask.column_stride, begin, step, seen, s);
    }
  }
  float top = -kInf;
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (kMasked && (seen >> (k * V + i) & 1) == 0) s[k][i] = -kInf;
      top = fmaxf(top, s[k][i]);
    }
  }
  return top;
}

// s becomes exp(s - top); returns the sum of what is seen.
template <bool kMasked, int kPieces, int V>
FG_DEVICE float exponentials(float (&s)[kPieces][V], float top, uint32_t seen) {
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    float part = 0.0f;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      s[k][i] = exp_of(s[k][i] - top);
      if (!kMasked || (seen >> (k * V + i) & 1) != 0) part += s[k][i];
    }
    sum += part;
  }
  return sum;
}

// y (and p) of a group's next pieces from their exponentials. -inf everywhere leaves NaN in e: only the
// visible elements show it.
template <bool kMasked, class T, int kPieces, class Index>
FG_DEVICE void write(const Forward& a, int64_t row_at, Index begin, Index step, Index n,
                     float (&e)[kPieces][kVector<T>], uint32_t seen, float inverse) {
  constexpr int V = kVector<T>;
  const Index cols = static_cast<Index>(a.problem.cols);
  T* y = static_cast<T*>(a.y) + row_at;
  const bool dropping = kMasked && a.p != nullptr;
  const uint32_t kept = dropping ? kept_bits<kPieces, V>(a.problem, row_at + begin, step) : 0;
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    const Index at = begin + k * step;
    if (at >= cols) continue;
    const bool all_seen = !kMasked && at >= 0 && at + V <= n;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const Index j = at + i;
      const bool visible = kMasked ? (seen >> (k * V + i) & 1) != 0 : all_seen || (j >= 0 && j < n);
      e[k][i] = visible ? e[k][i] * inverse : 0.0f;
    }
    if (dropping) {
      put(static_cast<T*>(a.p) + row_at, at, cols, a.p_aligned, e[k]);
#pragma unroll
      for (int i = 0; i < V; ++i) e[k][i] = a.problem.dropped(e[k][i], kept >> (k * V + i) & 1);
    }
    put(y, at, cols, true, e[k]);
  }
}

// The group holds its row: kPieces pieces a thread. kMasked: with a mask or dropout.
template <class Group, bool kMasked, class T, int kPieces>
__global__ void __launch_bounds__(Group::kIsBlock ? block_threads(kMasked) : kWarps * kWarpSize,
                                  Group::kIsBlock ? 1 : 4) softmax_fwd_kernel(const Forward a) {
  constexpr int V = kVector<T>;
  Group group;
  const int64_t cols = a.problem.cols, groups = blockDim.x / group.size();
  const int step = group.size() * V;
  for (int64_t row = blockIdx.x * groups + threadIdx.x / group.size(); row < a.problem.rows;
       row += gridDim.x * groups) {
    const int64_t at = row * cols;
    const int begin = group.rank() * V - shift_of<T>(a, at), n = static_cast<int>(a.problem.visible(row));
    float s[kPieces][V];
    uint32_t seen;
    const float own = load_scores<kMasked>(a, static_cast<const T*>(a.x) + at,
                                           kMasked ? a.mask.offset(row) : 0, begin, step, n, s, seen);
    const float top = group.reduce(own, -kInf, MaxOfNumbers());
    const float sum = group.reduce(exponentials<kMasked>(s, top, seen), 0.0f, Add());
    write<kMasked, T>(a, at, begin, step, n, s, seen, 1.0f / sum);
  }
}

// A block reads its row twice, a tile of all its threads' pieces at a time.
template <bool kMasked, class T, int kPieces>
__global__ void __launch_bounds__(block_threads(true), 1) softmax_fwd_online_kernel(const Forward a) {
  constexpr int V = kVector<T>;
  Block group;
  const int64_t cols = a.problem.cols, step = group.size() * V, tile = step * kPieces;
  for (int64_t row = blockIdx.x; row < a.problem.rows; row += gridDim.x) {
    const int64_t at = row * cols, n = a.problem.visible(row);
    const int64_t mask_at = kMasked ? a.mask.offset(row) : 0, first = group.rank() * V - shift_of<T>(a, at);
    const T* x = static_cast<const T*>(a.x) + at;
    float s[kPieces][V], highest = -kInf, sum = 0.0f;
    uint32_t seen;
    for (int64_t begin = first; begin < n; begin += tile) {
      const float higher = load_scores<kMasked>(a, x, mask_at, begin, step, n, s, seen);
      if (higher > highest) {
        sum *= exp_of(highest - higher);
        highest = higher;
      }
      // With -inf alone so far nothing is added, rather than NaN: greater ones may follow.
      sum += exponentials<kMasked>(s, highest == -kInf ? 0.0f : highest, seen);
    }
    const float top = group.reduce(highest, -kInf, MaxOfNumbers());
    if (highest != top) sum *= exp_of(highest - top);
    sum = group.reduce(sum, 0.0f, Add());
    for (int64_t begin = first; begin < cols; begin += tile) {
      load_scores<kMasked>(a, x, mask_at, begin, step, n, s, seen);
      exponentials<kMasked>(s, top, seen);
      write<kMasked, T>(a, at, begin, step, n, s, seen, 1.0f / sum);
    }
  }
}

enum class Form { kShort, kWarp, kBlock, kTwice };

struct Plan {
  Form form;
  int64_t grid;
  int block;
};

// How rows of at most `pieces` pieces are held: a function of their width and dtype (and of where they
// begin).
template <class T>
Plan plan(int64_t rows, int64_t pieces, int max_threads) {
  const int64_t warp_grid = std::min(ceil_div(rows, kWarps), kMaxGrid), block_grid = std::min(rows, kMaxGrid);
  if (pieces <= kFew / kVector<T> * kWarpSize) return {Form::kShort, warp_grid, kWarps * kWarpSize};
  if (pieces <= kMany / kVector<T> * kWarpSize) return {Form::kWarp, warp_grid, kWarps * kWarpSize};
  constexpr int kPieces = kInBlock / kVector<T>;
  if (pieces <= kPieces * max_threads)
    return {Form::kBlock, block_grid, whole_warps(ceil_div(pieces, kPieces))};
  return {Form::kTwice, block_grid, max_threads};
}

template <class T>
int place_in_piece(const void* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(T));
}

// The pieces that a row of `cols` columns touches at most.
template <class T>
int64_t pieces_of(int64_t cols, int first_at) {
  const bool all_begin_whole = first_at == 0 && cols % kVector<T> == 0;
  return ceil_div(all_begin_whole ? cols : cols + kVector<T> - 1, kVector<T>);
}

template <bool kMasked, class T>
void launch_fwd(const Stream& on, const Forward& a) {
  constexpr int V = kVector<T>;
  const Plan how = plan<T>(a.problem.rows, pieces_of<T>(a.problem.cols, a.first_at), block_threads(kMasked));
  switch (how.form) {
    case Form::kShort:
      return on.launch(softmax_fwd_kernel<Warp, kMasked, T, kFew / V>, how.grid, how.block, 0, a);
    case Form::kWarp:
      return on.launch(softmax_fwd_kernel<Warp, kMasked, T, kMany / V>, how.grid, how.block, 0, a);
    case Form::kBlock:
      return on.launch(softmax_fwd_kernel<Block, kMasked, T, kInBlock / V>, how.grid, how.block, 0, a);
    case Form::kTwice:
      return on.launch(softmax_fwd_online_kernel < kMasked, T, kMasked ? kInBlock / V : 4 >, how.grid,
                       how.block, 0, a);
  }
}

template <bool kDropping, class T>
void launch_bwd(const Stream& on, const Backward& a) {
  constexpr int V = kVector<T>;
  const Plan how = plan<T>(a.problem.rows, pieces_of<T>(a.problem.cols, a.first_at), block_threads(true));
  switch (how.form) {
    case Form::kShort:
      return on.launch(softmax_bwd_kernel<Warp, kDropping, T, kFew / V>, how.grid, how.block, 0, a);
    case Form::kWarp:
      return on.launch(softmax_bwd_kernel<Warp, kDropping, T, kMany / V>, how.grid, how.block, 0, a);
    case Form::kBlock:
      return on.launch(softmax_bwd_kernel<Block, kDropping, T, kInBlock / V>, how.grid, how.block, 0, a);
    case Form::kTwice:
      return on.launch(softmax_bwd_twice_kernel<kDropping, T, kInBlock / V>, how.grid, how.block, 0, a);
  }
}

Problem problem(int64_t rows, int64_t cols, int64_t queries, double scale, const void* rng, int64_t threshold,
                double keep_scale) {
  return {rows,
          cols,
          queries,
          static_cast<float>(scale),
          static_cast<const int64_t*>(rng),
          static_cast<uint32_t>(threshold),
          static_cast<float>(keep_scale)};
}

}  // namespace

// x, y, p: [rows, cols] contiguous. p and rng (seed, offset; in the device's memory): null without dropout.
// queries: Tq if causal, else 0. mask: null, boolean (mask_kind 1) or of mask_dtype (2); its row is found by
// Mask, its columns column_stride apart.
void softmax_fwd(const void* x, void* y, void* p, int64_t rows, int64_t cols, int64_t queries, int dtype,
                 double scale, const void* mask, int mask_kind, int mask_dtype, int64_t n1, int64_t n2,
                 int64_t n3, int64_t s0, int64_t s1, int64_t s2, int64_t s3, int64_t column_stride,
                 const void* rng, int64_t threshold, double keep_scale, void* stream, int device) {
  const Stream on(stream, device);
  const Problem a = problem(rows, cols, queries, scale, rng, threshold, keep_scale);
  const Mask m{mask, mask_kind, mask_dtype == F32, n1, n2, n3, s0, s1, s2, s3, column_stride};
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int at = place_in_piece<T>(y);
    const Forward forward{a, m, x, y, p, at, place_in_piece<T>(x) == at, place_in_piece<T>(p) == at};
    if (mask_kind != kNoMask || p != nullptr) {
      launch_fwd<true, T>(on, forward);
    } else {
      launch_fwd<false, T>(on, forward);
    }
  });
}

// dx: null if not needed. sums: fp32 [rows, 2] for softmax_bwd_mask, or null.
void softmax_bwd(const void* dy, const void* p, void* dx, void* sums, int64_t rows, int64_t cols,
                 int64_t queries, int dtype, double scale, const void* rng, int64_t threshold,
                 double keep_scale, void* stream, int device) {
  const Stream on(stream, device);
  const Problem a = problem(rows, cols, queries, scale, rng, threshold, keep_scale);
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int at = place_in_piece<T>(p);
    const Backward backward{a,
                            dy,
                            p,
                            dx,
                            static_cast<float*>(sums),
                            at,
                            place_in_piece<T>(dy) == at,
                            place_in_piece<T>(dx) == at};
    if (rng != nullptr) {
      launch_bwd<true, T>(on, backward);
    } else {
      launch_bwd<false, T>(on, backward);
    }
  });
}

// After softmax_bwd with the same arguments and its sums. dmask: [mask rows, mask_cols] contiguous, mask_cols
// 1 or cols; n0 … n3 and `shared` say which rows share a row of the mask (see Sharing). parts:
// softmax_mask_parts'; partial: fp32 [mask rows, parts, mask_cols], null for one part.
void softmax_bwd_mask(const void* dy, const void* p, const void* sums, void* dmask, void* partial,
                      int64_t parts, int64_t rows, int64_t cols, int64_t queries, int dtype, int mask_dtype,
                      int64_t mask_cols, int64_t n0, int64_t n1, int64_t n2, int64_t n3, int shared,
                      const void* rng, int64_t threshold, double keep_scale, void* stream, int device) {
  const Stream on(stream, device);
  const Problem a = problem(rows, cols, queries, 1.0, rng, threshold, keep_scale);
  const Sharing sharing{{n0, n1, n2, n3}, shared};
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch_mask_gradient<T>(on, MaskGradient{a, sharing, dy, p, static_cast<const float*>(sums), dmask,
                                             static_cast<float*>(partial), mask_dtype == F32, mask_cols,
                                             sharing.count(false), sharing.count(true), parts});
  });
}

}  // namespace fg::FG_LEVEL

FG_EXPORTS(softmax, FG_EXPORT(softmax_fwd), FG_EXPORT(softmax_bwd), FG_EXPORT(softmax_bwd_mask))
