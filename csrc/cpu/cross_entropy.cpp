// Cross-entropy of rows of logits with integer targets, and its gradient.
//
//   lse = log sum_j exp(x_j),  loss = (1 - s) (lse - x_t) + s / V sum_j (lse - x_j)
//   dx_j = g (exp(x_j - lse) - s / V - (1 - s) [j = t]),  g = dloss, / count for the mean
//
// Forward reads the logits once (online.h), backward once more.
// Rows whose target is ignored are not read at all.

#include "export.h"
#include "online.h"
#include "parallel.h"
#include "stream.h"

namespace fg::FG_LEVEL {
namespace {

enum Reduction : int { kNone = 0, kMean = 1, kSum = 2 };

constexpr float kNaN = __builtin_nanf("");

struct Problem {
  const int64_t* targets;
  int64_t cols, stride, ignore_index;
  float smoothing;

  bool ignored(int64_t row) const { return targets[row] == ignore_index; }
  bool is_class(int64_t target) const { return 0 <= target && target < cols; }
};

template <class T>
FG_INLINE float row_loss(const Problem& a, const T* x, int64_t row, float& lse) {
  const int64_t target = a.targets[row];
  if (target == a.ignore_index) {
    lse = 0.0f;
    return 0.0f;
  }
  const bool smooth = a.smoothing > 0.0f;
  const auto logit = [&](int64_t j, auto lanes) FG_LAMBDA {
    prefetch(x + j + kAhead);
    return load(x + j, lanes);
  };
  const Sums sums =
      smooth ? row_sums<true, kTwice<T>>(a.cols, logit) : row_sums<false, kTwice<T>>(a.cols, logit);
  // Nothing but -inf (and NaN): NaN, as log_softmax has it.
  const float log_sum = __builtin_logf(sums.exps);
  lse = sums.top == -kInf ? kNaN : sums.top + log_sum;
  if (!a.is_class(target)) return kNaN;
  // Of logits so large that lse has lost log_sum, the loss still has it.
  const float loss = sums.top == -kInf ? kNaN : sums.top - load_scalar(x + target) + log_sum;
  if (!smooth) return loss;
  return (1.0f - a.smoothing) * loss + a.smoothing * (lse - sums.scores / static_cast<float>(a.cols));
}

template <class T>
FG_INLINE void row_gradient(const Problem& a, const T* x, int64_t row, float lse, float g, T* dx,
                            bool streaming) {
  const int64_t target = a.targets[row];
  if (target == a.ignore_index) {
    if (a.cols > 0) std::memset(static_cast<void*>(dx), 0, static_cast<uint64_t>(a.cols) * sizeof(T));
    return;
  }
  if (!a.is_class(target)) g = kNaN;
  const float at_target = a.is_class(target) ? load_scalar(x + target) : 0.0f;  // dx may be x
  const float spread = a.smoothing / static_cast<float>(max_of(1, a.cols));
  const F minus = set(spread), shift = set(lse), scale = set(g);
  const auto gradient = [&](F value) FG_LAMBDA { return (exp_short(value - shift) - minus) * scale; };
  for_lanes_out<4, kTwice<T>>(dx, a.cols, streaming, [&](int64_t j, int, auto lanes) FG_LAMBDA {
    prefetch(x + j + kAhead);
    put(dx + j, each(gradient, load(x + j, lanes)), lanes);
  });
  if (a.is_class(target)) {
    const F p = exp_short(set(at_target) - shift) - minus;
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

// Both for each row while it is in the core's cache: losses and lse [rows], and the gradient for dloss [rows]
// in the logits' place, [rows, cols] contiguous. What is already known may be asked for again: losses null.
void cross_entropy_both(const float* dloss, void* logits, const int64_t* targets, float* losses, float* lse,
                        int64_t rows, int64_t cols, int dtype, int64_t ignore_index, int num_threads) {
  const Problem a{targets, cols, cols, ignore_index, 0.0f};
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_chunks(rows, rows_per_chunk(rows, cols, num_threads), rows * cols, num_threads,
                    [&](int64_t begin, int64_t end) {
                      for (int64_t i = begin; i < end; ++i) {
                        T* row = static_cast<T*>(logits) + i * cols;
                        if (losses != nullptr) losses[i] = row_loss(a, row, i, lse[i]);
                        row_gradient(a, row, i, lse[i], dloss[i], row, false);
                      }
                    });
  });
}

}  // namespace fg::FG_LEVEL

FG_EXPORTS(cross_entropy, FG_EXPORT(cross_entropy_fwd), FG_EXPORT(cross_entropy_bwd),
           FG_EXPORT(cross_entropy_both))
