// A whole step of decoding with a stack of GPT-2 blocks in one call: for each of a few sequences the next
// token's logits. Every weight is streamed once; nothing else is larger than the caches but the keys and
// values.
//
//   x = scale * wte[token] + wpe[position]
//   x += proj(attention(qkv(layer_norm(x)), cache));  x += out(gelu(fc(layer_norm(x))))      for each layer
//   logits = head(layer_norm(x))
//
// Activations and sums are fp32; where pair_rows.h has a way, activations meet weights with 16 bits. All
// threads walk through the layers together and meet at a barrier after each product; a product's outputs are
// shared out among them, and each output is summed in one order, so that results do not depend on their
// number.

#include <omp.h>

#include "attention_few.h"
#include "export.h"
#include "gemm.h"
#include "math.h"
#include "norm_rows.h"
#include "product.h"

namespace fg::FG_LEVEL {
namespace {

constexpr int kInt8 = 3;  // beside enum Dtype

struct Block {
  const float *ln1_weight, *ln1_bias;
  Layer qkv, proj;
  const float *ln2_weight, *ln2_bias;
  Layer fc, out;
};
static_assert(sizeof(Block) == 16 * sizeof(void*), "the launcher hands over a table of addresses");

struct Model {
  const Block* blocks;
  const void* tokens_weight;
  const float *tokens_scale, *positions_weight;
  float embedding_scale;
  const float *ln_weight, *ln_bias;
  Layer head;
  int64_t layers, dim, heads, hidden, vocabulary;
  float eps;
  int approximate;
};

struct State {
  // Of each sequence: the new token, how many are in its cache, and which row of the cache is its own.
  const int64_t *tokens, *positions, *cache_rows;
  void *keys, *values;  // [layers, all_rows, heads, length, dim / heads]
  float* logits;        // [batch, vocabulary]
  int64_t batch, all_rows, length;
};

// What the threads share: rows of one width for each sequence.
struct Rows {
  float *x, *qkv, *attended, *hidden;
};

template <class T, class C>
class Step {
 public:
  Step(const Model& m, const State& s, const Rows& rows, int thread, int threads)
      : m_(m),
        s_(s),
        rows_(rows),
        thread_(thread),
        threads_(threads),
        normed_(s.batch * m.dim),
        stats_(2 * s.batch),
        product_(s.batch, max_of(m.dim, m.hidden)),
        scores_(s.length + 2 * W),
        query_(4 * padded(m.dim / m.heads)) {}

  void run() {
    embed();
    meet();
    for (int64_t l = 0; l < m_.layers; ++l) {
      const Block& block = m_.blocks[l];
      norm(block.ln1_weight, block.ln1_bias);
      product(normed_.data, m_.dim, block.qkv, 3 * m_.dim,
              [&](int64_t b, int64_t j, F v, auto lanes)
                  FG_LAMBDA { store(rows_.qkv + b * 3 * m_.dim + j, v, lanes); });
      meet();
      for (int64_t unit = thread_; unit < s_.batch * m_.heads; unit += threads_) {
        attend(l, unit / m_.heads, unit % m_.heads);
      }
      meet();
      add_product_of(rows_.attended, m_.dim, block.proj);
      meet();
      norm(block.ln2_weight, block.ln2_bias);
      product(normed_.data, m_.dim, block.fc, m_.hidden,
              [&](int64_t b, int64_t j, F v, auto lanes)
                  FG_LAMBDA { store(rows_.hidden + b * m_.hidden + j, activated(v), lanes); });
      meet();
      add_product_of(rows_.hidden, m_.hidden, block.out);
      meet();
    }
    norm(m_.ln_weight, m_.ln_bias);
    product(normed_.data, m_.dim, m_.head, m_.vocabulary,
            [&](int64_t b, int64_t j, F v, auto lanes)
                FG_LAMBDA { store(s_.logits + b * m_.vocabulary + j, v, lanes); });
  }

 private:
  void meet() const {
    if (threads_ > 1) {
#pragma omp barrier
    }
  }

  // This thread's stretch of n outputs.
  int64_t begin(int64_t n) const { return n * thread_ / threads_; }
  int64_t end(int64_t n) const { return n * (thread_ + 1) / threads_; }

  void embed() const {
    if (thread_ != 0) return;
    for (int64_t b = 0; b < s_.batch; ++b) {
      const T* token = static_cast<const T*>(m_.tokens_weight) + s_.tokens[b] * m_.dim;
      const float* place = m_.positions_weight + s_.positions[b] * m_.dim;
      const F scale =
          set(m_.embedding_scale * (m_.tokens_scale != nullptr ? m_.tokens_scale[s_.tokens[b]] : 1.0f));
      for_lanes<1>(m_.dim, [&](int64_t j, int, auto lanes) FG_LAMBDA {
        store(rows_.x + b * m_.dim + j, fma(load(token + j, lanes), scale, load(place + j, lanes)), lanes);
      });
    }
  }

  void norm(const float* w, const float* b) {
    forward_rows<float, float, true, false>({rows_.x, nullptr, w, b, normed_.data, nullptr, stats_.data,
                                             stats_.data + s_.batch, s_.batch, m_.dim, m_.dim, 0, m_.eps},
                                            0, s_.batch);
  }

  // emit(b, j, values, lanes) of x W^T + bias for all rows b of x and this thread's outputs j.
  template <class Emit>
  void product(const float* x, int64_t k, const Layer& layer, int64_t n, const Emit& emit) {
    product_.take(x, s_.batch, k);
    product_.outputs(layer, begin(n), end(n), emit);
  }

  void add_product_of(const float* x, int64_t k, const Layer& layer) {
    product(x, k, layer, m_.dim, [&](int64_t b, int64_t j, F v, auto lanes) FG_LAMBDA {
      float* to = rows_.x + b * m_.dim + j;
      store(to, load(to, lanes) + v, lanes);
    });
  }

  F activated(F z) const { return m_.approximate == kTanh ? gelu<kTanh>(z) : gelu<kErf>(z); }

  // One head of one sequence: its key and value into the cache, then softmax(q k^T / sqrt(width)) v over all
  // of them.
  void attend(int64_t layer, int64_t b, int64_t head) {
    const int64_t width = m_.dim / m_.heads, keys = s_.positions[b] + 1, padded_width = padded(width);
    const int64_t at = ((layer * s_.all_rows + s_.cache_rows[b]) * m_.heads + head) * s_.length * width;
    C *k = static_cast<C*>(s_.keys) + at, *v = static_cast<C*>(s_.values) + at;
    const float* qkv = rows_.qkv + b * 3 * m_.dim + head * width;
    float *q = query_.data, *acc = query_.data + padded_width;
    for (int64_t j = 0; j < padded_width; ++j) q[j] = acc[j] = 0.0f;
    const F scale = set(1.0f / __builtin_sqrtf(static_cast<float>(width)));
    for_lanes<1>(width, [&](int64_t j, int, auto lanes) FG_LAMBDA {
      store(q + j, load(qkv + j, lanes) * scale, lanes);
      store(k + (keys - 1) * width + j, load(qkv + m_.dim + j, lanes), lanes);
      store(v + (keys - 1) * width + j, load(qkv + 2 * m_.dim + j, lanes), lanes);
    });
    float* scores = scores_.data;
    few_scores(q, padded_width, 1, k, width, keys, ceil_div(keys, W) * W, width, scores, 1);
    F best = set(-__builtin_inff());
    for_lanes<1>(keys, [&](int64_t j, int, auto lanes) FG_LAMBDA {
      best = vmax(keep(load(scores + j, lanes), lanes, set(-__builtin_inff())), best);
    });
    const F minus_top = set(-hmax(best));
    const float sum = sum_lanes(keys, [&](int64_t j, auto lanes) FG_LAMBDA {
      const F p = exp_nonpositive(load(scores + j, lanes) + minus_top);
      store(scores + j, p, lanes);
      return keep(p, lanes, set(0.0f));
    });
    const float factor = 1.0f;
    few_values(scores, 1, 1, v, width, keys, width, &factor, acc, padded_width);
    const F inverse = set(1.0f / sum);
    float* out = rows_.attended + b * m_.dim + head * width;
    for_lanes<1>(width, [&](int64_t j, int, auto lanes)
                            FG_LAMBDA { store(out + j, load(acc + j, lanes) * inverse, lanes); });
  }

  const Model& m_;
  const State& s_;
  const Rows& rows_;
  int64_t thread_, threads_;
  Scratch normed_, stats_;
  Product<T> product_;
  Scratch scores_, query_;
};

template <class T, class C>
void run_step(const Model& m, const State& s, int num_threads) {
  Scratch shared(s.batch * (5 * m.dim + m.hidden));
  const Rows rows{shared.data, shared.data + s.batch * m.dim, shared.data + s.batch * 4 * m.dim,
                  shared.data + s.batch * 5 * m.dim};
  const int threads = in_forked_child ? 1 : num_threads;
  if (threads <= 1) {
    Step<T, C>(m, s, rows, 0, 1).run();
    return;
  }
#pragma omp parallel num_threads(threads)
  Step<T, C>(m, s, rows, omp_get_thread_num(), omp_get_num_threads()).run();
}

}  // namespace

// blocks: 16 addresses for each layer, in the order of `Block`. weights: the dtype of all products' and the
// token embedding's weights, or 3 for int8 with scales; everything else that is not a cache is fp32.
// cache_rows: none twice, or threads would write to one.
void decode_step(const int64_t* tokens, const int64_t* positions, const int64_t* cache_rows,
                 const void* blocks, const void* tokens_weight, const float* tokens_scale,
                 const float* positions_weight, double embedding_scale, const float* ln_weight,
                 const float* ln_bias, const void* head, const float* head_scale, void* keys, void* values,
                 float* logits, int64_t batch, int64_t all_rows, int64_t length, int64_t layers, int64_t dim,
                 int64_t heads, int64_t hidden, int64_t vocabulary, double eps, int approximate, int weights,
                 int cache, int num_threads) {
  const Model m{static_cast<const Block*>(blocks),
                tokens_weight,
                tokens_scale,
                positions_weight,
                static_cast<float>(embedding_scale),
                ln_weight,
                ln_bias,
                {head, head_scale, nullptr},
                layers,
                dim,
                heads,
                hidden,
                vocabulary,
                static_cast<float>(eps),
                approximate};
  const State s{tokens, positions, cache_rows, keys, values, logits, batch, all_rows, length};
  const auto with_cache = [&](auto type) {
    using T = typename decltype(type)::type;
    if (cache == BF16) return run_step<T, bf16>(m, s, num_threads);
    run_step<T, float>(m, s, num_threads);
  };
  if (weights == kInt8) return with_cache(Type<i8>{});
  if (weights == BF16) return with_cache(Type<bf16>{});
  with_cache(Type<float>{});
}

// y [rows, n] = act(x W^T + bias), all but W fp32; W [n, k] int8 with a scale for each row; bias may be null.
// A row's results are those of a step of decoding.
void int8_linear(const float* x, const void* weight, const float* scale, const float* bias, float* y,
                 int64_t rows, int64_t k, int64_t n, int activation, int num_threads) {
  const Layer layer{weight, scale, bias};
  // Rows that stay in the second cache while W passes over them; where those are few, parts of W are shared
  // out.
  const int64_t block = min_of(64, max_of(1, rows)), blocks = ceil_div(rows, block);
  const int64_t parts = blocks < 2 * num_threads ? min_of(max_of(1, num_threads), ceil_div(n, 64)) : 1;
  parallel_chunks(blocks * parts, 1, rows * n * k, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit / parts * block, part = unit % parts;
      Product<i8> product(block, k);
      product.take(x + first * k, min_of(block, rows - first), k);
      product.outputs(layer, n * part / parts, n * (part + 1) / parts,
                      [&](int64_t r, int64_t j, F v, auto lanes) FG_LAMBDA {
                        store(y + (first + r) * n + j, activated<float>(v, activation), lanes);
                      });
    }
  });
}

}  // namespace fg::FG_LEVEL

FG_EXPORTS(decode, FG_EXPORT(decode_step), FG_EXPORT(int8_linear))
