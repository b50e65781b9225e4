// exp and GELU on vectors. Coefficients: Lawson-weighted least squares (minimax) in double precision, rounded.
#pragma once

#include "vec.h"

namespace fg::FG_LEVEL {

// exp(t + t_low) for t <= 0 (or NaN), |t_low| < 0.1 a correction to t. About 1 ulp; 0 below -104, subnormals kept.
FG_INLINE F exp_nonpositive(F t, F t_low) {
  t = vmax(set(-105.0f), t);  // second argument: NaN passes through
  const F n = round_nearest(t * set(1.44269504f));
  // ln 2 in two parts: the first has 9 bits, so n * ln2_high is exact even without fused multiply-add.
  F r = fnma(n, set(0.693359375f), t);
  r = fma(n, set(2.12194440e-4f), r) + t_low;
  // exp(r) = 1 + r + r^2 q(r) on |r| <= ln 2 / 2, relative error 3e-9
  F q = fma(set(0.00138143206f), r, set(0.00836885162f));
  q = fma(q, r, set(0.0416684002f));
  q = fma(q, r, set(0.166665196f));
  q = fma(q, r, set(0.49999994f));
  return scale2(fma(r * r, q, r) + set(1.0f), n);
}
FG_INLINE F exp_nonpositive(F t) { return exp_nonpositive(t, set(0.0f)); }

// What GELU and its derivative share. gelu(z) = z * cdf, gelu'(z) = cdf + z * pdf. The smaller of cdf and 1 - cdf is
// found directly (never as 1 minus something), so that the negative tail keeps its relative accuracy. |z| is
// limited to where cdf is 0 or 1 in fp32: huge z stay finite, and z = -inf gives 0 * inf = NaN as in PyTorch.
struct Gate {
  F cdf, pdf;
};

// Phi(-a) = exp(-a^2 / 2) R(a), R = erfcx(a / sqrt 2) / 2 as a rational function, relative error 6e-9 on [0, 14.6].
FG_INLINE Gate gate_erf(F z) {
  const F a = vmin(vabs(z), set(15.0f));
#if defined(__FMA__) || defined(__AVX512F__)
  const F t = a * a * set(-0.5f);
  const F t_low = fnma(a * set(0.5f), a, set(0.0f) - t);  // what rounding a^2 lost: at a = 10 it is 3e-6 of exp(t)
#else
  // No fused multiply-add: split a into 12 high bits, whose square is exact, and the rest.
  const F high{bit_cast<F4>(bit_cast<I4>(a.v) & static_cast<int32_t>(0xfffff000))};
  const F t = high * high * set(-0.5f);
  const F t_low = (a - high) * (a + high) * set(-0.5f);
#endif
  const F e = exp_nonpositive(t, t_low);
  F p = fma(set(0.00412382872f), a, set(0.0406837687f));
  p = fma(p, a, set(0.183384910f));
  p = fma(p, a, set(0.438496840f));
  p = fma(p, a, set(0.5f));
  F q = fma(set(0.0103367893f), a, set(0.101985469f));
  q = fma(q, a, set(0.469866061f));
  q = fma(q, a, set(1.20312480f));
  q = fma(q, a, set(1.67487867f));
  q = fma(q, a, set(1.0f));
  const F tail = e * p * reciprocal(q);
  return {select(z < set(0.0f), tail, set(1.0f) - tail), e * set(0.398942280f)};
}

// cdf = sigmoid(2u), 2u = sqrt(8 / pi) (z + 0.044715 z^3); pdf stands for the derivative of the sigmoid.
FG_INLINE Gate gate_tanh(F z) {
  const F a = vmin(vabs(z), set(12.0f));
  const F a2 = a * a;
  const F slope = fma(a2, set(0.0713548162726f), set(1.59576912161f));
  const F e = exp_nonpositive((set(0.0f) - a) * slope);
  const F s = reciprocal(e + set(1.0f));
  const F du = fma(a2, set(3.0f * 0.0713548162726f), set(1.59576912161f));
  return {select(z < set(0.0f), e * s, s), e * s * s * du};
}

enum Approximate : int { kErf = 0, kTanh = 1 };

template <int A>
FG_INLINE Gate gate(F z) {
  return A == kErf ? gate_erf(z) : gate_tanh(z);
}

}  // namespace fg::FG_LEVEL
