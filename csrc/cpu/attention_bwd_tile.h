// From a tile's bare products s and dp to the operands of the products that follow, in attention's backward:
//
//   p = e^(s - lse);  ds = p (dp - delta)
#pragma once

#include "attention.h"

namespace fg::FG_LEVEL {
namespace {

// A tile's p, after dropout, and ds through the softcap, from its bare scores s and dp: in place, or as pairs
// along the queries in `p_pairs`, `ds_pairs` and along the keys in `ds_columns`.
template <class Kind, bool Plain>
inline void differentiate(const Call& call, const Head& head, const Panel& panel, int64_t key, int64_t padded,
                          float* s, float* dp, const float* tanhs, const float* lse, const float* norm,
                          const float* delta, float* p_pairs, float* ds_pairs, float* ds_columns) {
  const Exponential<Plain> exponential(call);
  for (int64_t u = 0; u < panel.vecs; ++u) {
    const F base = load(lse + u * W, Full{}), base_in_units = Plain ? base * set(kLog2E) : base;
    const F inner = load(delta + u * W, Full{});
    [[maybe_unused]] F held = set(0.0f);
    for (int64_t j = 0; j < padded; ++j) {
      const int64_t at = j * panel.lanes + u * W;
      const F score = load(s + at, Full{});
      // A row whose lse is NaN must not reach keys that it does not see.
      const M hidden = is_hidden(score);
      F p = exponential(score, base, base_in_units);
      if constexpr (!Plain) p = p * load(norm + u * W, Full{});
      p = select(hidden, set(0.0f), p);
      F d = load(dp + at, Full{});
      F weight = p;
      if (call.threshold != 0) {
        const F keep = kept(call, head, panel.t + u * W, key + j, set(call.keep_scale));
        weight = p * keep;
        d = d * keep;
      }
      F ds = p * (d - inner);
      if (tanhs != nullptr) {
        const F t = load(tanhs + at, Full{});
        ds = ds * fnma(t, t, set(1.0f));
      }
      ds = select(hidden, set(0.0f), ds);
#if FG_BF16_PAIRS
      if constexpr (Kind::kEach == 2) {
        store(reinterpret_cast<bf16*>(p_pairs) + at, weight, Full{});
        store(reinterpret_cast<bf16*>(ds_pairs) + at, ds, Full{});
        if (j % 2 == 0) {
          held = ds;
        } else {
          _mm512_storeu_si512(ds_columns + j / 2 * panel.lanes + u * W, pair_up(held, ds));
        }
        continue;
      }
#endif
      store(s + at, weight, Full{});
      store(dp + at, ds, Full{});
    }
  }
  (void)p_pairs, (void)ds_pairs, (void)ds_columns;
}

}  // namespace
}  // namespace fg::FG_LEVEL
