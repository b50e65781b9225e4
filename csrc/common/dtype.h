// Element types as they lie in memory, and the switch from a run-time code to a compile-time type.
#pragma once

#include <cstdint>

namespace fg::FG_LEVEL {

enum Dtype : int { F32 = 0, BF16 = 1, F16 = 2 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct i8 {  // of a weight: a whole number, to be multiplied by its row's scale
  int8_t value;
};

template <class T>
struct Type {
  using type = T;
};

// A value known when compiling, handed to a generic lambda as a type.
template <int V>
struct Constant {
  static constexpr int value = V;
  constexpr operator int64_t() const { return V; }
};

// Calls body(Type<float>{}) etc.; the launcher has already checked the code.
template <class Body>
inline void with_dtype(int code, Body body) {
  if (code == F32) return body(Type<float>{});
  if (code == BF16) return body(Type<bf16>{});
  return body(Type<f16>{});
}

}  // namespace fg::FG_LEVEL
