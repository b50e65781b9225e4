// Attention, backward, in one sweep over the tiles of scores:
//
//   s = k q^T;  p = e^(s - lse);  dp = v dout^T;  ds = p (dp - delta),  delta = sum(dout out) - dlse
//   dv = p dout;  dk = scale ds q;  dq = scale ds^T k
//
// Dao, "FlashAttention-2" (2023), algorithm 2. A unit of work is one key head with all query heads that share
// it. Where there are more threads than such units, dk and dv are found for stretches of keys and dq for
// stretches of queries, at the price of two products of seven done twice. Every sum is over the same tiles in
// the same order: the same bits.

#pragma once

#include "attention.h"
#include "attention_bwd_tile.h"
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

  // keys: of the unit. rows: its queries, a multiple of kLanes or all `lanes`.
  int64_t divide(float* memory, int64_t keys, int64_t rows, Memory* to) const {
    int64_t used = 0;
    const auto take = [&](int64_t floats) {
      float* const taken = memory + used;
      used += round_up(floats, 16);
      return taken;
    };
    to->q = take(depth * rows);
    to->g = take(value_depth * rows);
    to->q_rows = take(rows / kEach * wide);
    to->g_rows = take(rows / kEach * value_wide);
    to->lse = take(rows);
    to->norm = take(rows);
    to->delta = take(rows);
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
    to->dq = take(tall * rows);  // [panel][feature][query]
    const int64_t held = call.heads == call.kv_heads ? kKeys : round_up(keys, kKeys);
    to->dk = take(held * wide);
    to->dv = take(held * value_wide);
    return used;
  }

  // The memory of the queries from `begin` on, seen from query 0.
  Memory from(Memory m, int64_t begin) const {
    m.q -= begin * depth, m.g -= begin * value_depth;
    m.q_rows -= begin / kEach * wide, m.g_rows -= begin / kEach * value_wide;
    m.lse -= begin, m.norm -= begin, m.delta -= begin, m.dq -= begin * tall;
    return m;
  }

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

  void load_keys_along(const Memory& m, const T* k, int64_t key, int64_t keys) const {
    if (kEach == 1) return;  // the rows are there already
    pack_along<Kind>(k + key * call.k_at.t, call.k_at.t, keys, round_up(keys, kRows), call.width, m.k_along,
                     tall);
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

  // dk and dv of the keys [begin, end) of key head `kv_head`; with all keys dq too.
  void run_keys(int64_t b, int64_t kv_head, int64_t begin, int64_t end, bool with_dq, float* memory) const {
    Memory m;
    divide(memory, end - begin, lanes, &m);
    const int64_t group = call.heads / call.kv_heads;
    const bool gathers = group > 1;
    for (int64_t g = 0; g < group; ++g) {
      const Head head(call, b, kv_head * group + g);
      if (with_dq) std::memset(m.dq, 0, static_cast<uint64_t>(tall * lanes) * sizeof(float));
      load_head(head, m, 0, head.Lq);
      const T* k = at_head(static_cast<const T*>(call.k), call.k_at, call, b, kv_head, head.first_k);
      const T* v = at_head(static_cast<const T*>(call.v), call.v_at, call, b, kv_head, head.first_k);
      normalise(head, m, k, 0, head.Lq);
      const int64_t stored = call.cu_k != nullptr ? call.cu_k[b + 1] - head.first_k : call.keys;
      for (int64_t key = begin; key < min_of(end, stored); key += kKeys) {
        const int64_t keys = max_of(0, min_of(kKeys, head.Lk - key)), row = gathers ? key - begin : 0;
        float *const dk = m.dk + row * wide, *const dv = m.dv + row * value_wide;
        if (g == 0) {
          std::memset(dk, 0, static_cast<uint64_t>(kKeys * wide) * sizeof(float));
          std::memset(dv, 0, static_cast<uint64_t>(kKeys * value_wide) * sizeof(float));
        }
        if (keys > 0) {
          load_keys(m, k, v, key, keys);
          if (with_dq) load_keys_along(m, k, key, keys);
          for_panels(head, key, keys, 0, head.Lq, [&](const Panel& panel, int64_t there) FG_LAMBDA {
            tile<Kind>(head, panel, m, key, there, call.softcap > 0.0f ? m.tanhs : nullptr);
            add_to_keys(panel, m, there, dk, dv);
            if (with_dq) add_to_queries(panel, m, there);
          });
        }
        if (g + 1 == group) store_keys(head, b, kv_head, key, min_of(kKeys, stored - key), dk, dv);
      }
      if (with_dq) store_dq(head, m, 0, head.Lq);
    }
  }

  // dq alone, of the queries [begin, end) of one head: begin a multiple of kLanes.
  void run_queries(int64_t b, int64_t h, int64_t begin, int64_t end, float* memory) const {
    const Head head(call, b, h);
    end = min_of(end, head.Lq);
    if (begin >= end) return;
    Memory m;
    divide(memory, 0, round_up(end - begin, kLanes), &m);
    m = from(m, begin);
    std::memset(m.dq + begin * tall, 0,
                static_cast<uint64_t>(tall * round_up(end - begin, W)) * sizeof(float));
    const int64_t kv_head = h / (call.heads / call.kv_heads);
    const T* k = at_head(static_cast<const T*>(call.k), call.k_at, call, b, kv_head, head.first_k);
    const T* v = at_head(static_cast<const T*>(call.v), call.v_at, call, b, kv_head, head.first_k);
    load_head(head, m, begin, end);
    normalise(head, m, k, begin, end);
    const Band all(call, head, begin, end - 1);
    for (int64_t key = all.begin / kKeys * kKeys; key < all.end; key += kKeys) {
      const int64_t keys = min_of(kKeys, head.Lk - key);
      load_keys(m, k, v, key, keys);
      load_keys_along(m, k, key, keys);
      for_panels(head, key, keys, begin, end, [&](const Panel& panel, int64_t there) FG_LAMBDA {
        tile<Kind>(head, panel, m, key, there, call.softcap > 0.0f ? m.tanhs : nullptr);
        add_to_queries(panel, m, there);
      });
    }
    store_dq(head, m, begin, end);
  }

  // body(panel, there) for the panels of the queries [begin, end) that see some of `keys` keys from `key` on,
  // the first `there` of them.
  template <class Body>
  FG_INLINE void for_panels(const Head& head, int64_t key, int64_t keys, int64_t begin, int64_t end,
                            const Body& body) const {
    const Band band = seen_from(head, key, key + keys - 1);
    const int64_t first = max_of(begin, band.begin / kLanes * kLanes);
    for (int64_t t = first; t < min_of(end, band.end); t += kLanes) {
      const Panel panel(t, head.Lq);
      const Band seen(call, head, t, t + panel.count - 1);
      body(panel, min_of(keys, seen.end - key));
    }
  }

  // The products of a tile's p and ds, which `tile` has left in m.
  void add_to_keys(const Panel& panel, const Memory& m, int64_t keys, float* dk, float* dv) const {
    const float *p = kEach == 2 ? m.p_pairs : m.s, *ds = kEach == 2 ? m.ds_pairs : m.dp;
    const int64_t row = panel.lanes / kEach, n = ceil_div(panel.count, kEach), padded = round_up(keys, kRows);
    const int64_t at = panel.t / kEach;
    wide_product<Kind, Start::kAdd>(p, row, 1, m.g_rows + at * value_wide, value_wide, n, dv, value_wide,
                                    padded, value_wide / W);
    wide_product<Kind, Start::kAdd>(ds, row, 1, m.q_rows + at * wide, wide, n, dk, wide, padded, wide / W);
  }
  void add_to_queries(const Panel& panel, const Memory& m, int64_t keys) const {
    const float* ds = kEach == 2 ? m.ds_columns : m.dp;
    with_vecs(panel.vecs, [&](auto vecs) FG_LAMBDA {
      product<Kind, decltype(vecs)::value, Start::kAdd>(m.k_along, 1, tall, ds, panel.lanes,
                                                        round_up(keys, kRows) / kEach, m.dq + panel.t * tall,
                                                        panel.lanes, tall);
    });
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

  void store_dq(const Head& head, const Memory& m, int64_t begin, int64_t end) const {
    T* to = at_head(static_cast<T*>(grads.dq), grads.dq_at, call, head.b, head.h, head.first_q);
    alignas(64) float scales[kLanes];
    for (int i = 0; i < kLanes; ++i) scales[i] = call.scale;
    for (int64_t t = begin; t < end; t += kLanes) {
      const Panel panel(t, head.Lq);
      unpack_columns(m.dq + t * tall, panel.lanes, panel.count, call.width, scales, to + t * grads.dq_at.t,
                     grads.dq_at.t);
    }
  }
};

// Keys and queries of one unit where heads alone are too few for the threads.
constexpr int64_t kKeyStretch = 8 * kKeys, kQueryStretch = 8 * kLanes;

// Whether that is the faster way: a unit's time is 1 / heads of the whole, and seven products are done
// instead of five.
inline bool in_stretches(const Call& call, int num_threads) {
  const int64_t heads = max_of(1, call.batch * call.kv_heads), turns = ceil_div(heads, num_threads);
  return max_of(call.keys, call.queries) > kKeyStretch && 5 * turns * num_threads > 7 * heads;
}

}  // namespace

}  // namespace fg::FG_LEVEL
