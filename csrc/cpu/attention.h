// What the attention kernels share: the description of a call, which keys a query sees, and what an option
// does to a tile of scores. A tile holds kKeys keys by the queries of one panel, [key][query]: softmax then
// runs down columns, and every query has a lane of its own from the first product to the last.
#pragma once

#include "math.h"
#include "philox.h"
#include "tile.h"

namespace fg::FG_LEVEL {

constexpr int64_t kKeys = 64;  // of one tile; a multiple of kRows and of W
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

FG_INLINE F infinite() { return set(__builtin_inff()); }
FG_INLINE M is_hidden(F s) { return s < set(-3.40282347e38f); }  // -inf; a NaN is not

enum MaskKind : int { kNoMask = 0, kBoolMask = 1, kFloatMask = 2 };

struct Strides {  // in elements: sequence (or 0), head, token
  int64_t b, h, t;
};

struct Call {
  const void *q, *k, *v, *mask;
  const float* slopes;                            // of ALiBi, or null
  const int64_t* lengths;                         // of the keys, or null
  const int32_t *cu_q, *cu_k;                     // where packed documents begin, or null
  const int64_t* rng;                             // (seed, offset)
  int64_t batch, heads, kv_heads, queries, keys;  // of the longest sequence
  int64_t rows;                                   // of out and lse in one head
  int64_t width, value_width;
  Strides q_at, k_at, v_at;
  int64_t slopes_b, mask_b, mask_h, mask_q, mask_k;
  int mask_kind, mask_dtype;
  float scale, softcap;
  int64_t left, right;  // -1: no limit
  uint32_t threshold;   // of dropout; 0: none
  float keep_scale;

  // Only band and lengths: the scores stay the bare products, scaled on the way into the exponential.
  bool plain() const { return scale > 0.0f && softcap == 0.0f && slopes == nullptr && mask_kind == kNoMask; }
};

// One sequence (a sample, or a packed document) and head.
struct Head {
  int64_t Lq, Lk, shift;     // query t stands at key t + shift
  int64_t first_q, first_k;  // rows of packed tensors
  int64_t b, h;
  float slope;
  const char* mask;      // at [b, h, 0, 0]
  uint64_t seed, index;  // dropout's of [b, h, 0, 0]

  Head(const Call& call, int64_t b, int64_t h)
      : Lq(call.queries),
        Lk(call.keys),
        first_q(0),
        first_k(0),
        b(b),
        h(h),
        slope(0.0f),
        mask(nullptr),
        seed(0),
        index(0) {
    if (call.cu_q != nullptr) {
      first_q = call.cu_q[b];
      first_k = call.cu_k[b];
      Lq = call.cu_q[b + 1] - first_q;
      Lk = call.cu_k[b + 1] - first_k;
    }
    if (call.lengths != nullptr) Lk = max_of(0, min_of(Lk, call.lengths[b]));
    shift = Lk - Lq;
    if (call.slopes != nullptr) slope = call.slopes[b * call.slopes_b + h];
    if (call.mask_kind != kNoMask) {
      const int64_t size = call.mask_kind == kBoolMask ? 1 : call.mask_dtype == F32 ? 4 : 2;
      mask = static_cast<const char*>(call.mask) + (b * call.mask_b + h * call.mask_h) * size;
    }
    if (call.threshold != 0) {
      seed = static_cast<uint64_t>(call.rng[0]);
      index = static_cast<uint64_t>(call.rng[1]) +
              static_cast<uint64_t>((b * call.heads + h) * call.queries * call.keys);
    }
  }
};

// The row of head h of sequence b that token `first` of it is, in a tensor of these strides.
template <class T>
FG_INLINE T* at_head(T* p, const Strides& at, const Call& call, int64_t b, int64_t h, int64_t first) {
  return p + h * at.h + (call.cu_q != nullptr ? first * at.t : b * at.b);
}

// Queries t … t + count of one head; `lanes` is count rounded up to vectors.
struct Panel {
  int64_t t, count, vecs, lanes;
  Panel(int64_t t, int64_t end)
      : t(t), count(min_of(kLanes, end - t)), vecs(ceil_div(count, W)), lanes(vecs * W) {}
};

// The keys [begin, end) that the queries first … last see some of, and whether a tile is seen whole.
struct Band {
  int64_t begin, end;
  Band(const Call& call, const Head& head, int64_t first, int64_t last) : begin(0), end(head.Lk) {
    if (call.left >= 0) begin = min_of(max_of(0, first + head.shift - call.left), head.Lk);
    if (call.right >= 0) end = max_of(begin, min_of(head.Lk, last + head.shift + call.right + 1));
  }
};

// Of a row without a finite score: whether it sees keys, so that arithmetic made the -inf, and the result is
// NaN. Where there is a mask, it is taken to be the mask's.
inline bool all_lost(const Call& call, const Head& head, int64_t t) {
  const Band band(call, head, t, t);
  return call.mask_kind == kNoMask && band.begin < band.end;
}

FG_INLINE bool sees_whole(const Call& call, const Head& head, const Panel& panel, int64_t key, int64_t keys) {
  const int64_t first = panel.t + head.shift, last = first + panel.count - 1;
  return keys % kRows == 0 && panel.count == panel.lanes && (call.left < 0 || key >= last - call.left) &&
         (call.right < 0 || key + keys - 1 <= first + call.right);
}

// Scores outside the band, and of keys and queries that do not exist, become -inf: a NaN of one of those must
// not be multiplied by anything, not even zero.
inline void hide(const Call& call, const Head& head, const Panel& panel, int64_t key, int64_t keys,
                 float* s) {
  const int64_t padded = round_up(keys, kRows);
  for (int64_t j = 0; j < padded; ++j) {
    int64_t begin = 0, end = panel.count;  // lanes that see the key
    if (j >= keys) end = 0;
    const int64_t ahead = key + j - head.shift - panel.t;
    if (call.right >= 0) begin = max_of(begin, ahead - call.right);
    if (call.left >= 0) end = min_of(end, ahead + call.left + 1);
    if (begin <= 0 && end >= panel.lanes) continue;
    for (int64_t u = 0; u < panel.vecs; ++u) {
      const int before = static_cast<int>(min_of(W, max_of(0, begin - u * W)));
      const int until = static_cast<int>(min_of(W, max_of(0, end - u * W)));
      float* at = s + j * panel.lanes + u * W;
      const F inside = select(first_lanes(until), load(at, Full{}), set(0.0f) - infinite());
      store(at, select(first_lanes(before), set(0.0f) - infinite(), inside), Full{});
    }
  }
}

// The mask of a tile as numbers to add, [key][query]: 0 or -inf for a boolean one.
template <class T>
inline void load_mask_as(const Call& call, const Head& head, const Panel& panel, int64_t key, int64_t keys,
                         float* to) {
  const T* from = reinterpret_cast<const T*>(head.mask) + panel.t * call.mask_q + key * call.mask_k;
  const auto number = [](T x) FG_LAMBDA {
    if constexpr (sizeof(T) == 1) {
      return x ? 0.0f : -__builtin_inff();
    } else {
      return to_float(x);
    }
  };
  const int64_t padded = round_up(keys, kRows);
  for (int64_t j = keys; j < padded; ++j) {
    for (int64_t r = 0; r < panel.lanes; ++r) to[j * panel.lanes + r] = 0.0f;
  }
  if (call.mask_q == 0) {
    for (int64_t j = 0; j < keys; ++j) {
      const F x = set(number(from[j * call.mask_k]));
      for (int64_t u = 0; u < panel.vecs; ++u) store(to + j * panel.lanes + u * W, x, Full{});
    }
    return;
  }
  for (int64_t r = 0; r < panel.lanes; r += W) {
    const int64_t rows = min_of(W, panel.count - r);
    int64_t j = 0;
    if (call.mask_k == 1) {
      for (; j + W <= keys; j += W) {
        F block[W];
        for (int i = 0; i < W; ++i) {
          if (i >= rows) {
            block[i] = set(0.0f);
            continue;
          }
          const T* p = from + (r + i) * call.mask_q + j;
          if constexpr (sizeof(T) == 1) {
            block[i] = select(load_bool(p, Full{}), set(0.0f), set(0.0f) - infinite());
          } else {
            block[i] = load(p, Full{});
          }
        }
        transpose(block);
        for (int i = 0; i < W; ++i) store(to + (j + i) * panel.lanes + r, block[i], Full{});
      }
    }
    for (; j < keys; ++j) {
      for (int i = 0; i < W; ++i) {
        to[j * panel.lanes + r + i] = i < rows ? number(from[(r + i) * call.mask_q + j * call.mask_k]) : 0.0f;
      }
    }
  }
}

inline void load_mask(const Call& call, const Head& head, const Panel& panel, int64_t key, int64_t keys,
                      float* to) {
  if (call.mask_kind == kBoolMask) return load_mask_as<uint8_t>(call, head, panel, key, keys, to);
  with_dtype(call.mask_dtype, [&](auto type) {
    load_mask_as<typename decltype(type)::type>(call, head, panel, key, keys, to);
  });
}

// Right to a few units in the last place near zero too, where 1 - 2 / (exp(2x) + 1) is not.
FG_INLINE F tanh(F x) {
  const F z = x * x;
  F near = fma(set(-5.70498872745e-3f), z, set(2.06390887954e-2f));
  near = fma(near, z, set(-5.37397155531e-2f));
  near = fma(near, z, set(1.33314422036e-1f));
  near = fma(x * z, fma(near, z, set(-3.33332819422e-1f)), x);
  const F size = vabs(x), e = exp2_nonpositive(size * set(-2.0f * kLog2E));
  const F far = (set(1.0f) - e) * reciprocal(set(1.0f) + e);
  return select(size < set(0.625f), near, select(x < set(0.0f), -far, far));
}

// What is not `plain`: s = softcap * tanh(scale * s / softcap) - slope * |distance| + mask, in place.
// `tanhs`, if not null, keeps the hyperbolic tangents for backward. `bias`: room for a tile.
inline void shape_scores(const Call& call, const Head& head, const Panel& panel, int64_t key, int64_t keys,
                         float* s, float* bias, float* tanhs) {
  if (call.mask_kind != kNoMask) load_mask(call, head, panel, key, keys, bias);
  alignas(64) float counts[kLanes];
  for (int i = 0; i < kLanes; ++i) counts[i] = static_cast<float>(i);
  const bool capped = call.softcap > 0.0f;
  const F scale = set(capped ? call.scale / call.softcap : call.scale), cap = set(call.softcap),
          slope = set(head.slope);
  const F never = set(0.0f) - infinite();
  const int64_t padded = round_up(keys, kRows);
  for (int64_t j = 0; j < padded; ++j) {
    const F ahead = set(static_cast<float>(key + j - head.shift - panel.t));
    for (int64_t u = 0; u < panel.vecs; ++u) {
      const int64_t at = j * panel.lanes + u * W;
      F x = load(s + at, Full{}) * scale;
      if (capped) {
        x = tanh(x);
        if (tanhs != nullptr) store(tanhs + at, x, Full{});
        x = x * cap;
      }
      if (call.slopes != nullptr) x = fnma(slope, vabs(ahead - load(counts + u * W, Full{})), x);
      if (call.mask_kind != kNoMask) {
        const F added = load(bias + at, Full{});
        x = select(never < added, x + added, never);  // hidden by -inf, and by NaN as by definition
      }
      store(s + at, x, Full{});
    }
  }
}

// e^(score - base) for scores that are plain, in units of 1 / scale (base too), or not.
template <bool Plain>
struct Exponential {
  F unit;
  explicit Exponential(const Call& call) : unit(set(Plain ? call.scale * kLog2E : kLog2E)) {}
  FG_INLINE F operator()(F s, F base, F base_in_units) const {
    if constexpr (Plain) return exp2_nonpositive(fma(s, unit, -base_in_units));
    return exp2_nonpositive((s - base) * unit);  // the difference first: masks of -3e38 would overflow
  }
};

// x where dropout keeps the element of key `key` in the W lanes from query t on, else 0.
FG_INLINE F kept(const Call& call, const Head& head, int64_t t, int64_t key, F x) {
  alignas(64) uint32_t words[W];
  philox(head.seed, head.index + static_cast<uint64_t>(t * call.keys + key), words,
         static_cast<uint64_t>(call.keys));
  return select(at_least(words, call.threshold), x, set(0.0f));
}

// body(Type<T>{}, Kind{}): bf16 as pairs where the level has the instruction and `pairs` asks for it, else as
// floats.
template <class Body>
inline void with_arithmetic(int dtype, [[maybe_unused]] bool pairs, const Body& body) {
  with_dtype(dtype, [&](auto type) {
#if FG_BF16_PAIRS
    if constexpr (sizeof(typename decltype(type)::type) == 2) {
      if (pairs && dtype == BF16) return body(Type<bf16>{}, Pairs{});
    }
#endif
    body(type, Floats{});
  });
}

}  // namespace fg::FG_LEVEL
