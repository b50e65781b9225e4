// Softmax over the last dimension of [.., Tq, Tk]: scale, mask, causal, dropout; and its gradient.
//
//   s = scale * x + mask,  p = exp(s - max s) / sum exp(s - max s),  y = p * keep / (1 - dropout)
//   ds = p * (g - sum p g),  g = dy * keep / (1 - dropout),  dx = scale * ds,  dmask = sum of ds where mask
//   is shared
//
// Each row is read from memory once, but the widest twice; scores and exponentials live in fp32 scratch.
// Columns that causality hides are neither read nor anything but zero; x under a False in a boolean mask is
// replaced, never added to.

#include "export.h"
#include "math.h"
#include "online.h"
#include "parallel.h"
#include "softmax_bwd.h"

namespace fg::FG_LEVEL {
namespace {

enum MaskKind : int { kNoMask = 0, kBoolMask = 1, kFloatMask = 2 };

// Where the mask's row for row i of x begins: row indices are split over up to four dimensions, each with its
// stride.
struct MaskRows {
  int64_t n1, n2, n3;      // sizes of the inner three (the outermost takes what is left)
  int64_t s0, s1, s2, s3;  // strides in elements, 0 where broadcast
  int64_t offset(int64_t i) const {
    const int64_t i3 = i % n3, i2 = i / n3 % n2, i1 = i / n3 / n2 % n1, i0 = i / n3 / n2 / n1;
    return i0 * s0 + i1 * s1 + i2 * s2 + i3 * s3;
  }
};

// max of s(j, lanes) over [0, n), stepping over NaN; -inf for none.
template <bool Two = false, class Score>
FG_INLINE float max_lanes(int64_t n, const Score& score) {
  F best[4] = {set(-kInf), set(-kInf), set(-kInf), set(-kInf)};
  for_lanes<4, Two>(n, [&](int64_t j, int u, auto lanes)
                           FG_LAMBDA { best[u] = raise(best[u], keep(score(j, lanes), lanes, set(-kInf))); });
  return hmax(vmax(vmax(best[0], best[1]), vmax(best[2], best[3])));
}

// Memory that is touched after a row's exponentials: asked for while those are computed, the one pass that
// leaves memory idle.
template <class T>
struct Ahead {
  const T* next;  // the next row of x
  const T* y;     // this row of y
};

struct Nothing {
  template <class Lanes>
  FG_INLINE void operator()(int64_t, Lanes) const {}
};

// e = exp(score - top) for `n` columns, and its sum. A NaN anywhere, or top infinite, makes the sum NaN.
// beside(j, lanes): what else is done for each vector.
template <bool Two, class X, class T, class Beside = Nothing>
FG_INLINE float exponentials(const X* x, F scale, float top, float* e, int64_t n, Ahead<T> ahead,
                             const Beside& beside = {}) {
  const F minus_top = set(-top);
  return sum_lanes<Two>(n, [&](int64_t j, auto lanes) FG_LAMBDA {
    prefetch(ahead.next + j);
    prefetch(ahead.y + j);
    beside(j, lanes);
    const auto value =
        each([&](F s) FG_LAMBDA { return exp_nonpositive(s * scale + minus_top); }, load(x + j, lanes));
    store_scratch(e + j, value, lanes);
    return keep(value, lanes, set(0.0f));
  });
}

template <class T>
void write_row(const Problem& a, const float* e, float inverse, T* y, T* p, int64_t row, int64_t n,
               bool streaming) {
  const F by = set(inverse);
  if (!a.dropping) {
    for_lanes_out<2>(y, n, streaming, [&](int64_t j, int, auto lanes) FG_LAMBDA {
      put(y + j, load(e + j, lanes) * by, lanes);
    });
  } else {
    for_lanes<1>(n, [&](int64_t j, int, auto lanes) FG_LAMBDA {
      const F probability = load(e + j, lanes) * by;
      store(p + j, probability, lanes);
      store(y + j, a.dropout.apply(probability, row * a.cols + j), lanes);
    });
  }
}

// A mask's row as the vector loops want it: in place if its columns are adjacent and need no conversion, else
// copied.
const uint8_t* mask_row(const uint8_t* mask, int64_t column_stride, uint8_t* copy, int64_t n) {
  if (column_stride == 1) return mask;
  for (int64_t j = 0; j < n; ++j) copy[j] = mask[j * column_stride];
  return copy;
}
template <class T>
const float* mask_row(const T* mask, int64_t column_stride, float* copy, int64_t n) {
  if constexpr (sizeof(T) == 4) {
    if (column_stride == 1) return mask;
  }
  if (column_stride == 1) {
    for_lanes<1>(
        n, [&](int64_t j, int, auto lanes) FG_LAMBDA { store(copy + j, load(mask + j, lanes), lanes); });
  } else {
    for (int64_t j = 0; j < n; ++j) copy[j] = load_scalar(mask + j * column_stride);
  }
  return copy;
}

// One row under a boolean mask; false if it sees nothing.
template <class T>
bool masked_row(const Problem& a, const T* x, const uint8_t* mask, float* e, int64_t n, Ahead<T> ahead,
                float& sum) {
  const F scale = set(a.scale);
  M seen = none();
  const float top = max_lanes(n, [&](int64_t j, auto lanes) FG_LAMBDA {
    const M m = load_bool(mask + j, lanes);
    const F s = select(m, load(x + j, lanes) * scale, set(-kInf));
    seen = seen | m;
    store(e + j, s, lanes);
    return s;
  });
  if (!any(seen)) return false;
  sum = exponentials<false>(e, set(1.0f), top, e, n, ahead);
  if (!(sum > 0.0f)) {  // NaN: the visible part of the row shows it, the excluded part stays zero
    for (int64_t j = 0; j < n; ++j) e[j] = mask[j] != 0 ? __builtin_nanf("") : 0.0f;
    sum = 1.0f;
  }
  return true;
}

// One row under an additive mask (fp32), which may be null.
template <class T>
float added_row(const Problem& a, const T* x, const float* mask, float* e, int64_t n, Ahead<T> ahead) {
  const F scale = set(a.scale);
  if (mask == nullptr) {
    const float top =
        max_lanes(n, [&](int64_t j, auto lanes) FG_LAMBDA { return load(x + j, lanes) * scale; });
    return exponentials<false>(x, scale, top, e, n, ahead);
  }
  const float top = max_lanes(n, [&](int64_t j, auto lanes) FG_LAMBDA {
    const F s = fma(load(x + j, lanes), scale, load(mask + j, lanes));
    store(e + j, s, lanes);
    return s;
  });
  return exponentials<false>(e, set(1.0f), top, e, n, ahead);
}

// Without mask and dropout, y in whole cache lines if streamed: a row is written in the loop that computes
// the exponentials of the next, so that memory does not wait in the one and the processor in the other.
template <class T>
void plain_rows(const Problem& a, const T* x, T* y, bool streaming, int64_t begin, int64_t end) {
  constexpr bool Two = kTwice<T>;  // e is then in the vectors' order, not in that of the columns
  constexpr int64_t kStep = Two ? 2 * W : W;
  using Whole = typename Wholes<Two>::Plain;
  Scratch even(a.cols), odd(a.cols);
  float *e = even.data, *e_before = odd.data;
  T* y_before = y;
  F by = set(0.0f);
  int64_t n_before = 0;
  for (int64_t i = begin; i <= end; ++i) {
    const int64_t n = i < end ? a.visible(i) : 0;
    const T* row = x + i * a.cols;
    T* y_row = y + i * a.cols;
    int64_t written = 0;  // of the row before
    float sum = 0.0f;
    if (n > 0) {
      const F scale = set(a.scale);
      const float top =
          max_lanes<Two>(n, [&](int64_t j, auto lanes) FG_LAMBDA { return load(row + j, lanes) * scale; });
      written = min_of(n, n_before) / kStep * kStep;
      const Ahead<T> ahead{row + a.cols, streaming ? row + a.cols : y_row};
      const auto compute = [&](auto out) FG_LAMBDA {
        return exponentials<Two>(row, scale, top, e, n, ahead, [&](int64_t j, auto lanes) FG_LAMBDA {
          if constexpr (__is_base_of(Whole, decltype(lanes))) {
            if (j < written) put(y_before + j, load_scratch(e_before + j, lanes) * by, out);
          }
        });
      };
      sum = streaming ? compute(typename Wholes<Two>::Streamed{}) : compute(Whole{});
    }
    const auto write = [&](int64_t j, int, auto lanes) FG_LAMBDA {
      put(y_before + written + j, load_scratch(e_before + written + j, lanes) * by, lanes);
    };
    for_lanes_out<2, Two>(y_before + written, n_before - written, streaming, write);
    if (i > begin) fill_zero(y_before, n_before, a.cols, streaming);
    y_before = y_row, n_before = n, by = set(1.0f / sum);
    float* const free = e_before;
    e_before = e, e = free;
  }
}

// Without mask and dropout, `wide`: nothing depends on where a vector begins. A score may be up to kSlack
// above `top`, where every level's exponential is still right.
template <class T>
void wide_rows(const Problem& a, const T* x, T* y, bool streaming, int64_t begin, int64_t end) {
  const F scale = set(a.scale);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = a.visible(i);
    const T *row = x + i * a.cols, *next = i + 1 < end ? row + a.cols : row;
    T* y_row = y + i * a.cols;
    const Sums sums = row_sums<false, kTwice<T>>(n, [&](int64_t j, auto lanes) FG_LAMBDA {
      prefetch(row + j + kAhead);
      return load(row + j, lanes) * scale;
    });
    const F minus_top = set(-sums.top), by = set(1.0f / sums.exps);
    for_lanes_out<2, kTwice<T>>(y_row, n, streaming, [&](int64_t j, int, auto lanes) FG_LAMBDA {
      __builtin_prefetch(next + j, 0, 2);
      const auto e =
          each([&](F s) FG_LAMBDA { return exp_nonpositive(s * scale + minus_top); }, load(row + j, lanes));
      put(y_row + j, e * by, lanes);
    });
    fill_zero(y_row, n, a.cols, streaming);
  }
}

template <class T, class MaskType>
void forward_rows(const Problem& a, const T* x, T* y, T* p, int kind, const MaskType* mask,
                  const MaskRows& mask_rows, int64_t column_stride, int64_t begin, int64_t end) {
  const Streaming streaming(a.streamed(y, false));
  if (kind == kNoMask && !a.dropping && a.wide()) return wide_rows(a, x, y, streaming.on, begin, end);
  if (kind == kNoMask && !a.dropping && (!streaming.on || in_lines(y, a.cols)))
    return plain_rows(a, x, y, streaming.on, begin, end);
  Scratch e(a.cols), mask_copy(kind == kNoMask ? 0 : a.cols);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = a.visible(i), at = i * a.cols;
    T *y_row = y + at, *p_row = p != nullptr ? p + at : nullptr;
    float sum = 0.0f;
    bool seen = n > 0;
    const Ahead<T> ahead{x + at + a.cols, streaming.on ? x + at + a.cols : y_row};
    if (seen) {
      if constexpr (sizeof(MaskType) == 1) {
        uint8_t* copy = reinterpret_cast<uint8_t*>(mask_copy.data);
        const uint8_t* row = mask_row(mask + mask_rows.offset(i), column_stride, copy, n);
        seen = masked_row(a, x + at, row, e.data, n, ahead, sum);
      } else {
        const float* row = nullptr;
        if (kind != kNoMask) row = mask_row(mask + mask_rows.offset(i), column_stride, mask_copy.data, n);
        sum = added_row(a, x + at, row, e.data, n, ahead);
      }
    }
    const int64_t written = seen ? n : 0;
    if (seen) write_row(a, e.data, 1.0f / sum, y_row, p_row, i, n, streaming.on);
    fill_zero(y_row, written, a.cols, streaming.on);
    if (p != nullptr) fill_zero(p_row, written, a.cols);
  }
}

}  // namespace

// x, y, p: [rows, cols] contiguous. p and rng (seed, offset): null without dropout. queries: Tq if causal,
// else 0. mask: null, boolean (mask_kind 1) or of mask_dtype (2); its row is found by MaskRows, its columns
// column_stride apart.
void softmax_fwd(const void* x, void* y, void* p, int64_t rows, int64_t cols, int64_t queries, int dtype,
                 double scale, const void* mask, int mask_kind, int mask_dtype, int64_t n1, int64_t n2,
                 int64_t n3, int64_t s0, int64_t s1, int64_t s2, int64_t s3, int64_t column_stride,
                 const void* rng, int64_t threshold, double keep_scale, int num_threads) {
  const Problem a = problem(rows, cols, queries, scale, threshold, keep_scale, rng);
  const MaskRows mask_rows{n1, n2, n3, s0, s1, s2, s3};
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto run = [&](auto* typed_mask) {
      parallel_chunks(rows, rows_per_chunk(rows, cols, num_threads), rows * cols, num_threads,
                      [&](int64_t begin, int64_t end) {
                        const T* from = static_cast<const T*>(x);
                        T *to = static_cast<T*>(y), *kept = static_cast<T*>(p);
                        forward_rows(a, from, to, kept, mask_kind, typed_mask, mask_rows, column_stride,
                                     begin, end);
                      });
    };
    if (mask_kind == kBoolMask) {
      run(static_cast<const uint8_t*>(mask));
    } else if (mask_kind == kNoMask || mask_dtype == F32) {
      run(static_cast<const float*>(mask));
    } else {
      run(static_cast<const T*>(mask));
    }
  });
}

// dmask: null if not needed, else [mask rows, mask_cols] contiguous, mask_cols 1 or cols; n0 … n3 and
// `shared` say which rows share a row of the mask (see Sharing). dx: null if not needed.
void softmax_bwd(const void* dy, const void* p, void* dx, void* dmask, int64_t rows, int64_t cols,
                 int64_t queries, int dtype, double scale, int mask_dtype, int64_t mask_cols, int64_t n0,
                 int64_t n1, int64_t n2, int64_t n3, int shared, const void* rng, int64_t threshold,
                 double keep_scale, int num_threads) {
  const Problem a = problem(rows, cols, queries, scale, threshold, keep_scale, rng);
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T *dy_t = static_cast<const T*>(dy), *p_t = static_cast<const T*>(p);
    T* dx_t = static_cast<T*>(dx);
    if (dmask == nullptr) {
      parallel_chunks(rows, rows_per_chunk(rows, cols, num_threads), rows * cols, num_threads,
                      [&](int64_t begin, int64_t end) {
                        const Streaming streaming(a.streamed(dx_t, true));
                        Scratch g(a.dropping ? cols : 0);
                        for (int64_t i = begin; i < end; ++i)
                          backward_row(a, dy_t, p_t, dx_t, nullptr, false, g.data, i, streaming.on);
                      });
      return;
    }
    const Sharing sharing{{n0, n1, n2, n3}, shared};
    if (mask_dtype == F32) {
      backward_masked(a, dy_t, p_t, dx_t, static_cast<float*>(dmask), mask_cols, sharing, num_threads);
    } else {
      backward_masked(a, dy_t, p_t, dx_t, static_cast<T*>(dmask), mask_cols, sharing, num_threads);
    }
  });
}

}  // namespace fg::FG_LEVEL

FG_EXPORTS(softmax, FG_EXPORT(softmax_fwd), FG_EXPORT(softmax_bwd))
