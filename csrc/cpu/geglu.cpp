// Gated linear units (Shazeer, arXiv:2002.05202): y = act(gate) * up and both gradients, act being GELU (erf
// or tanh) or SiLU. The product is rounded once. Rows may lie further apart than their length: gate and up
// are often the halves of one projection's rows.

#include "export.h"
#include "math.h"
#include "parallel.h"
#include "stream.h"

namespace fg::FG_LEVEL {
namespace {

enum Activation : int { kGelu = kErf, kGeluTanh = kTanh, kSilu = 2 };

template <class V>
struct Unit {
  V value, slope;  // act(z), its derivative
};

// silu(z) = z * sigmoid(z). As in math.h the smaller of sigmoid(z) and 1 - sigmoid(z), `tail`, is found
// directly: the negative tail stays relatively accurate. exp(-110) is 0, so that huge z stay finite; -inf
// gives NaN as in PyTorch (-inf * 0).
FG_INLINE Unit<F> silu(F z) {
  const F minus_a = negative_limited(z, 110.0f);
  const F e = exp_nonpositive(minus_a);
  const F tail = e * reciprocal(e + set(1.0f));
  const F sigmoid = select(z < set(0.0f), tail, set(1.0f) - tail);
  return {fma(vmin(minus_a, z), tail, vmax(set(0.0f), z)), fma(z, fnma(tail, tail, tail), sigmoid)};
}

template <class T, int A>
FG_INLINE F activate(F z) {
  if constexpr (A == kSilu) {
    return silu(z).value;
  } else {
    return gelu_for<T, A>(z);
  }
}

template <class T, int A>
FG_INLINE Unit<F> activate_with_slope(F z) {
  if constexpr (A == kSilu) {
    return silu(z);
  } else {
    return {gelu_for<T, A>(z), gelu_slope_for<T, A>(z)};  // what they share is computed once
  }
}

template <class T, int A>
FG_INLINE Unit<F2> activate_with_slope(F2 z) {
  const Unit<F> even = activate_with_slope<T, A>(z.even), odd = activate_with_slope<T, A>(z.odd);
  return {{even.value, odd.value}, {even.slope, odd.slope}};
}

// One row of an input, and how far ahead of it to prefetch: where the hardware's own prefetching stops, at a
// page's end or half of it, or where rows are short and lie apart, the same columns of a later row.
template <class T>
struct Row {
  const T* at;
  int64_t ahead;

  Row(const void* x, int64_t i, int64_t stride, int64_t n)
      : at(static_cast<const T*>(x) + i * stride),
        ahead(n >= 4 * kAhead ? kAhead : ceil_div(kAhead, n) * stride) {}

  template <class Lanes>
  FG_INLINE auto load_ahead(int64_t j, int u, Lanes lanes) const {
    // Once for each cache line of a group.
    if (__is_base_of(Twice, Lanes) || u * W * sizeof(T) % 64 == 0) prefetch(at + j + ahead);
    return load(at + j, lanes);
  }

 private:
  static constexpr int64_t kAhead = 1024;
};

template <class T, int A>
void forward_range(Row<T> gate, Row<T> up, T* y, int64_t count, bool streaming) {
  const auto unit = [](F gate, F up) FG_LAMBDA { return activate<T, A>(gate) * up; };
  for_lanes_out<2, kTwice<T>>(y, count, streaming, [&](int64_t j, int u, auto lanes) FG_LAMBDA {
    put(y + j, each(unit, gate.load_ahead(j, u, lanes), up.load_ahead(j, u, lanes)), lanes);
  });
}

// dgate and dup: null where not needed; streamed only where the two are aligned alike.
template <class T, int A>
void backward_range(Row<T> dy, Row<T> gate, Row<T> up, T* dgate, T* dup, int64_t count, bool streaming) {
  const uintptr_t apart = reinterpret_cast<uintptr_t>(dgate) - reinterpret_cast<uintptr_t>(dup);
  const bool alike = dgate == nullptr || dup == nullptr || apart % 64 == 0;
  for_lanes_out<2, kTwice<T>>(dgate != nullptr ? dgate : dup, count, streaming && alike,
                              [&](int64_t j, int u, auto lanes) FG_LAMBDA {
                                const auto unit = activate_with_slope<T, A>(gate.load_ahead(j, u, lanes));
                                const auto d = dy.load_ahead(j, u, lanes);
                                if (dgate != nullptr) {
                                  put(dgate + j, d * up.load_ahead(j, u, lanes) * unit.slope, lanes);
                                }
                                if (dup != nullptr) put(dup + j, d * unit.value, lanes);
                              });
}

template <class Body>
void with_kind(int dtype, int activation, const Body& body) {
  with_dtype(dtype, [&](auto type) {
    if (activation == kGelu) {
      body(type, Constant<kGelu>{});
    } else if (activation == kGeluTanh) {
      body(type, Constant<kGeluTanh>{});
    } else {
      body(type, Constant<kSilu>{});
    }
  });
}

// Where every row begins at the end of the one before, rows mean nothing: pieces of this many elements, of
// which the last may be shorter.
constexpr int64_t kPiece = 16 * 1024;

// body(row, its length, whether its outputs of together `bytes` are to be streamed).
template <class Body>
void for_rows(int64_t total, int64_t n, int64_t bytes, int num_threads, const Body& body) {
  const int64_t rows = ceil_div(total, n);
  parallel_chunks(rows, rows_per_chunk(rows, n, num_threads), total, num_threads,
                  [&](int64_t begin, int64_t end) {
                    const Streaming streaming(bytes);
                    for (int64_t i = begin; i < end; ++i) body(i, min_of(n, total - i * n), streaming.on);
                  });
}

}  // namespace

// total elements in rows of n; y is contiguous, a row of the inputs begins `stride` elements after the one
// before.
void geglu_fwd(const void* gate, const void* up, void* y, int64_t total, int64_t n, int64_t gate_stride,
               int64_t up_stride, int dtype, int activation, int num_threads) {
  if (total == 0) return;
  if (gate_stride == n && up_stride == n) gate_stride = up_stride = n = min_of(total, kPiece);
  with_kind(dtype, activation, [&](auto type, auto kind) {
    using T = typename decltype(type)::type;
    for_rows(total, n, total * sizeof(T), num_threads, [&](int64_t i, int64_t count, bool streaming) {
      forward_range<T, decltype(kind)::value>({gate, i, gate_stride, n}, {up, i, up_stride, n},
                                              static_cast<T*>(y) + i * n, count, streaming);
    });
  });
}

// dgate, dup: contiguous, or null where not needed.
void geglu_bwd(const void* dy, const void* gate, const void* up, void* dgate, void* dup, int64_t total,
               int64_t n, int64_t dy_stride, int64_t gate_stride, int64_t up_stride, int dtype,
               int activation, int num_threads) {
  if (total == 0) return;
  if (dy_stride == n && gate_stride == n && up_stride == n) {
    dy_stride = gate_stride = up_stride = n = min_of(total, kPiece);
  }
  with_kind(dtype, activation, [&](auto type, auto kind) {
    using T = typename decltype(type)::type;
    for_rows(total, n, 2 * total * sizeof(T), num_threads, [&](int64_t i, int64_t count, bool streaming) {
      backward_range<T, decltype(kind)::value>(
          {dy, i, dy_stride, n}, {gate, i, gate_stride, n}, {up, i, up_stride, n},
          dgate != nullptr ? static_cast<T*>(dgate) + i * n : nullptr,
          dup != nullptr ? static_cast<T*>(dup) + i * n : nullptr, count, streaming);
    });
  });
}

}  // namespace fg::FG_LEVEL

FG_EXPORTS(geglu, FG_EXPORT(geglu_fwd), FG_EXPORT(geglu_bwd))
