// Any architecture: 4 lanes by the compiler's vector extensions, no intrinsics. Included by vec.h.
#pragma once

namespace fg::FG_LEVEL {

constexpr int W = 4;

typedef float F4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));
typedef uint32_t U4 __attribute__((vector_size(16)));

struct F {
  F4 v;
};
struct M {
  I4 v;  // all ones or all zeros in each lane
};

FG_INLINE F set(float x) { return {F4{x, x, x, x}}; }
FG_INLINE F operator+(F a, F b) { return {a.v + b.v}; }
FG_INLINE F operator-(F a, F b) { return {a.v - b.v}; }
FG_INLINE F operator*(F a, F b) { return {a.v * b.v}; }
FG_INLINE F fma(F a, F b, F c) {
  return {a.v * b.v + c.v};
}  // rounds twice: nothing here may rely on one rounding
FG_INLINE F fms(F a, F b, F c) { return {a.v * b.v - c.v}; }
FG_INLINE F fnma(F a, F b, F c) { return {c.v - a.v * b.v}; }
FG_INLINE F select(M m, F a, F b) {
  return {bit_cast<F4>((m.v & bit_cast<I4>(a.v)) | (~m.v & bit_cast<I4>(b.v)))};
}
FG_INLINE M operator<(F a, F b) { return {a.v < b.v}; }
FG_INLINE M operator|(M a, M b) { return {a.v | b.v}; }
FG_INLINE bool any(M m) { return (m.v[0] | m.v[1] | m.v[2] | m.v[3]) != 0; }
FG_INLINE M none() { return {I4{0, 0, 0, 0}}; }
FG_INLINE F vmin(F a, F b) { return select(a < b, a, b); }
FG_INLINE F vmax(F a, F b) { return select(b < a, a, b); }
FG_INLINE F vabs(F a) { return {bit_cast<F4>(bit_cast<I4>(a.v) & 0x7fffffff)}; }
// -min(|a|, limit); limit for NaN.
FG_INLINE F negative_limited(F a, float limit) { return set(0.0f) - vmin(vabs(a), set(limit)); }
FG_INLINE M first_lanes(int n) { return {I4{0, 1, 2, 3} < n}; }
FG_INLINE float hsum(F a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
FG_INLINE float hmax(F a) {
  const float x = a.v[0] > a.v[2] ? a.v[0] : a.v[2], y = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return x > y ? x : y;
}

// For 2^w with w <= 1: w - floor(w), in [0, 1], and a * 2^floor(w) with gradual underflow. 2^-160 is 0, so
// that w can be limited there; two steps, because 2^-149 itself is no factor of a normal number. Rounding:
// at 1.5 * 2^23 a float has no fraction bits left, so that the adder rounds.
constexpr float kRounder = 12582912.0f;
FG_INLINE F limited(F w) { return vmax(set(-160.0f), w); }
FG_INLINE F floor_of(F w) {
  const F rounded{(w.v + kRounder) - kRounder};
  return select(w < rounded, rounded - set(1.0f), rounded);
}
FG_INLINE F fraction(F w) { return limited(w) - floor_of(limited(w)); }
FG_INLINE F scale_floor(F a, F w) {
  const I4 whole = bit_cast<I4>(floor_of(limited(w)).v + kRounder) - 0x4b400000, half = whole >> 1;
  const U4 first = bit_cast<U4>(half + 127) << 23, second = bit_cast<U4>(whole - half + 127) << 23;
  return {a.v * bit_cast<F4>(first) * bit_cast<F4>(second)};
}
FG_INLINE F reciprocal(F a) { return {1.0f / a.v}; }

FG_INLINE int count(Full) { return W; }
FG_INLINE int count(Part part) { return part.n; }

FG_INLINE F load(const float* p, Full) {
  F a;
  std::memcpy(&a.v, p, sizeof(a.v));
  return a;
}
FG_INLINE void store(float* p, F a, Full) { std::memcpy(p, &a.v, sizeof(a.v)); }

template <class T, class Lanes>
FG_INLINE F load(const T* p, Lanes lanes) {
  F a = set(0.0f);
  for (int i = 0; i < count(lanes); ++i) a.v[i] = load_scalar(p + i);
  return a;
}
template <class T, class Lanes>
FG_INLINE void store(T* p, F a, Lanes lanes) {
  for (int i = 0; i < count(lanes); ++i) store_scalar(p + i, a.v[i]);
}

// Bytes of a boolean tensor: true where not zero, false in lanes beyond a part.
template <class Lanes>
FG_INLINE M load_bool(const uint8_t* p, Lanes lanes) {
  M m = none();
  for (int i = 0; i < count(lanes); ++i) m.v[i] = p[i] != 0 ? -1 : 0;
  return m;
}

FG_INLINE M at_least(const uint32_t* words, uint32_t threshold) {
  U4 a;
  std::memcpy(&a, words, sizeof(a));
  return {bit_cast<I4>(a >= U4{threshold, threshold, threshold, threshold})};
}

// 64-bit lanes for Philox: product of the low 32 bits of each lane.
typedef uint64_t U64 __attribute__((vector_size(16)));
FG_INLINE U64 multiply32(U64 a, U64 b) { return (a & 0xffffffff) * (b & 0xffffffff); }

}  // namespace fg::FG_LEVEL
