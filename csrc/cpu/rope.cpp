// Rotary position embedding of q and k.
//
//   y1 = x1 * cos - x2 * sin,  y2 = x2 * cos + x1 * sin
//
// x1, x2: the halves of the first 2 * half features, or interleaved its even and odd ones. The rest is
// copied. A position's heads are done together: its cos and sin are widened once, and its output is one
// stretch.

#include <cstring>

#include "export.h"
#include "parallel.h"
#include "stream.h"
#include "vec.h"

namespace fg::FG_LEVEL {
namespace {

// x [B, H, T, D] by strides in elements, its features adjacent; y [B, T, H, D] contiguous.
struct Side {
  const void* x;
  void* y;
  int64_t heads, batch_stride, head_stride, position_stride;
};

// Neighbouring lanes in each other's place.
FG_INLINE F swap_pairs(F a) {
#if defined(__AVX512F__)
  return {_mm512_permute_ps(a.v, 0xb1)};
#elif defined(__AVX2__)
  return {_mm256_permute_ps(a.v, 0xb1)};
#else
  return {F4{a.v[1], a.v[0], a.v[3], a.v[2]}};
#endif
}

template <class T>
void rotate_halves(const T* x, T* y, const float* cos, const float* sin, int64_t half, bool streaming) {
  const bool alike = half * static_cast<int64_t>(sizeof(T)) % 64 == 0;  // both halves begin with a cache line
  for_lanes_out<2, kTwice<T>>(y, half, streaming && alike, [&](int64_t j, int, auto lanes) FG_LAMBDA {
    const auto x1 = load(x + j, lanes), x2 = load(x + half + j, lanes);
    const auto c = load(cos + j, lanes), s = load(sin + j, lanes);
    put(y + j, x1 * c - x2 * s, lanes);
    put(y + half + j, x1 * s + x2 * c, lanes);
  });
}

// cos and sin of every feature here, sin with the sign that its product is added with.
template <class T>
void rotate_pairs(const T* x, T* y, const float* cos, const float* sin, int64_t half, bool streaming) {
  // No vector may begin within a pair.
  const bool whole = reinterpret_cast<uintptr_t>(y) % (2 * sizeof(T)) == 0;
  for_lanes_out<2>(y, 2 * half, streaming && whole, [&](int64_t j, int, auto lanes) FG_LAMBDA {
    const F a = load(x + j, lanes);
    put(y + j, fma(swap_pairs(a), load(sin + j, lanes), a * load(cos + j, lanes)), lanes);
  });
}

template <class T, bool Interleaved>
void rotate_position(const Side& side, int64_t b, int64_t t, int64_t length, int64_t width, const float* cos,
                     const float* sin, int64_t half, bool streaming) {
  if (side.x == nullptr) return;
  const T* x = static_cast<const T*>(side.x) + b * side.batch_stride + t * side.position_stride;
  T* y = static_cast<T*>(side.y) + (b * length + t) * side.heads * width;
  for (int64_t h = 0; h < side.heads; ++h, x += side.head_stride, y += width) {
    if constexpr (Interleaved) {
      rotate_pairs(x, y, cos, sin, half, streaming);
    } else {
      rotate_halves(x, y, cos, sin, half, streaming);
    }
    if (2 * half < width)
      std::memcpy(y + 2 * half, x + 2 * half, static_cast<uint64_t>(width - 2 * half) * sizeof(T));
  }
}

// One row of a table in fp32; interleaved every number twice, the first with a sign of its own.
template <class C>
void widen(const C* from, float* to, int64_t half, float sign, bool interleaved, float first_sign) {
  if (!interleaved) {
    for_lanes<1>(half, [&](int64_t j, int, auto lanes)
                           FG_LAMBDA { store(to + j, load(from + j, lanes) * set(sign), lanes); });
    return;
  }
  for (int64_t j = 0; j < half; ++j) {
    const float value = load_scalar(from + j) * sign;
    to[2 * j] = value * first_sign;
    to[2 * j + 1] = value;
  }
}

}  // namespace

// q and k: null where there is none. sign: 1 to rotate, -1 to rotate back.
void rope(const void* q, void* q_out, int64_t q_heads, int64_t q_batch, int64_t q_head, int64_t q_position,
          const void* k, void* k_out, int64_t k_heads, int64_t k_batch, int64_t k_head, int64_t k_position,
          const void* cos, int64_t cos_batch, int64_t cos_position, const void* sin, int64_t sin_batch,
          int64_t sin_position, int64_t batch, int64_t length, int64_t width, int64_t half, int dtype,
          int table_dtype, int interleaved, double sign, int num_threads) {
  const Side sides[2] = {{q, q_out, q_heads, q_batch, q_head, q_position},
                         {k, k_out, k_heads, k_batch, k_head, k_position}};
  const int64_t positions = batch * length;
  const int64_t across = ((q != nullptr ? q_heads : 0) + (k != nullptr ? k_heads : 0)) * width;
  parallel_chunks(positions, rows_per_chunk(positions, across, num_threads), positions * across, num_threads,
                  [&](int64_t begin, int64_t end) {
                    const Streaming streaming(positions * across * (dtype == F32 ? 4 : 2));
                    Scratch scratch(4 * half);
                    float *c = scratch.data, *s = scratch.data + 2 * half;
                    for (int64_t i = begin; i < end; ++i) {
                      const int64_t b = i / length, t = i % length;
                      with_dtype(table_dtype, [&](auto type) {
                        using C = typename decltype(type)::type;
                        const int64_t cos_at = b * cos_batch + t * cos_position,
                                      sin_at = b * sin_batch + t * sin_position;
                        widen(static_cast<const C*>(cos) + cos_at, c, half, 1.0f, interleaved, 1.0f);
                        widen(static_cast<const C*>(sin) + sin_at, s, half, static_cast<float>(sign),
                              interleaved, -1.0f);
                      });
                      with_dtype(dtype, [&](auto type) {
                        using T = typename decltype(type)::type;
                        for (const Side& side : sides) {
                          if (interleaved) {
                            rotate_position<T, true>(side, b, t, length, width, c, s, half, streaming.on);
                          } else {
                            rotate_position<T, false>(side, b, t, length, width, c, s, half, streaming.on);
                          }
                        }
                      });
                    }
                  });
}

}  // namespace fg::FG_LEVEL

FG_EXPORTS(rope, FG_EXPORT(rope))
