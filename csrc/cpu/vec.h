// One vector of floats of the level's native width, and the loops over a row that use it.
//
//   F            W floats          M   W booleans
//   load, store  from and to float, bf16, f16 (round to nearest even, NaN stays NaN, subnormals kept), at any
//                alignment, of a Full vector or the first n lanes (Part): nothing outside is read or written
//
// vmin and vmax return their second argument when either is NaN: vmax(x, acc) steps over a NaN in x.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"

#define FG_INLINE inline __attribute__((always_inline))
#define FG_LAMBDA __attribute__((always_inline))

namespace fg::FG_LEVEL {

struct Full {};
struct Part {
  int n;  // 1 <= n < W
};
struct Twice {};  // 2 W numbers as bf16 is read two vectors at once: see twice.h

template <class V>
struct Halves {
  V even, odd;
};

// --- scalars: the generic level's conversions, and columns that do not lie side by side ---

template <class To, class From>
FG_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

FG_INLINE float to_float(float x) { return x; }
FG_INLINE float to_float(i8 x) { return static_cast<float>(x.value); }
FG_INLINE float to_float(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
FG_INLINE float to_float(f16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13, sign = (x.bits & 0x8000u) << 16;
  if (magnitude >= 0x0f800000) return bit_cast<float>(sign | magnitude | 0x7f800000);  // Inf, NaN
  // Multiplying by 2^112 corrects the exponent's bias and normalises subnormals.
  return bit_cast<float>(bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f) | sign);
}

FG_INLINE void from_float(float x, float& to) { to = x; }
FG_INLINE void from_float(float x, bf16& to) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  to.bits = static_cast<uint16_t>((nan ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
FG_INLINE void from_float(float x, f16& to) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00 | ((magnitude >> 13) & 0x3ff);
  } else if (magnitude >= 0x477ff000) {  // 65520 and above round to Inf
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: adding 0.5 lets the adder round at bit 2^-24
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  to.bits = static_cast<uint16_t>(half | sign);
}

template <class T>
FG_INLINE float load_scalar(const T* p) {
  T x;
  std::memcpy(&x, p, sizeof(x));
  return to_float(x);
}
template <class T>
FG_INLINE void store_scalar(T* p, float value) {
  T x;
  from_float(value, x);
  std::memcpy(p, &x, sizeof(x));
}

}  // namespace fg::FG_LEVEL

#if defined(__AVX512F__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#else
#include "vec_generic.h"
#endif
#include "twice.h"

namespace fg::FG_LEVEL {

FG_INLINE F operator-(F a) { return set(0.0f) - a; }

// Asks for a cache line that a later pass needs, while this one computes; any address is allowed.
template <class T>
FG_INLINE void prefetch(const T* p) {
  __builtin_prefetch(p);
}

// Lanes beyond a part become `fill`, so that they cannot enter a sum or a maximum.
FG_INLINE F keep(F x, Full, F) { return x; }
FG_INLINE F keep(F x, Part part, F fill) { return select(first_lanes(part.n), x, fill); }

// body(j, u, lanes) over [0, n): vectors in groups of U (u = 0 … U-1 picks an accumulator), then single ones,
// then one tail. Two: bf16 that is to be taken Twice (kTwice), in the same groups.
template <int U, bool Two = false, class Body>
FG_INLINE void for_lanes(int64_t n, const Body& body) {
  int64_t j = 0;
  if constexpr (Two) {
    for (; j + 2 * U * W <= n; j += 2 * U * W) {
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) body(j + 2 * u * W, u, Twice{});
    }
    for (; j + 2 * W <= n; j += 2 * W) body(j, 0, Twice{});
  } else if constexpr (U > 1) {
    for (; j + U * W <= n; j += U * W) {
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) body(j + u * W, u, Full{});
    }
  }
  for (; j + W <= n; j += W) body(j, 0, Full{});
  if (j < n) body(j, 0, Part{static_cast<int>(n - j)});
}

// Sum over [0, n) of term(j, lanes), which must be zero in lanes beyond a part. Segments keep the running
// sums short: each of the partial sums is of at most kSegment / (4 W) terms.
constexpr int64_t kSegment = 8192;

template <bool Two = false, class Term>
FG_INLINE float sum_lanes(int64_t n, const Term& term) {
  float total = 0.0f;
  for (int64_t begin = 0; begin < n; begin += kSegment) {
    const int64_t count = n - begin < kSegment ? n - begin : kSegment;
    F acc[4] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
    for_lanes<4, Two>(
        count, [&](int64_t j, int u, auto lanes) FG_LAMBDA { acc[u] = add(acc[u], term(begin + j, lanes)); });
    total += hsum((acc[0] + acc[1]) + (acc[2] + acc[3]));
  }
  return total;
}

}  // namespace fg::FG_LEVEL
