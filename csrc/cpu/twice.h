// Two vectors of bf16 at once: the numbers with an even index are the low halves of 32-bit lanes, the others
// the high ones. To widen them takes a shift and a mask, where a vector by itself takes a permutation and a
// shift, and they are narrowed into one store. What is done to each half is the same; only fp32 arrays beside
// them are in another order. Included by vec.h.
#pragma once

namespace fg::FG_LEVEL {

using F2 = Halves<F>;

// Of which numbers that is to be had here.
template <class T>
constexpr bool kTwice = false;
#if defined(FG_TWICE)
template <>
constexpr bool kTwice<bf16> = true;
#endif

FG_INLINE F2 keep(F2 x, Twice, F) { return x; }

// --- code for F and F2 alike ---

FG_INLINE F even(F a) { return a; }
FG_INLINE F even(F2 a) { return a.even; }
FG_INLINE F odd(F a) { return a; }
FG_INLINE F odd(F2 a) { return a.odd; }

template <class... A>
constexpr bool kAnyTwo = false;
template <class First, class... Rest>
constexpr bool kAnyTwo<First, Rest...> = kAnyTwo<Rest...>;
template <class... Rest>
constexpr bool kAnyTwo<F2, Rest...> = true;

// f of vectors; of each half where one of them is an F2.
template <class Function, class... A>
FG_INLINE auto each(const Function& f, A... a) {
  if constexpr (kAnyTwo<A...>) {
    return F2{f(even(a)...), f(odd(a)...)};
  } else {
    return f(a...);
  }
}

template <bool>
struct OnlyIf {};
template <>
struct OnlyIf<true> {
  using type = F2;
};
template <class... A>
using IfAnyTwo = typename OnlyIf<kAnyTwo<A...>>::type;

template <class A, class B>
FG_INLINE IfAnyTwo<A, B> operator+(A a, B b) {
  return {even(a) + even(b), odd(a) + odd(b)};
}
template <class A, class B>
FG_INLINE IfAnyTwo<A, B> operator-(A a, B b) {
  return {even(a) - even(b), odd(a) - odd(b)};
}
template <class A, class B>
FG_INLINE IfAnyTwo<A, B> operator*(A a, B b) {
  return {even(a) * even(b), odd(a) * odd(b)};
}
template <class A, class B, class C>
FG_INLINE IfAnyTwo<A, B, C> fma(A a, B b, C c) {
  return {fma(even(a), even(b), even(c)), fma(odd(a), odd(b), odd(c))};
}
template <class A, class B, class C>
FG_INLINE IfAnyTwo<A, B, C> fnma(A a, B b, C c) {
  return {fnma(even(a), even(b), even(c)), fnma(odd(a), odd(b), odd(c))};
}

// Into a running sum or maximum.
FG_INLINE F add(F sum, F a) { return sum + a; }
FG_INLINE F add(F sum, F2 a) { return sum + (a.even + a.odd); }
FG_INLINE F add_product(F sum, F a, F b) { return fma(a, b, sum); }
FG_INLINE F add_product(F sum, F2 a, F2 b) { return fma(a.even, b.even, fma(a.odd, b.odd, sum)); }
FG_INLINE F raise(F best, F a) { return vmax(a, best); }
FG_INLINE F raise(F best, F2 a) { return vmax(a.even, vmax(a.odd, best)); }

// To and from fp32 scratch that is read back in the vectors that it was written in.
template <class Lanes>
FG_INLINE auto load_scratch(const float* p, Lanes lanes) {
  if constexpr (__is_base_of(Twice, Lanes)) {
    return F2{load(p, Full{}), load(p + W, Full{})};
  } else {
    return load(p, lanes);
  }
}
template <class Lanes>
FG_INLINE void store_scratch(float* p, F a, Lanes lanes) {
  store(p, a, lanes);
}
FG_INLINE void store_scratch(float* p, F2 a, Twice) {
  store(p, a.even, Full{});
  store(p + W, a.odd, Full{});
}

}  // namespace fg::FG_LEVEL
