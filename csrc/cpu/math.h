// exp and GELU on vectors. Coefficients: Lawson-weighted least squares (minimax) in double precision,
// rounded.
#pragma once

#include "vec.h"

namespace fg::FG_LEVEL {

// 2^w for w <= 0 (or NaN), 1 ulp; subnormals kept, 0 at -inf.
FG_INLINE F exp2_nonpositive(F w) {
  const F f = fraction(w);
  F q = fma(set(0.000216129192f), f, set(0.00124678458f));  // 2^f = 1 + f q(f) on [0, 1], relative error 2e-9
  q = fma(q, f, set(0.00967545155f));
  q = fma(q, f, set(0.0554852821f));
  q = fma(q, f, set(0.240229309f));
  q = fma(q, f, set(0.693147063f));
  return scale_floor(fma(q, f, set(1.0f)), w);
}

// exp(t) for t <= 0 (or NaN), relative error (1 + |t|) 2^-24.
FG_INLINE F exp_nonpositive(F t) { return exp2_nonpositive(t * set(1.44269504f)); }

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
  const F e = exp2_nonpositive(minus_a * minus_a * set(-0.721347520f));
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
  const F e = exp2_nonpositive(minus_a * fma(minus_a * minus_a, set(0.102943240f), set(2.30220820f)));
  return {minus_a, e, e * reciprocal(e + set(1.0f))};
}

template <int A>
FG_INLINE F gelu(F z) {
  const Tail g = A == kErf ? tail_erf(z) : tail_tanh(z);
  // z > 0: z - a tail; z < 0: 0 + z tail, with z itself and not its limited value. NaN passes through both.
  return fma(vmin(g.minus_a, z), g.tail, vmax(set(0.0f), z));
}

// The same for results of 16 bits, in two thirds of the instructions: Phi(z) = 1/2 + z P(z^2), absolute error
// 2^-23, as 1 + erf has it in fp32. Beyond the fitted |z| < 5.3 the product grows and is cut off at exactly 0
// or 1.
FG_INLINE F gelu_erf_16bit(F z) {
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
FG_INLINE F gelu_slope(F z) {
  const Tail g = A == kErf ? tail_erf(z) : tail_tanh(z);
  const F cdf = select(z < set(0.0f), g.tail, set(1.0f) - g.tail);
  if constexpr (A == kErf) return fma(z, g.e * set(0.398942280f), cdf);
  // The sigmoid's derivative is tail (1 - tail) 2u'.
  const F du = fma(g.minus_a * g.minus_a, set(0.214064449f), set(1.59576912f));
  return fma(z, fnma(g.tail, g.tail, g.tail) * du, cdf);
}

}  // namespace fg::FG_LEVEL
