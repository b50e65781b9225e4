// Cross-entropy of rows of logits with integer targets, and its gradient.
//
//   lse = log sum_j exp(x_j),  loss = (1 - s) (lse - x_t) + s / V sum_j (lse - x_j)
//   dx_j = g (exp(x_j - lse) - s / V - (1 - s) [j = t]),  g = dloss, / count for the mean
//
// Forward reads the logits once (Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018), in
// blocks; the sum so far is rescaled only where the maximum has risen much. Backward reads them once more.
// Rows whose target is ignored are not read at all.

#include "export.h"
#include "math.h"
#include "parallel.h"
#include "stream.h"

namespace fg::FG_LEVEL {
namespace {

enum Reduction : int { kNone = 0, kMean = 1, kSum = 2 };

constexpr float kInf = __builtin_inff();
constexpr float kNaN = __builtin_nanf("");

// Exponentials are of x - shift, where the shift need not be the row's maximum, which is not known yet: at
// first it is that of a sample, and a block with a maximum more than kSlack above is done again with its own.
constexpr int64_t kSample = 64, kBlock = 2048;
constexpr float kSlack = 8.0f;

// Elements between what is read and what is asked for: alone, the processor fetches too little ahead.
constexpr int64_t kAhead = 2048;

struct Problem {
  const int64_t* targets;
  int64_t cols, stride, ignore_index;
  float smoothing;

  bool ignored(int64_t row) const { return targets[row] == ignore_index; }
  bool is_class(int64_t target) const { return 0 <= target && target < cols; }
};

// exp_nonpositive by one step less, which bf16 rows are bound by: relative error (3 + |t|) 2^-24, where the
// bound has at least 16. Right for t <= 60; above, some levels give nonsense, which row_sums throws away.
FG_INLINE F exp_short(F t) {
#if defined(FG_LOOKUP)
  return exp_nonpositive(t);
#else
  const F w = t * set(1.44269504f), f = fraction(w);
  F q = fma(set(0.00186713005f), f, set(0.00901703071f));  // 2^f = 1 + f q(f) on [0, 1], relative error 8e-8
  q = fma(q, f, set(0.0557999127f));
  q = fma(q, f, set(0.240164444f));
  q = fma(q, f, set(0.693151295f));
  return scale_floor(fma(q, f, set(1.0f)), w);
#endif
}

// exp of one number <= 0 by the vector's formula.
FG_INLINE float exp_one(float t) {
  float lanes[W];
  store(lanes, exp_short(set(t)), Full{});
  return lanes[0];
}

struct Sums {
  float top, exps, logits;  // max x, sum exp(x - shift), sum x (only with label smoothing)
};

template <bool kSmooth, class T>
FG_INLINE Sums block_sums(const T* x, int64_t n, float shift) {
  const F minus = set(shift == -kInf ? 0.0f : -shift);  // -inf less 0 adds nothing, NaN makes the sum NaN
  F best[4] = {set(-kInf), set(-kInf), set(-kInf), set(-kInf)};
  F exps[4] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
  F logits[4] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
  // A multiply-add where an addition would do: additions are what this loop has most of.
  const auto exponential = [&](F value) FG_LAMBDA { return exp_short(fma(value, set(1.0f), minus)); };
  for_lanes<4, kTwice<T>>(n, [&](int64_t j, int u, auto lanes) FG_LAMBDA {
    prefetch(x + j + kAhead);
    const auto value = load(x + j, lanes);
    best[u] = raise(best[u], keep(value, lanes, set(-kInf)));
    exps[u] = add(exps[u], keep(each(exponential, value), lanes, set(0.0f)));
    if constexpr (kSmooth) logits[u] = add(logits[u], keep(value, lanes, set(0.0f)));
  });
  return {hmax(vmax(vmax(best[0], best[1]), vmax(best[2], best[3]))),
          hsum((exps[0] + exps[1]) + (exps[2] + exps[3])),
          kSmooth ? hsum((logits[0] + logits[1]) + (logits[2] + logits[3])) : 0.0f};
}

// The row's sums and, as `top`, the shift that its exponentials have.
template <bool kSmooth, class T>
FG_INLINE Sums row_sums(const T* x, int64_t n) {
  Sums row{-kInf, 0.0f, 0.0f};
  F sample = set(-kInf);
  for_lanes<1>(min_of(kSample, n), [&](int64_t j, int, auto lanes) FG_LAMBDA {
    sample = vmax(keep(load(x + j, lanes), lanes, set(-kInf)), sample);
  });
  row.top = hmax(sample);
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = min_of(kBlock, n - begin);
    Sums block = block_sums<kSmooth>(x + begin, count, row.top);
    if (block.top > row.top + kSlack) {
      row.exps *= exp_one(row.top - block.top);
      row.top = block.top;
      block = block_sums<kSmooth>(x + begin, count, row.top);
    }
    row.exps += block.exps;
    row.logits += block.logits;
  }
  return row;
}

template <class T>
FG_INLINE float row_loss(const Problem& a, const T* x, int64_t row, float& lse) {
  const int64_t target = a.targets[row];
  if (target == a.ignore_index) {
    lse = 0.0f;
    return 0.0f;
  }
  const bool smooth = a.smoothing > 0.0f;
  const Sums sums = smooth ? row_sums<true>(x, a.cols) : row_sums<false>(x, a.cols);
  // Nothing but -inf (and NaN): NaN, as log_softmax has it.
  const float log_sum = __builtin_logf(sums.exps);
  lse = sums.top == -kInf ? kNaN : sums.top + log_sum;
  if (!a.is_class(target)) return kNaN;
  // Of logits so large that lse has lost log_sum, the loss still has it.
  const float loss = sums.top == -kInf ? kNaN : sums.top - load_scalar(x + target) + log_sum;
  if (!smooth) return loss;
  return (1.0f - a.smoothing) * loss + a.smoothing * (lse - sums.logits / static_cast<float>(a.cols));
}

template <class T>
FG_INLINE void row_gradient(const Problem& a, const T* x, int64_t row, float lse, float g, T* dx,
                            bool streaming) {
  const int64_t target = a.targets[row];
  if (target == a.ignore_index) {
    std::memset(static_cast<void*>(dx), 0, static_cast<uint64_t>(a.cols) * sizeof(T));
    return;
  }
  if (!a.is_class(target)) g = kNaN;
  const float spread = a.smoothing / static_cast<float>(max_of(1, a.cols));
  const F minus = set(spread), shift = set(lse), scale = set(g);
  const auto gradient = [&](F value) FG_LAMBDA { return (exp_short(value - shift) - minus) * scale; };
  for_lanes_out<4, kTwice<T>>(dx, a.cols, streaming, [&](int64_t j, int, auto lanes) FG_LAMBDA {
    prefetch(x + j + kAhead);
    put(dx + j, each(gradient, load(x + j, lanes)), lanes);
  });
  if (a.is_class(target)) {
    const F p = exp_short(set(load_scalar(x + target)) - shift) - minus;
    store(dx + target, (p - set(1.0f - a.smoothing)) * scale, Part{1});
  }
}

// In a fixed order and in double: a mean over a million rows keeps fp32's accuracy, for nothing beside the
// logits.
float sum_of(const float* losses, int64_t n) {
  double sums[4] = {0.0, 0.0, 0.0, 0.0};
  for (int64_t i = 0; i < n; ++i) sums[i % 4] += static_cast<double>(losses[i]);
  return static_cast<float>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace

// logits: rows of cols adjacent elements, `stride` apart. targets, lse: [rows]. loss: [rows] for kNone, else
// one number. count: the targets that count, for kMean.
void cross_entropy_fwd(const void* logits, const int64_t* targets, float* loss, float* lse, float* count,
                       int64_t rows, int64_t cols, int64_t stride, int dtype, int64_t ignore_index,
                       double smoothing, int reduction, int num_threads) {
  const Problem a{targets, cols, stride, ignore_index, static_cast<float>(smoothing)};
  Scratch own(reduction == kNone ? 0 : rows);
  float* losses = reduction == kNone ? loss : own.data;
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_chunks(rows, rows_per_chunk(rows, cols, num_threads), rows * cols, num_threads,
                    [&](int64_t begin, int64_t end) {
                      for (int64_t i = begin; i < end; ++i)
                        losses[i] = row_loss(a, static_cast<const T*>(logits) + i * stride, i, lse[i]);
                    });
  });
  if (reduction == kNone) return;
  *loss = sum_of(losses, rows);
  if (reduction == kSum) return;
  int64_t counted = 0;
  for (int64_t i = 0; i < rows; ++i) counted += a.ignored(i) ? 0 : 1;
  *count = static_cast<float>(counted);
  *loss /= *count;
}

// dloss: [rows] for kNone, else one number. dlogits: [rows, cols] contiguous.
void cross_entropy_bwd(const float* dloss, const void* logits, const int64_t* targets, const float* lse,
                       const float* count, void* dlogits, int64_t rows, int64_t cols, int64_t stride,
                       int dtype, int64_t ignore_index, double smoothing, int reduction, int num_threads) {
  const Problem a{targets, cols, stride, ignore_index, static_cast<float>(smoothing)};
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_chunks(
        rows, rows_per_chunk(rows, cols, num_threads), rows * cols, num_threads,
        [&](int64_t begin, int64_t end) {
          const Streaming streaming(rows * cols * static_cast<int64_t>(sizeof(T)));
          for (int64_t i = begin; i < end; ++i) {
            const float g = reduction == kNone ? dloss[i] : reduction == kMean ? *dloss / *count : *dloss;
            row_gradient(a, static_cast<const T*>(logits) + i * stride, i, lse[i], g,
                         static_cast<T*>(dlogits) + i * cols, streaming.on);
          }
        });
  });
}

}  // namespace fg::FG_LEVEL

FG_EXPORTS(cross_entropy, FG_EXPORT(cross_entropy_fwd), FG_EXPORT(cross_entropy_bwd))
