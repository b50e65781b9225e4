// exp and GELU on vectors. Coefficients: Lawson-weighted least squares (minimax) in double precision,
// rounded.
#pragma once

#include "tables.h"
#include "vec.h"

namespace fg::FG_LEVEL {

#if defined(FG_LOOKUP)
constexpr struct Exponentials {
  alignas(64) float of[32];
  constexpr Exponentials() : of() {
    for (int i = 0; i < 32; ++i) of[i] = static_cast<float>(exactly::exp(i * (0.693147180559945309 / 32)));
  }
} kExponentials;
#endif

// 2^(a b) for -1000 <= a b <= 0 (or NaN; with FG_LOOKUP up to 100), relative error (1 + |a b|) 2^-24;
// subnormals kept.
FG_INLINE F exp2_product(F a, F b) {
#if defined(FG_LOOKUP)
  // With k the product rounded to a 32nd: 2^floor(k) 2^(k - floor(k)) 2^f.
  constexpr float kTo32nds = kRounding / 32.0f;
  const F index = fma(a, b, set(kTo32nds)), k = index - set(kTo32nds), f = fms(a, b, k);
  const F root = lookup(kExponentials.of, index);
  const F q = f * fma(set(0.240228f), f, set(0.693147181f));  // 2^f - 1, error 2^-24 on [-1/64, 1/64]
  return scale_floor(fma(root, q, root), k);
#else
  const F w = a * b, f = fraction(w);
  F q = fma(set(0.000216129192f), f, set(0.00124678458f));  // 2^f = 1 + f q(f) on [0, 1], relative error 2e-9
  q = fma(q, f, set(0.00967545155f));
  q = fma(q, f, set(0.0554852821f));
  q = fma(q, f, set(0.240229309f));
  q = fma(q, f, set(0.693147063f));
  return scale_floor(fma(q, f, set(1.0f)), w);
#endif
}

// 2^w for w <= 0 (or NaN), 1 ulp; 0 at -inf.
FG_INLINE F exp2_nonpositive(F w) { return exp2_product(vmax(set(-256.0f), w), set(1.0f)); }

// exp(t) for t <= 0 (or NaN; with FG_LOOKUP up to 60), relative error (1 + |t|) 2^-24; 0 at -inf.
FG_INLINE F exp_nonpositive(F t) { return exp2_product(vmax(set(-180.0f), t), set(1.44269504f)); }

// GELU = z * cdf(z); its derivative cdf + z * pdf. The smaller of cdf and 1 - cdf, `tail`, is found directly
// and never as 1 minus something: the negative tail stays relatively accurate. z is limited where tail is 0
// in fp32, so that huge z stay finite; -inf gives NaN as in PyTorch (-inf * 0).
enum Approximate : int { kErf = 0, kTanh = 1 };

struct Tail {
  F minus_a;  // -min(|z|, limit)
  F e;        // the exponential that pdf is made of
  F tail;
};

// tail = Phi(-a) = exp(-a^2 / 2) R(a), R = erfcx(a / sqrt 2) / 2 as a polynomial in t = 1 / (1 + 0.42 a) (the
// form of Abramowitz and Stegun 7.1.26). Relative error 1.7e-7 near 0, growing to 3e-5 where the tail is
// below 1e-6.
FG_INLINE Tail tail_erf(F z) {
  const F minus_a = negative_limited(z, 15.0f);
  const F e = exp2_product(minus_a * minus_a, set(-0.721347520f));
  const F t = reciprocal(fnma(minus_a, set(0.42f), set(1.0f)));
  F r = fma(set(0.061168015f), t, set(-0.247368753f));
  r = fma(r, t, set(0.277666241f));
  r = fma(r, t, set(0.0578326918f));
  r = fma(r, t, set(0.184951439f));
  r = fma(r, t, set(0.165672347f));
  r = fma(r, t, set(7.83085343e-05f));
  return {minus_a, e, e * r};
}

// tail = sigmoid(-2u) = e / (1 + e), e = exp(-2u), 2u = sqrt(8 / pi) (a + 0.044715 a^3).
FG_INLINE Tail tail_tanh(F z) {
  const F minus_a = negative_limited(z, 12.0f);
  const F e = exp2_product(minus_a, fma(minus_a * minus_a, set(0.102943240f), set(2.30220820f)));
  return {minus_a, e, e * reciprocal(e + set(1.0f))};
}

template <int A>
FG_INLINE F gelu(F z) {
  const Tail g = A == kErf ? tail_erf(z) : tail_tanh(z);
  // z > 0: z - a tail; z < 0: 0 + z tail, with z itself and not its limited value. NaN passes through both.
  return fma(vmin(g.minus_a, z), g.tail, vmax(set(0.0f), z));
}

template <int A>
FG_INLINE F gelu_slope(F z) {
  const Tail g = A == kErf ? tail_erf(z) : tail_tanh(z);
  const F cdf = select(z < set(0.0f), g.tail, set(1.0f) - g.tail);
  if constexpr (A == kErf) return fma(z, g.e * set(0.398942280f), cdf);
  // The sigmoid's derivative is tail (1 - tail) 2u'.
  const F du = fma(g.minus_a * g.minus_a, set(0.214064449f), set(1.59576912f));
  return fma(z, fnma(g.tail, g.tail, g.tail) * du, cdf);
}

#if defined(FG_LOOKUP)

// For results of 16 bits the tail and the derivative come from tables over a = |z|, in a third of the
// instructions; absolute errors 2^-22, as 1 + erf has them in fp32. In the last interval they are zero: a is
// limited there.
constexpr float kPerUnit = 5.25f;  // intervals: the last begins at 5.8
constexpr float kLast = (kIntervals - 1) / kPerUnit;

template <int A>
struct Exact {
  // By tanh the cdf is sigmoid(2u), 2u = sqrt(8 / pi) (z + 0.044715 z^3).
  static constexpr double tail(double u) {
    const double a = u / kPerUnit;
    if (A == kErf) return 1.0 - exactly::normal_cdf(a);
    return 1.0 / (1.0 + exactly::exp(kSlope * (a + kCubic * a * a * a)));
  }
  // Of gelu at -a.
  static constexpr double slope(double u) {
    const double a = u / kPerUnit, t = tail(u);
    if (A == kErf) return t - a * exactly::normal_pdf(a);
    return t - a * t * (1.0 - t) * kSlope * (1.0 + 3.0 * kCubic * a * a);
  }
  static constexpr double kSlope = 1.5957691216057307118, kCubic = 0.044715;
};

template <int A>
constexpr Polynomials<3> kTails = tabulate<3>(Exact<A>::tail, kIntervals - 1);
template <int A>
constexpr Polynomials<4> kSlopes = tabulate<4>(Exact<A>::slope, kIntervals - 1);

template <int A>
FG_INLINE F gelu_16bit(F z) {
  const F minus_a = negative_limited(z, kLast);
  return fma(vmin(minus_a, z), look_up(kTails<A>, minus_a, -kPerUnit), vmax(set(0.0f), z));
}

template <int A>
FG_INLINE F gelu_slope_16bit(F z) {
  const F slope = look_up(kSlopes<A>, negative_limited(z, kLast), -kPerUnit);
  // z * 0 brings back NaN, and makes NaN of infinities, as z * pdf does.
  return fma(z, set(0.0f), select(z < set(0.0f), slope, set(1.0f) - slope));
}

#else

// The same for results of 16 bits by the error function, in two thirds of the instructions: Phi(z) = 1/2 + z
// P(z^2), absolute error 2^-23, as 1 + erf has it in fp32. Beyond the fitted |z| < 5.3 the product grows and
// is cut off at exactly 0 or 1.
template <int A>
FG_INLINE F gelu_16bit(F z) {
  if constexpr (A == kTanh) return gelu<A>(z);
  constexpr float kMiddle = 5.3f * 5.3f / 2.0f;
  constexpr float kP[] = {2.44032869e-20f, -9.23915663e-19f, 1.24250055e-17f, -2.61246401e-16f,
                          1.04956793e-14f, -2.75059625e-13f, 5.83037785e-12f, -1.22304805e-10f,
                          2.46561127e-09f, -4.62895144e-08f, 8.24405504e-07f, -1.42892204e-05f,
                          0.000249739707f, -0.00473609846f,  0.133392558f};
  const F u = vmin(fma(z, z, set(-kMiddle)), set(kMiddle)), u2 = u * u;
  F even = set(kP[0]), odd = set(kP[1]);  // two chains: one alone is bound by latency
#pragma GCC unroll 8
  for (int i = 2; i < 14; i += 2) {
    even = fma(even, u2, set(kP[i]));
    odd = fma(odd, u2, set(kP[i + 1]));
  }
  const F p = fma(odd, u, fma(even, u2, set(kP[14])));
  return z * vmin(set(1.0f), vmax(set(0.0f), fma(z, p, set(0.5f))));
}

template <int A>
FG_INLINE F gelu_slope_16bit(F z) {
  return gelu_slope<A>(z);
}

#endif

// For results of type T.
template <class T, int A>
FG_INLINE F gelu_for(F z) {
  if constexpr (sizeof(T) == 2) return gelu_16bit<A>(z);
  return gelu<A>(z);
}
template <class T, int A>
FG_INLINE F gelu_slope_for(F z) {
  if constexpr (sizeof(T) == 2) return gelu_slope_16bit<A>(z);
  return gelu_slope<A>(z);
}

}  // namespace fg::FG_LEVEL
