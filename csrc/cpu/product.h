// A layer of a decoder for a handful of rows: their values as the products want them, and bias and scales
// after.
#pragma once

#include "few_rows.h"
#include "pair_rows.h"

namespace fg::FG_LEVEL {

constexpr int64_t kOutputs = 240;  // whose sums wait for scale and bias

// A weight [n, k] with the scale of each row (int8) and its bias; both may be null.
struct Layer {
  const void* weight;
  const float *scale, *bias;
};

inline int64_t padded(int64_t n) { return ceil_div(n, 2 * W) * 2 * W; }

// x W^T + bias for a W of type T. Where the CPU multiplies pairs of 16 bits, x has as many (pair_rows.h).
template <class T>
class Product {
 public:
  Product(int64_t rows, int64_t widest)
      : x_(rows * padded(widest)),
        sums_(rows * kOutputs),
        scales_(rows),
        narrow_(reinterpret_cast<int16_t*>(x_.data)) {}

  void take(const float* x, int64_t rows, int64_t k) {
    rows_ = rows, k_ = k, ldx_ = padded(k);
    for (int64_t r = 0; r < rows; ++r) {
      if constexpr (kByPairs<T>)
        scales_.data[r] = narrow_row(x + r * k, k, narrow_ + r * ldx_, T{});
      else
        spread<T>(x + r * k, x_.data + r * ldx_, k);
    }
  }

  // emit(r, j, values, lanes) for all rows r that were taken and the outputs j of [begin, end).
  template <class Emit>
  FG_INLINE void outputs(const Layer& layer, int64_t begin, int64_t end, const Emit& emit) {
    for (int64_t from = begin; from < end; from += kOutputs) {
      const int64_t count = min_of(kOutputs, end - from);
      const T* weight = static_cast<const T*>(layer.weight) + from * k_;
      if constexpr (kByPairs<T>)
        pair_rows(narrow_, ldx_, rows_, weight, k_, k_, count, sums_.data, kOutputs);
      else
        few_rows(x_.data, ldx_, rows_, weight, k_, k_, 0, count,
                 [&](int64_t r, int64_t j, float sum) FG_LAMBDA { sums_.data[r * kOutputs + j] = sum; });
      for (int64_t r = 0; r < rows_; ++r) {
        const F of_row = set(kByPairs<T> ? scales_.data[r] : 1.0f);
        for_lanes<1>(count, [&](int64_t j, int, auto lanes) FG_LAMBDA {
          F v = load(sums_.data + r * kOutputs + j, lanes);
          if (layer.scale != nullptr) v = v * (load(layer.scale + from + j, lanes) * of_row);
          if (layer.bias != nullptr) v = v + load(layer.bias + from + j, lanes);
          emit(r, from + j, v, lanes);
        });
      }
    }
  }

 private:
  Scratch x_, sums_, scales_;
  int16_t* narrow_;  // x_, where it is int16
  int64_t rows_ = 0, k_ = 0, ldx_ = 0;
};

}  // namespace fg::FG_LEVEL
