// The sum of a row's exponentials in one pass, where its maximum is not known yet (Milakov, Gimelshein,
// "Online normalizer calculation for softmax", 2018), in blocks; the sum so far is rescaled only where the
// maximum has risen much.
#pragma once

#include "math.h"
#include "parallel.h"

namespace fg::FG_LEVEL {

constexpr float kInf = __builtin_inff();

// Exponentials are of s - shift, where the shift need not be the row's maximum: at first it is that of a
// sample, and a block with a maximum more than kSlack above is done again with its own.
constexpr int64_t kSample = 64, kBlock = 2048;
constexpr float kSlack = 8.0f;

// Elements between what is read and what is asked for: alone, the processor fetches too little ahead.
constexpr int64_t kAhead = 2048;

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
  float top, exps, scores;  // max s, sum exp(s - shift), sum s (only with label smoothing)
};

// Of the scores [begin, begin + n).
template <bool kSmooth, bool Two, class Score>
FG_INLINE Sums block_sums(const Score& score, int64_t begin, int64_t n, float shift) {
  const F minus = set(shift == -kInf ? 0.0f : -shift);  // -inf less 0 adds nothing, NaN makes the sum NaN
  F best[4] = {set(-kInf), set(-kInf), set(-kInf), set(-kInf)};
  F exps[4] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
  F scores[4] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
  // A multiply-add where an addition would do: additions are what this loop has most of.
  const auto exponential = [&](F value) FG_LAMBDA { return exp_short(fma(value, set(1.0f), minus)); };
  for_lanes<4, Two>(n, [&](int64_t j, int u, auto lanes) FG_LAMBDA {
    const auto value = score(begin + j, lanes);
    best[u] = raise(best[u], keep(value, lanes, set(-kInf)));
    exps[u] = add(exps[u], keep(each(exponential, value), lanes, set(0.0f)));
    if constexpr (kSmooth) scores[u] = add(scores[u], keep(value, lanes, set(0.0f)));
  });
  return {hmax(vmax(vmax(best[0], best[1]), vmax(best[2], best[3]))),
          hsum((exps[0] + exps[1]) + (exps[2] + exps[3])),
          kSmooth ? hsum((scores[0] + scores[1]) + (scores[2] + scores[3])) : 0.0f};
}

// The sums of n scores, score(j, lanes), and, as `top`, the shift that the exponentials have. Two: as in
// for_lanes.
template <bool kSmooth, bool Two, class Score>
FG_INLINE Sums row_sums(int64_t n, const Score& score) {
  Sums row{-kInf, 0.0f, 0.0f};
  F sample = set(-kInf);
  for_lanes<1>(min_of(kSample, n), [&](int64_t j, int, auto lanes) FG_LAMBDA {
    sample = vmax(keep(score(j, lanes), lanes, set(-kInf)), sample);
  });
  row.top = hmax(sample);
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = min_of(kBlock, n - begin);
    Sums block = block_sums<kSmooth, Two>(score, begin, count, row.top);
    if (block.top > row.top + kSlack) {
      row.exps *= exp_one(row.top - block.top);
      row.top = block.top;
      block = block_sums<kSmooth, Two>(score, begin, count, row.top);
    }
    row.exps += block.exps;
    row.scores += block.scores;
  }
  return row;
}

}  // namespace fg::FG_LEVEL
