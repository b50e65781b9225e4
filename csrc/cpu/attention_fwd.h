// Attention, forward: an online softmax over tiles of keys, for panels of queries held as columns.
//
//   s = k q^T;  m' = max(m, max s);  p = e^(s - m');  l = l e^(m - m') + sum p;  acc = acc e^(m - m') + v^T p
//   out = acc / l,  lse = m + log l
//
// Dao, "FlashAttention-2" (2023), algorithm 1, transposed: maxima and sums run down columns of vectors, and
// keys and values are read element by element, as they lie. One unit of work is four panels of one head,
// whatever the threads.

#pragma once

#include <cmath>

#include "attention.h"
#include "attention_few.h"

namespace fg::FG_LEVEL {
namespace {

constexpr int kPanels = 4;  // that share a packed tile of keys and values

struct Work {  // the memory of one unit
  float *keys, *values, *scores, *weights, *bias;
  float *queries[kPanels], *acc[kPanels], *top[kPanels], *sum[kPanels];
};

// The tile's maxima and exponentials: top and sum are brought up to date, `factors` is what earlier sums
// shrink by. weights: the probabilities after dropout as the second product reads them.
template <class Kind, bool Plain>
inline void weigh(const Call& call, const Head& head, const Panel& panel, int64_t key, int64_t padded,
                  float* s, float* top, float* sum, float* factors, float* weights) {
  const Exponential<Plain> exponential(call);
  const F never = set(0.0f) - infinite();
  for (int64_t u = 0; u < panel.vecs; ++u) {
    float* column = s + u * W;
    const F before = load(top + u * W, Full{});
    F m0 = before, m1 = before, m2 = before, m3 = before;
    for (int64_t j = 0; j < padded; j += 4) {
      m0 = vmax(load(column + j * panel.lanes, Full{}), m0);
      m1 = vmax(load(column + (j + 1) * panel.lanes, Full{}), m1);
      m2 = vmax(load(column + (j + 2) * panel.lanes, Full{}), m2);
      m3 = vmax(load(column + (j + 3) * panel.lanes, Full{}), m3);
    }
    const F now = vmax(vmax(m0, m1), vmax(m2, m3));
    store(top + u * W, now, Full{});
    const F base = select(is_hidden(now), set(0.0f), now), base_in_units = base * exponential.unit;
    const F factor = exponential(select(is_hidden(before), never, before), base, base_in_units);
    store(factors + u * W, factor, Full{});
    F total0 = load(sum + u * W, Full{}) * factor, total1 = set(0.0f);
    for (int64_t j = 0; j < padded; j += 2) {
      float* at = column + j * panel.lanes;
      F p0 = exponential(load(at, Full{}), base, base_in_units);
      F p1 = exponential(load(at + panel.lanes, Full{}), base, base_in_units);
      total0 = total0 + p0;
      total1 = total1 + p1;
      if (call.threshold != 0) {
        p0 = kept(call, head, panel.t + u * W, key + j, p0);
        p1 = kept(call, head, panel.t + u * W, key + j + 1, p1);
      }
#if FG_BF16_PAIRS
      if constexpr (Kind::kEach == 2) {
        _mm512_storeu_si512(weights + j / 2 * panel.lanes + u * W, pair_up(p0, p1));
        continue;
      }
#endif
      store(weights + j * panel.lanes + u * W, p0, Full{});
      store(weights + (j + 1) * panel.lanes + u * W, p1, Full{});
    }
    store(sum + u * W, total0 + total1, Full{});
  }
}

template <class T, class Kind>
struct Forward {
  const Call& call;
  const int64_t depth = elements<Kind>(call.width);           // of the first product
  const int64_t outputs = round_up(call.value_width, kRows);  // rows of acc
  const int64_t key_tile = kKeys * depth, value_tile = kKeys / Kind::kEach * outputs;

  const int64_t query_floats = max_of(depth * kLanes, kFew* round_up(call.width, W));

  explicit Forward(const Call& call) : call(call) {}

  int64_t floats() const {
    return key_tile + value_tile + 3 * kKeys * kLanes + kPanels * (query_floats + kLanes * (outputs + 2));
  }

  Work divide(float* memory) const {
    Work work;
    const auto take = [&](int64_t floats) {
      float* const taken = memory;
      memory += floats;
      return taken;
    };
    work.keys = take(round_up(key_tile, W));
    work.values = take(round_up(value_tile, W));
    work.scores = take(kKeys * kLanes);
    work.bias = take(kKeys * kLanes);
    work.weights = Kind::kEach == 1 ? work.scores : take(kKeys * kLanes);
    for (int i = 0; i < kPanels; ++i) {
      work.queries[i] = take(query_floats);
      work.acc[i] = take(outputs * kLanes);
      work.top[i] = take(kLanes);
      work.sum[i] = take(kLanes);
    }
    return work;
  }

  // From scores to weights; factors: what earlier sums shrink by.
  template <class Of>
  void weigh_scores(const Head& head, const Panel& panel, const Work& work, int i, int64_t key, int64_t keys,
                    float* factors) const {
    const int64_t padded = round_up(keys, kRows);
    float* const weights = Of::kEach == 1 ? work.scores : work.weights;
    const bool plain = call.plain();
    if (!plain) shape_scores(call, head, panel, key, keys, work.scores, work.bias, nullptr);
    if (!sees_whole(call, head, panel, key, keys)) hide(call, head, panel, key, keys, work.scores);
    if (plain) {
      weigh<Of, true>(call, head, panel, key, padded, work.scores, work.top[i], work.sum[i], factors,
                      weights);
    } else {
      weigh<Of, false>(call, head, panel, key, padded, work.scores, work.top[i], work.sum[i], factors,
                       weights);
    }
  }

  void tile(const Head& head, const Panel& panel, const Work& work, int i, int64_t key, int64_t keys,
            bool first) const {
    const int64_t padded = round_up(keys, kRows), lanes = panel.lanes;
    with_vecs(panel.vecs, [&](auto v) FG_LAMBDA {
      product<Kind, decltype(v)::value, Start::kZero>(work.keys, depth, 1, work.queries[i], lanes, depth,
                                                      work.scores, lanes, padded);
    });
    alignas(64) float factors[kLanes];
    weigh_scores<Kind>(head, panel, work, i, key, keys, factors);
    with_vecs(panel.vecs, [&](auto v) FG_LAMBDA {
      constexpr int V = decltype(v)::value;
      const int64_t n = padded / Kind::kEach;
      if (first) {
        product<Kind, V, Start::kZero>(work.values, 1, outputs, work.weights, lanes, n, work.acc[i], lanes,
                                       outputs);
      } else {
        product<Kind, V, Start::kScale>(work.values, 1, outputs, work.weights, lanes, n, work.acc[i], lanes,
                                        outputs, factors);
      }
    });
  }

  // All queries of a head where they are few: products of their own, the rest as in a tile.
  void run_few(const Head& head, const T* q, const T* k, const T* v, T* out, float* lse,
               float* memory) const {
    const Work work = divide(memory);
    const Panel panel(0, head.Lq);
    const int64_t ldq = round_up(call.width, W), lda = round_up(call.value_width, W);
    float *const rows = work.queries[0], *const acc = work.acc[0];  // kLanes wide: more than kFew rows
    pack_rows<Floats>(q, call.q_at.t, panel.count, panel.count, call.width, rows, ldq);
    std::memset(acc, 0, static_cast<uint64_t>(panel.count * lda) * sizeof(float));
    reset(work, 0);
    const Band band(call, head, 0, head.Lq - 1);
    alignas(64) float factors[kLanes];
    for (int64_t key = band.begin; key < band.end; key += kKeys) {
      const int64_t keys = min_of(kKeys, band.end - key);
      few_scores(rows, ldq, panel.count, k + key * call.k_at.t, call.k_at.t, keys, round_up(keys, kRows),
                 call.width, work.scores, panel.lanes);
      weigh_scores<Floats>(head, panel, work, 0, key, keys, factors);
      few_values(work.scores, panel.lanes, panel.count, v + key * call.v_at.t, call.v_at.t, keys,
                 call.value_width, factors, acc, lda);
    }
    scale_sums(head, panel, work, 0, lse, factors);
    for (int64_t r = 0; r < panel.count; ++r) {
      T* const to = out_at(out, head, r);
      for_lanes<1>(call.value_width, [&](int64_t d, int, auto part) FG_LAMBDA {
        store(to + d, load(acc + r * lda + d, Full{}) * set(factors[r]), part);
      });
    }
  }

  void reset(const Work& work, int i) const {
    for (int64_t r = 0; r < kLanes; ++r) {
      work.top[i][r] = -__builtin_inff();
      work.sum[i][r] = 0.0f;
    }
  }

  T* out_at(T* out, const Head& head, int64_t t) const {
    const int64_t row = (call.cu_q != nullptr ? 0 : head.b * call.rows) + head.first_q + t;
    return out + (row * call.heads + head.h) * call.value_width;
  }

  // lse of a panel, and what its sums are to be multiplied with.
  void scale_sums(const Head& head, const Panel& panel, const Work& work, int i, float* lse,
                  float* factors) const {
    const float unit = call.plain() ? call.scale : 1.0f;
    const int64_t in_sequence = call.cu_q != nullptr ? 0 : head.b * call.heads * call.rows;
    float* const lse_at = lse + in_sequence + head.h * call.rows + head.first_q + panel.t;
    for (int64_t r = 0; r < panel.count; ++r) {
      const float sum = work.sum[i][r], top = work.top[i][r];
      factors[r] = sum == 0.0f ? 0.0f : call.keep_scale / sum;
      const bool infinite = top == __builtin_inff();  // its sum is NaN
      lse_at[r] = infinite || sum == 0.0f ? top : top * unit + ::logf(sum);
      if (sum == 0.0f && all_lost(call, head, panel.t + r)) factors[r] = __builtin_nanf("");
    }
    for (int64_t r = panel.count; r < panel.lanes; ++r) factors[r] = 0.0f;
  }

  // The queries t … of one head, four panels at most.
  void run(const Head& head, int64_t t, T* out, float* lse, float* memory) const {
    const T* q = at_head(static_cast<const T*>(call.q), call.q_at, call, head.b, head.h, head.first_q);
    const int64_t kv_head = head.h / (call.heads / call.kv_heads);
    const T* k = at_head(static_cast<const T*>(call.k), call.k_at, call, head.b, kv_head, head.first_k);
    const T* v = at_head(static_cast<const T*>(call.v), call.v_at, call, head.b, kv_head, head.first_k);
    if (head.Lq <= kFew) return run_few(head, q, k, v, out, lse, memory);
    const Work work = divide(memory);
    const int64_t last = min_of(head.Lq, t + kPanels * kLanes) - 1;
    const auto panel_of = [&](int i) { return Panel(min_of(t + i * kLanes, last + 1), last + 1); };
    const Panel panels[kPanels] = {panel_of(0), panel_of(1), panel_of(2), panel_of(3)};
    bool started[kPanels] = {};
    for (int i = 0; i < kPanels; ++i) {
      const Panel& panel = panels[i];
      if (panel.count == 0) continue;
      pack_columns<Kind>(q + panel.t * call.q_at.t, call.q_at.t, panel.count, call.width, work.queries[i],
                         panel.lanes);
      reset(work, i);
    }
    const Band all(call, head, t, last);
    for (int64_t key = all.begin / kKeys * kKeys; key < all.end; key += kKeys) {
      const int64_t keys = min_of(kKeys, head.Lk - key), padded = round_up(keys, kRows);
      pack_rows<Kind>(k + key * call.k_at.t, call.k_at.t, keys, padded, call.width, work.keys, depth);
      pack_along<Kind>(v + key * call.v_at.t, call.v_at.t, keys, padded, call.value_width, work.values,
                       outputs);
      for (int i = 0; i < kPanels; ++i) {
        const Panel& panel = panels[i];
        if (panel.count == 0) continue;
        const Band band(call, head, panel.t, panel.t + panel.count - 1);
        if (key + keys <= band.begin || key >= band.end) continue;
        tile(head, panel, work, i, key, min_of(keys, band.end - key), !started[i]);
        started[i] = true;
      }
    }
    for (int i = 0; i < kPanels; ++i) {
      if (panels[i].count == 0) continue;
      if (!started[i])
        std::memset(work.acc[i], 0, static_cast<uint64_t>(outputs * panels[i].lanes) * sizeof(float));
      alignas(64) float factors[kLanes];
      scale_sums(head, panels[i], work, i, lse, factors);
      unpack_columns(work.acc[i], panels[i].lanes, panels[i].count, call.value_width, factors,
                     out_at(out, head, panels[i].t), call.heads * call.value_width);
    }
  }
};

}  // namespace

}  // namespace fg::FG_LEVEL
