// Attention on the CPU: what Python calls. attention.h holds what both directions share, tile.h what they are
// made of.

#include "attention_bwd.h"
#include "attention_dmask.h"
#include "attention_fwd.h"
#include "export.h"

// The parameters that both directions have under the same names.
#define FG_CALL                                                                                            \
  Call {                                                                                                   \
    q, k, v, mask, static_cast<const float*>(slopes), static_cast<const int64_t*>(lengths),                \
        static_cast<const int32_t*>(cu_q), static_cast<const int32_t*>(cu_k),                              \
        static_cast<const int64_t*>(rng), batch, heads, kv_heads, queries, keys, rows, width, value_width, \
        {q_b, q_h, q_t}, {k_b, k_h, k_t}, {v_b, v_h, v_t}, slopes_b, mask_b, mask_h, mask_q, mask_k,       \
        mask_kind, mask_dtype, scale, softcap, left, right, static_cast<uint32_t>(threshold), keep_scale   \
  }

namespace fg::FG_LEVEL {

// out [B, Tq, H, Dv] (packed: [total, H, Dv]) and lse [B, H, Tq] ([H, total]) contiguous; lse natural, -inf
// on rows that see nothing. Strides in elements. pairs: multiply bf16 by the CPU's instruction for pairs.
void attention_fwd(const void* q, const void* k, const void* v, const void* mask, const void* slopes,
                   const void* lengths, const void* cu_q, const void* cu_k, const void* rng, void* out,
                   void* lse, int64_t batch, int64_t heads, int64_t kv_heads, int64_t queries, int64_t keys,
                   int64_t rows, int64_t width, int64_t value_width, int64_t q_b, int64_t q_h, int64_t q_t,
                   int64_t k_b, int64_t k_h, int64_t k_t, int64_t v_b, int64_t v_h, int64_t v_t,
                   int64_t slopes_b, int64_t mask_b, int64_t mask_h, int64_t mask_q, int64_t mask_k,
                   int mask_kind, int mask_dtype, float scale, float softcap, int64_t left, int64_t right,
                   int64_t threshold, float keep_scale, int dtype, bool pairs, int num_threads) {
  const Call call = FG_CALL;
  with_arithmetic(dtype, pairs, [&](auto type, auto kind) {
    using T = typename decltype(type)::type;
    const Forward<T, decltype(kind)> unit(call);
    const int64_t blocks = ceil_div(queries, kPanels * kLanes), per_head = max_of(1, blocks);
    parallel_chunks(batch * heads * per_head, 1, batch * heads * queries * max_of(keys, 1), num_threads,
                    [&](int64_t begin, int64_t) {
                      // The longest first under causality: all heads' last queries.
                      const int64_t block = per_head - 1 - begin / (batch * heads),
                                    at = begin % (batch * heads);
                      const Head head(call, at / heads, at % heads);
                      const int64_t t = block * kPanels * kLanes;
                      if (t >= head.Lq) return;
                      Scratch memory(unit.floats() + 8 * W);
                      unit.run(head, t, static_cast<T*>(out), static_cast<float*>(lse), memory.data);
                    });
  });
}

// Shapes and strides as attention_fwd's; dout, out, dq [B, H, Tq, *], dk, dv [B, Hkv, Tk, *] by strides
// (packed: head and token). dlse may be null; dmask too, else fp32 zeros of the mask's own shape.
void attention_bwd(const void* q, const void* k, const void* v, const void* mask, const void* slopes,
                   const void* lengths, const void* cu_q, const void* cu_k, const void* rng, const void* dout,
                   const void* out, const void* lse, const void* dlse, void* dq, void* dk, void* dv,
                   int64_t batch, int64_t heads, int64_t kv_heads, int64_t queries, int64_t keys,
                   int64_t rows, int64_t width, int64_t value_width, int64_t q_b, int64_t q_h, int64_t q_t,
                   int64_t k_b, int64_t k_h, int64_t k_t, int64_t v_b, int64_t v_h, int64_t v_t,
                   int64_t slopes_b, int64_t dout_b, int64_t dout_h, int64_t dout_t, int64_t out_b,
                   int64_t out_h, int64_t out_t, int64_t dq_b, int64_t dq_h, int64_t dq_t, int64_t dk_b,
                   int64_t dk_h, int64_t dk_t, int64_t dv_b, int64_t dv_h, int64_t dv_t, int64_t mask_b,
                   int64_t mask_h, int64_t mask_q, int64_t mask_k, int mask_kind, int mask_dtype, float scale,
                   float softcap, int64_t left, int64_t right, int64_t threshold, float keep_scale,
                   void* dmask, int64_t dmask_batch, int64_t dmask_heads, int64_t dmask_queries,
                   int64_t dmask_keys, int dtype, bool pairs, int num_threads) {
  const Call call = FG_CALL;
  const Gradients grads{dout,
                        out,
                        {dout_b, dout_h, dout_t},
                        {out_b, out_h, out_t},
                        static_cast<const float*>(lse),
                        static_cast<const float*>(dlse),
                        dq,
                        dk,
                        dv,
                        {dq_b, dq_h, dq_t},
                        {dk_b, dk_h, dk_t},
                        {dv_b, dv_h, dv_t}};
  with_arithmetic(dtype, pairs, [&](auto type, auto kind) {
    using T = typename decltype(type)::type;
    using U = Backward<T, decltype(kind)>;
    const U unit(call, grads);
    const int64_t work = batch * heads * max_of(queries, 1) * max_of(keys, 1);
    const bool stretched = in_stretches(call, num_threads);
    const int64_t stretch = stretched ? kKeyStretch : max_of(kKeys, round_up(keys, kKeys));
    const int64_t cuts = max_of(1, ceil_div(keys, stretch));
    parallel_chunks(batch * kv_heads * cuts, 1, work, num_threads, [&](int64_t item, int64_t) {
      const int64_t begin = item % cuts * stretch, b = item / cuts / kv_heads,
                    kv_head = item / cuts % kv_heads;
      typename U::Memory m;
      Scratch memory(unit.divide(nullptr, stretch, unit.lanes, &m) + 16);
      unit.run_keys(b, kv_head, begin, begin + stretch, !stretched, memory.data);
    });
    const int64_t parts = stretched ? ceil_div(queries, kQueryStretch) : 0;
    parallel_chunks(batch * heads * parts, 1, work, num_threads, [&](int64_t item, int64_t) {
      const int64_t begin = item % parts * kQueryStretch, b = item / parts / heads, h = item / parts % heads;
      typename U::Memory m;
      Scratch memory(unit.divide(nullptr, 0, kQueryStretch, &m) + 16);
      unit.run_queries(b, h, begin, begin + kQueryStretch, memory.data);
    });
    if (dmask == nullptr) return;
    const MaskGradient mask_gradient{static_cast<float*>(dmask), dmask_batch, dmask_heads, dmask_queries,
                                     dmask_keys};
    const int64_t pieces = dmask_queries > 1 ? unit.panels : 1;
    parallel_chunks(dmask_batch * dmask_heads * pieces, 1, work, num_threads, [&](int64_t item, int64_t) {
      const int64_t head = item / pieces, begin = item % pieces * kLanes;
      typename U::Memory m;
      Scratch memory(unit.divide(nullptr, 0, unit.lanes, &m) + 16);
      unit.divide(memory.data, 0, unit.lanes, &m);
      mask_gradient.add(call, unit, m, head / dmask_heads, head % dmask_heads, begin,
                        pieces > 1 ? begin + kLanes : queries);
    });
  });
}

}  // namespace fg::FG_LEVEL

FG_EXPORTS(attention, FG_EXPORT(attention_fwd), FG_EXPORT(attention_bwd))
