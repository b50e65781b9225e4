// The gradient of attention's float mask, where it is wanted: the scores' gradients once more, added up.
#pragma once

#include "attention_bwd.h"

namespace fg::FG_LEVEL {
namespace {

// The gradient of a float mask, fp32 [*sizes] that starts as zeros: a unit is one panel of one of the mask's
// heads, or, where its rows are shared by all queries, a whole head; sequences and heads that share it are
// summed in order.
struct MaskGradient {
  float* to;
  int64_t batch, heads, queries, keys;  // 1 where the mask is broadcast

  template <class T, class Kind>
  void add(const Call& call, const Backward<T, Kind>& unit, const typename Backward<T, Kind>::Memory& m,
           int64_t mask_b, int64_t mask_h, int64_t begin, int64_t end) const {
    for (int64_t b = batch > 1 ? mask_b : 0; b < (batch > 1 ? mask_b + 1 : call.batch); ++b) {
      for (int64_t h = heads > 1 ? mask_h : 0; h < (heads > 1 ? mask_h + 1 : call.heads); ++h) {
        const Head head(call, b, h);
        const int64_t kv_head = h / (call.heads / call.kv_heads), last = min_of(end, head.Lq);
        const T* k = at_head(static_cast<const T*>(call.k), call.k_at, call, b, kv_head, head.first_k);
        const T* v = at_head(static_cast<const T*>(call.v), call.v_at, call, b, kv_head, head.first_k);
        unit.load_head(head, m, begin, last);
        unit.normalise(head, m, k, begin, last);
        for (int64_t key = 0; key < head.Lk; key += kKeys) {
          const int64_t there = min_of(kKeys, head.Lk - key);
          unit.load_keys(m, k, v, key, there);
          for (int64_t t = begin; t < last; t += kLanes) {
            const Panel panel(t, last);
            unit.template tile<Floats>(head, panel, m, key, there, nullptr);
            for (int64_t r = 0; r < panel.count; ++r) {
              float* row = to + ((mask_b * heads + mask_h) * queries + (queries > 1 ? t + r : 0)) * keys;
              for (int64_t j = 0; j < there; ++j) row[keys > 1 ? key + j : 0] += m.dp[j * panel.lanes + r];
            }
          }
        }
      }
    }
  }
};

}  // namespace

}  // namespace fg::FG_LEVEL
