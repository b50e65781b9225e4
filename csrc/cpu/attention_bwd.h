// Attention, backward, in one sweep over the tiles of scores:
//
//   s = k q^T;  p = e^(s - lse);  dp = v dout^T;  ds = p (dp - delta),  delta = sum(dout out) - dlse
//   dv = p dout;  dk = scale ds q;  dq = scale ds^T k
//
// Dao, "FlashAttention-2" (2023), algorithm 2. A unit of work is one stretch of the keys of one key head,
// with all query heads that share it: dk and dv are its own, and what it adds to dq goes to a buffer of its
// own, summed in the order of the stretches. How keys are cut depends on shapes alone.

#pragma once

#include "attention.h"
#include "reduce.h"

namespace fg::FG_LEVEL {
namespace {

constexpr float kNever = __builtin_inff();  // as the lse of a row without keys: e^(s - inf) = 0

struct Gradients {
  const void *dout, *out;
  Strides dout_at, out_at;
  const float *lse, *dlse;  // [B, H, Tq] or [H, total], dlse may be null
  void *dq, *dk, *dv;
  Strides dq_at, dk_at, dv_at;
};

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

template <class T, class Kind>
struct Backward {
  static constexpr int64_t kEach = Kind::kEach;
  const Call& call;
  const Gradients& grads;
  const int64_t panels, lanes;  // of the longest sequence
  const int64_t depth = elements<Kind>(call.width), value_depth = elements<Kind>(call.value_width);
  const int64_t wide = round_up(call.width, W),
                value_wide = round_up(call.value_width, W);  // columns of dk, dv
  const int64_t tall = round_up(call.width, kRows);          // rows of a panel's dq

  Backward(const Call& call, const Gradients& grads)
      : call(call), grads(grads), panels(ceil_div(call.queries, kLanes)), lanes(round_up(call.queries, W)) {}

  struct Memory {
    float *q, *g, *q_rows, *g_rows, *lse, *norm, *delta;  // of one head, panel after panel
    float *k, *v, *k_along, *s, *dp, *bias, *tanhs, *p_pairs, *ds_pairs, *ds_columns;
    float *dq, *dk, *dv;
  };

  // keys: of the unit. own_dq: whether dq is summed here, and not in a part that the caller gives.
  int64_t divide(float* memory, int64_t keys, bool own_dq, Memory* to) const {
    int64_t used = 0;
    const auto take = [&](int64_t floats) {
      float* const taken = memory + used;
      used += round_up(floats, 16);
      return taken;
    };
    to->q = take(depth * lanes);
    to->g = take(value_depth * lanes);
    to->q_rows = take(lanes / kEach * wide);
    to->g_rows = take(lanes / kEach * value_wide);
    to->lse = take(lanes);
    to->norm = take(lanes);
    to->delta = take(lanes);
    to->k = take(kKeys * round_up(depth, kRows));
    to->v = take(kKeys * value_depth);
    to->k_along = kEach == 2 ? take(kKeys / 2 * tall) : to->k;
    to->s = take(kKeys * kLanes);
    to->dp = take(kKeys * kLanes);
    to->bias = take(kKeys * kLanes);
    to->tanhs = take(call.softcap > 0.0f ? kKeys * kLanes : 0);
    to->p_pairs = take(kEach == 2 ? kKeys * kLanes / 2 : 0);
    to->ds_pairs = take(kEach == 2 ? kKeys * kLanes / 2 : 0);
    to->ds_columns = take(kEach == 2 ? kKeys * kLanes / 2 : 0);
    to->dq = own_dq ? take(dq_floats()) : nullptr;
    const int64_t rows = call.heads == call.kv_heads ? kKeys : round_up(keys, kKeys);
    to->dk = take(rows * wide);
    to->dv = take(rows * value_wide);
    return used;
  }

  int64_t dq_floats() const { return tall * lanes; }  // [panel][feature][query]

  // k's rows are as wide as the columns that dq's product takes from them.
  int64_t k_row() const { return kEach == 2 ? depth : tall; }

  // The queries [begin, end): begin a multiple of kLanes.
  void load_head(const Head& head, const Memory& m, int64_t begin, int64_t end) const {
    const T* q = at_head(static_cast<const T*>(call.q), call.q_at, call, head.b, head.h, head.first_q);
    const T* g =
        at_head(static_cast<const T*>(grads.dout), grads.dout_at, call, head.b, head.h, head.first_q);
    const T* out =
        at_head(static_cast<const T*>(grads.out), grads.out_at, call, head.b, head.h, head.first_q);
    const int64_t in_sequence = call.cu_q != nullptr ? 0 : head.b * call.heads * call.rows;
    const int64_t row = in_sequence + head.h * call.rows + head.first_q;
    for (int64_t t = begin; t < end; t += kLanes) {
      const Panel panel(t, end);
      const T *q_t = q + t * call.q_at.t, *g_t = g + t * grads.dout_at.t, *out_t = out + t * grads.out_at.t;
      pack_columns<Kind>(q_t, call.q_at.t, panel.count, call.width, m.q + t * depth, panel.lanes);
      pack_columns<Kind>(g_t, grads.dout_at.t, panel.count, call.value_width, m.g + t * value_depth,
                         panel.lanes);
      pack_along<Kind>(q_t, call.q_at.t, panel.count, panel.lanes, call.width, m.q_rows + t / kEach * wide,
                       wide);
      pack_along<Kind>(g_t, grads.dout_at.t, panel.count, panel.lanes, call.value_width,
                       m.g_rows + t / kEach * value_wide, value_wide);
      for (int64_t r = 0; r < panel.lanes; ++r) {
        const bool there = r < panel.count;
        float lse = there ? grads.lse[row + t + r] : -kNever;
        if (lse == kNever || (there && lse == -kNever && all_lost(call, head, t + r)))
          lse = __builtin_nanf("");
        m.lse[t + r] = lse == -kNever ? kNever : lse;
        m.norm[t + r] = 1.0f;
        m.delta[t + r] = 0.0f;
        if (!there) continue;
        const T *a = g_t + r * grads.dout_at.t, *b = out_t + r * grads.out_at.t;
        const float inner = sum_lanes(call.value_width, [&](int64_t j, auto part) FG_LAMBDA {
          return load(a + j, part) * load(b + j, part);
        });
        m.delta[t + r] = inner - (grads.dlse != nullptr ? grads.dlse[row + t + r] : 0.0f);
      }
    }
  }

  void load_keys(const Memory& m, const T* k, const T* v, int64_t key, int64_t keys) const {
    const int64_t padded = round_up(keys, kRows);
    pack_rows<Kind>(k + key * call.k_at.t, call.k_at.t, keys, padded, call.width, m.k, k_row());
    pack_rows<Kind>(v + key * call.v_at.t, call.v_at.t, keys, padded, call.value_width, m.v, value_depth);
  }

  // Rows of scores so large that lse has lost the logarithm of their number, masks of -3e38 above all: their
  // probabilities e^(s - lse) are brought to the sum 1.
  void normalise(const Head& head, const Memory& m, const T* k, int64_t begin, int64_t end) const {
    if (call.plain()) return;
    constexpr float kLarge = 256.0f;
    const Exponential<false> exponential(call);
    for (int64_t t = begin; t < end; t += kLanes) {
      const Panel panel(t, end);
      bool any_large = false;
      for (int64_t r = 0; r < panel.count; ++r) {
        const float size = __builtin_fabsf(m.lse[t + r]);
        any_large = any_large || (size >= kLarge && size < kNever);
      }
      if (!any_large) continue;
      alignas(64) float sums[kLanes] = {};
      const Band band(call, head, t, t + panel.count - 1);
      for (int64_t key = band.begin / kKeys * kKeys; key < band.end; key += kKeys) {
        const int64_t keys = min_of(kKeys, band.end - key), padded = round_up(keys, kRows);
        pack_rows<Kind>(k + key * call.k_at.t, call.k_at.t, keys, padded, call.width, m.k, k_row());
        with_vecs(panel.vecs, [&](auto vecs) FG_LAMBDA {
          product<Kind, decltype(vecs)::value, Start::kZero>(m.k, k_row(), 1, m.q + t * depth, panel.lanes,
                                                             depth, m.s, panel.lanes, padded);
        });
        shape_scores(call, head, panel, key, keys, m.s, m.bias, nullptr);
        if (!sees_whole(call, head, panel, key, keys)) hide(call, head, panel, key, keys, m.s);
        for (int64_t j = 0; j < padded; ++j) {
          for (int64_t u = 0; u < panel.vecs; ++u) {
            const F base = load(m.lse + t + u * W, Full{}), s = load(m.s + j * panel.lanes + u * W, Full{});
            const F p = select(is_hidden(s), set(0.0f), exponential(s, base, base));
            store(sums + u * W, load(sums + u * W, Full{}) + p, Full{});
          }
        }
      }
      for (int64_t r = 0; r < panel.count; ++r) {
        const float size = __builtin_fabsf(m.lse[t + r]);
        if (size >= kLarge && size < kNever) m.norm[t + r] = 1.0f / sums[r];
      }
    }
  }

  // s, dp and what follows from them: the operands of the last three products, or, with Of = Floats and no
  // tanhs, the gradient of the scores in m.dp.
  template <class Of>
  void tile(const Head& head, const Panel& panel, const Memory& m, int64_t key, int64_t keys,
            float* tanhs) const {
    const int64_t padded = round_up(keys, kRows);
    with_vecs(panel.vecs, [&](auto vecs) FG_LAMBDA {
      constexpr int V = decltype(vecs)::value;
      product<Kind, V, Start::kZero>(m.k, k_row(), 1, m.q + panel.t * depth, panel.lanes, depth, m.s,
                                     panel.lanes, padded);
      product<Kind, V, Start::kZero>(m.v, value_depth, 1, m.g + panel.t * value_depth, panel.lanes,
                                     value_depth, m.dp, panel.lanes, padded);
    });
    const bool plain = call.plain();
    if (!plain) shape_scores(call, head, panel, key, keys, m.s, m.bias, tanhs);
    if (!sees_whole(call, head, panel, key, keys)) hide(call, head, panel, key, keys, m.s);
    const float *lse = m.lse + panel.t, *norm = m.norm + panel.t, *delta = m.delta + panel.t;
    if (plain) {
      differentiate<Of, true>(call, head, panel, key, padded, m.s, m.dp, nullptr, lse, norm, delta, m.p_pairs,
                              m.ds_pairs, m.ds_columns);
    } else {
      differentiate<Of, false>(call, head, panel, key, padded, m.s, m.dp, tanhs, lse, norm, delta, m.p_pairs,
                               m.ds_pairs, m.ds_columns);
    }
  }

  // The queries [begin, end) that see some of the keys from `key` to `last`.
  Band seen_from(const Head& head, int64_t key, int64_t last) const {
    Band band(call, head, 0, 0);
    band.begin = call.right >= 0 ? min_of(head.Lq, max_of(0, key - head.shift - call.right)) : 0;
    band.end =
        call.left >= 0 ? max_of(band.begin, min_of(head.Lq, last - head.shift + call.left + 1)) : head.Lq;
    return band;
  }

  // dk and dv of the keys [begin, end) of key head `kv_head`, and their share of dq, in `part` (of one head
  // after the other) or stored at once.
  void run(int64_t b, int64_t kv_head, int64_t begin, int64_t end, float* memory, float* part) const {
    Memory m;
    divide(memory, end - begin, part == nullptr, &m);
    const int64_t group = call.heads / call.kv_heads;
    const bool gathers = group > 1;
    for (int64_t g = 0; g < group; ++g) {
      const Head head(call, b, kv_head * group + g);
      float* const dq = part == nullptr ? m.dq : part + g * dq_floats();
      std::memset(dq, 0, static_cast<uint64_t>(dq_floats()) * sizeof(float));
      load_head(head, m, 0, head.Lq);
      const T* k = at_head(static_cast<const T*>(call.k), call.k_at, call, b, kv_head, head.first_k);
      const T* v = at_head(static_cast<const T*>(call.v), call.v_at, call, b, kv_head, head.first_k);
      normalise(head, m, k, 0, head.Lq);
      const int64_t stored = call.cu_k != nullptr ? call.cu_k[b + 1] - head.first_k : call.keys;
      for (int64_t key = begin; key < min_of(end, stored); key += kKeys) {
        const int64_t keys = max_of(0, min_of(kKeys, head.Lk - key));
        float *const dk = m.dk + (gathers ? (key - begin) * wide : 0), *const dv =
                                                                           m.dv + (gathers ? (key - begin) *
                                                                                                 value_wide
                                                                                           : 0);
        if (g == 0) {
          std::memset(dk, 0, static_cast<uint64_t>(kKeys * wide) * sizeof(float));
          std::memset(dv, 0, static_cast<uint64_t>(kKeys * value_wide) * sizeof(float));
        }
        if (keys > 0) add_keys(head, m, k, v, key, keys, dq, dk, dv);
        if (g + 1 == group) store_keys(head, b, kv_head, key, min_of(kKeys, stored - key), dk, dv);
      }
      if (part == nullptr) store_dq(head, dq);
    }
  }

  void add_keys(const Head& head, const Memory& m, const T* k, const T* v, int64_t key, int64_t keys,
                float* dq, float* dk, float* dv) const {
    load_keys(m, k, v, key, keys);
    if (kEach == 2)
      pack_along<Kind>(k + key * call.k_at.t, call.k_at.t, keys, round_up(keys, kRows), call.width, m.k_along,
                       tall);
    const Band band = seen_from(head, key, key + keys - 1);
    for (int64_t t = band.begin / kLanes * kLanes; t < band.end; t += kLanes) {
      const Panel panel(t, head.Lq);
      const Band seen(call, head, t, t + panel.count - 1);
      const int64_t there = min_of(keys, seen.end - key), padded = round_up(there, kRows);
      tile<Kind>(head, panel, m, key, there, call.softcap > 0.0f ? m.tanhs : nullptr);
      const float *p = kEach == 2 ? m.p_pairs : m.s, *ds = kEach == 2 ? m.ds_pairs : m.dp;
      const float* ds_columns = kEach == 2 ? m.ds_columns : m.dp;
      const int64_t row = panel.lanes / kEach, n = ceil_div(panel.count, kEach);
      wide_product<Kind, Start::kAdd>(p, row, 1, m.g_rows + t / kEach * value_wide, value_wide, n, dv,
                                      value_wide, padded, value_wide / W);
      wide_product<Kind, Start::kAdd>(ds, row, 1, m.q_rows + t / kEach * wide, wide, n, dk, wide, padded,
                                      wide / W);
      with_vecs(panel.vecs, [&](auto vecs) FG_LAMBDA {
        product<Kind, decltype(vecs)::value, Start::kAdd>(m.k_along, 1, tall, ds_columns, panel.lanes,
                                                          padded / kEach, dq + t * tall, panel.lanes, tall);
      });
    }
  }

  void store_keys(const Head& head, int64_t b, int64_t kv_head, int64_t key, int64_t keys, const float* dk,
                  const float* dv) const {
    T* to_k =
        at_head(static_cast<T*>(grads.dk), grads.dk_at, call, b, kv_head, head.first_k) + key * grads.dk_at.t;
    T* to_v =
        at_head(static_cast<T*>(grads.dv), grads.dv_at, call, b, kv_head, head.first_k) + key * grads.dv_at.t;
    const F scale = set(call.scale);
    for (int64_t j = 0; j < keys; ++j) {
      for_lanes<1>(call.width, [&](int64_t d, int, auto part) FG_LAMBDA {
        store(to_k + j * grads.dk_at.t + d, load(dk + j * wide + d, part) * scale, part);
      });
      for_lanes<1>(call.value_width, [&](int64_t d, int, auto part) FG_LAMBDA {
        store(to_v + j * grads.dv_at.t + d, load(dv + j * value_wide + d, part), part);
      });
    }
  }

  void store_dq(const Head& head, const float* dq) const {
    T* to = at_head(static_cast<T*>(grads.dq), grads.dq_at, call, head.b, head.h, head.first_q);
    alignas(64) float scales[kLanes];
    for (int i = 0; i < kLanes; ++i) scales[i] = call.scale;
    for (int64_t t = 0; t < head.Lq; t += kLanes) {
      const Panel panel(t, head.Lq);
      unpack_columns(dq + t * tall, panel.lanes, panel.count, call.width, scales, to + t * grads.dq_at.t,
                     grads.dq_at.t);
    }
  }
};

// Into how many stretches the keys of a head are cut: enough to keep many threads busy, where each is worth
// it and the parts of dq stay below 32 MiB.
inline int64_t stretches(const Call& call, int64_t dq_floats) {
  const int64_t heads = max_of(1, call.batch * call.kv_heads), wanted = ceil_div(32, heads);
  const int64_t longest = max_of(1, call.keys / 512);
  const int64_t allowed = (8 << 20) / max_of(1, call.batch * call.heads * dq_floats);
  const int64_t count = min_of(wanted, min_of(longest, allowed));
  return max_of(1, count);
}

}  // namespace

}  // namespace fg::FG_LEVEL
