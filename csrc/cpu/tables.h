// Functions as tables of polynomials, found while compiling: one for each of 32 equal intervals, its
// coefficients looked up by vpermi2ps, which AVX-512 does beside the multiply-adds that a polynomial for the
// whole range would take. Interpolated at Chebyshev nodes, which costs at most twice the error of the best
// polynomial.
#pragma once

#include "vec.h"

#if defined(FG_LOOKUP)

namespace fg::FG_LEVEL {

constexpr int kIntervals = 32;

// Coefficients of f^0, f^1, … for interval k, f in [-1/2, 1/2] being the distance from its middle.
template <int Degree>
struct Polynomials {
  alignas(64) float c[Degree + 1][kIntervals];
};

namespace exactly {  // in double, good to 1e-15

constexpr double exp(double x) {
  double term = 1.0, sum = 1.0;
  for (int i = 1; i < 20; ++i) sum += term *= x / 1024.0 / i;
  for (int i = 0; i < 10; ++i) sum *= sum;
  return sum;
}

constexpr double kSqrt2 = 1.4142135623730950488, kSqrtPi = 1.7724538509055160273;

constexpr double normal_pdf(double z) { return exp(-0.5 * z * z) / (kSqrt2 * kSqrtPi); }

// 1/2 + pdf(z) (z + z^3 / 3 + z^5 / (3 5) + …), Abramowitz and Stegun 26.2.11.
constexpr double normal_cdf(double z) {
  double term = z, sum = z;
  for (int i = 3; i < 200; i += 2) sum += term *= z * z / i;
  return 0.5 + normal_pdf(z) * sum;
}

constexpr double cos_pi(double x) {  // x in [0, 1]
  const double y = 3.14159265358979323846 * (x - 0.5);
  double term = y, sum = y;
  for (int i = 3; i < 30; i += 2) sum += term *= -y * y / (i * (i - 1));
  return -sum;
}

}  // namespace exactly

// The polynomials of function(k + f) for the intervals k < `used`; zero beyond.
template <int Degree, class Function>
constexpr Polynomials<Degree> tabulate(Function function, int used = kIntervals) {
  constexpr int n = Degree + 1;
  Polynomials<Degree> table{};
  for (int k = 0; k < used; ++k) {
    double x[n]{}, divided[n]{}, c[n]{};
    for (int i = 0; i < n; ++i) {
      x[i] = 0.5 * exactly::cos_pi((i + 0.5) / n);
      divided[i] = function(k + x[i]);
    }
    for (int order = 1; order < n; ++order)
      for (int i = n - 1; i >= order; --i) divided[i] = (divided[i] - divided[i - 1]) / (x[i] - x[i - order]);
    for (int i = n - 1; i >= 0; --i) {  // from Newton's form to powers: c = c (f - x[i]) + divided[i]
      for (int j = n - 1; j > 0; --j) c[j] = c[j - 1] - c[j] * x[i];
      c[0] = divided[i] - c[0] * x[i];
    }
    for (int j = 0; j < n; ++j) table.c[j][k] = static_cast<float>(c[j]);
  }
  return table;
}

// Adding it rounds a number below 2^22 to an integer, whose low bits are then the lowest of the sum.
constexpr float kRounding = 0x1.8p23f;

// The table's function at x * unit, 0 <= x * unit < kIntervals - 1/2.
template <int Degree>
FG_INLINE F look_up(const Polynomials<Degree>& table, F x, float unit) {
  const F index = fma(x, set(unit), set(kRounding)), f = fms(x, set(unit), index - set(kRounding));
  F value = lookup(table.c[Degree], index);
#pragma GCC unroll 8
  for (int j = Degree - 1; j >= 0; --j) value = fma(value, f, lookup(table.c[j], index));
  return value;
}

}  // namespace fg::FG_LEVEL

#endif  // FG_LOOKUP
