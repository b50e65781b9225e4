// What the norms share: their parameters as fp32, and the dtypes that may stand side by side.
#pragma once

#include "parallel.h"
#include "vec.h"

namespace fg::FG_LEVEL {

inline bool takes_twice(int dtype) { return kTwice<bf16> && dtype == BF16; }

// A vector of n parameters as fp32: itself, or a converted copy, or `fill` where there is none. two: in the
// order of vectors taken Twice.
class Parameter {
 public:
  Parameter(const void* p, int dtype, int64_t n, float fill, bool two)
      : scratch_(p != nullptr && dtype == F32 && !two ? 0 : n) {
    if (p != nullptr && dtype == F32 && !two) {
      data = static_cast<const float*>(p);
      return;
    }
    data = scratch_.data;
    copy(p, dtype, n, fill);
    if constexpr (kTwice<bf16>) {
      if (two)
        for_lanes<1, true>(n, [&](int64_t j, int, auto lanes) FG_LAMBDA {
          store_scratch(scratch_.data + j, load(scratch_.data + j, lanes), lanes);
        });
    }
  }
  const float* data;

 private:
  void copy(const void* p, int dtype, int64_t n, float fill) {
    float* to = scratch_.data;
    if (p == nullptr) {
      for_lanes<1>(n, [&](int64_t j, int, auto lanes) FG_LAMBDA { store(to + j, set(fill), lanes); });
      return;
    }
    with_dtype(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      const T* from = static_cast<const T*>(p);
      for_lanes<1>(
          n, [&](int64_t j, int, auto lanes) FG_LAMBDA { store(to + j, load(from + j, lanes), lanes); });
    });
  }

  Scratch scratch_;
};

template <class Body>
void with_dtypes(int t, int x, const Body& body) {  // the wider type is t itself or fp32
  with_dtype(t, [&](auto type) {
    if (x == F32) {
      body(type, Type<float>{});
    } else {
      body(type, type);
    }
  });
}

}  // namespace fg::FG_LEVEL
