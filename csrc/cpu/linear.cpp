// What the CPU's linear layers are made of: a handful of rows, where W is all that moves, products of more
// (gemm.h), and the bias' gradient.
//
//   y = act(x W^T + bias),  dbias = sum over the rows of dy
//
// The activation is of the sum in fp32; h, which backward has, is that sum rounded.

#include "export.h"
#include "few_rows.h"
#include "gemm.h"
#include "reduce.h"

namespace fg::FG_LEVEL {
namespace {

FG_INLINE float activated_scalar(float z, int activation) {
  if (activation == kNoActivation) return z;
  float lanes[W];
  store(lanes, activated<float>(set(z), activation), Full{});
  return lanes[0];
}

// bf16 is multiplied in pairs where the CPU can; subnormals then count as zero (tile.h).
template <class T>
struct KindOf {
  using type = Floats;
};
#if FG_BF16_PAIRS
template <>
struct KindOf<bf16> {
  using type = Pairs;
};
#endif

}  // namespace

// x: [rows, k] contiguous, 1 to 16 rows; weight: n rows of k adjacent elements, ldw apart; bias may be null;
// y, and h = x W^T unless null: [rows, n] contiguous; all of one dtype.
void linear_few_rows(const void* x, const void* weight, const void* bias, void* y, void* h, int64_t rows,
                     int64_t k, int64_t n, int64_t ldw, int dtype, int activation, int num_threads) {
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t ldx = ceil_div(k, 2 * W) * 2 * W;
    Scratch rows_of_x(rows * ldx);
    for (int64_t r = 0; r < rows; ++r)
      spread<T>(static_cast<const T*>(x) + r * k, rows_of_x.data + r * ldx, k);
    const T *w = static_cast<const T*>(weight), *b = static_cast<const T*>(bias);
    T *out = static_cast<T*>(y), *kept = static_cast<T*>(h);
    const int64_t chunk = max_of(48, ceil_div(n, 4 * max_of(1, num_threads)));  // adjacent rows of W
    parallel_chunks(n, chunk, n * k, num_threads, [&](int64_t begin, int64_t end) {
      few_rows(rows_of_x.data, ldx, rows, w, ldw, k, begin, end,
               [&](int64_t r, int64_t j, float sum) FG_LAMBDA {
                 if (kept != nullptr) store_scalar(kept + r * n + j, sum);
                 const float z = b != nullptr ? sum + load_scalar(b + j) : sum;
                 store_scalar(out + r * n + j, activated_scalar(z, activation));
               });
    });
  });
}

// c [m, n] = act(a b + bias), or c += a b (`add`: without bias and activation), by gemm.h; kept, unless null:
// a b, contiguous. a: m rows of k adjacent elements, lda apart, or, `along`, k rows of m; b: n rows of k, ldb
// apart, or k rows of n. Sizes of at least 1; all of one dtype.
void gemm(const void* a, int64_t lda, bool a_along, const void* b, int64_t ldb, bool b_along,
          const void* bias, void* c, int64_t ldc, void* kept, int64_t m, int64_t n, int64_t k, bool add,
          int dtype, int activation, int num_threads) {
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Operand<T> rows{static_cast<const T*>(a), lda, a_along},
        columns{static_cast<const T*>(b), ldb, b_along};
    const Matrices<T> of{
        rows, columns, static_cast<T*>(c), static_cast<T*>(kept), static_cast<const T*>(bias), ldc, m, n,
        k,    add,     activation};
    Gemm<typename KindOf<T>::type, T>(of, num_threads).run();
  });
}

// dbias [n] of dy: rows of n adjacent elements, `stride` apart.
void linear_dbias(const void* dy, void* dbias, int64_t rows, int64_t n, int64_t stride, int dtype,
                  int num_threads) {
  const Parts parts(rows);
  Scratch sums(max_of(1, parts.count) * n);
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_chunks(rows, max_of(1, parts.size), rows * n, num_threads, [&](int64_t begin, int64_t end) {
      Scratch block(n);
      float* own = sums.data + begin / parts.size * n;
      const auto clear = [n](float* to) {
        for_lanes<1>(n, [&](int64_t j, int, auto lanes) FG_LAMBDA { store(to + j, set(0.0f), lanes); });
      };
      clear(own);
      for (int64_t i = begin; i < end; i += kFlushRows) {
        clear(block.data);
        for (int64_t r = i; r < min_of(i + kFlushRows, end); ++r) {
          const T* row = static_cast<const T*>(dy) + r * stride;
          for_lanes<4, kTwice<T>>(n, [&](int64_t j, int, auto lanes) FG_LAMBDA {
            prefetch(row + stride + j);
            store_scratch(block.data + j, load_scratch(block.data + j, lanes) + load(row + j, lanes), lanes);
          });
        }
        add_into(own, block.data, n);
      }
    });
    reduce_parts<kTwice<T>>(sums.data, parts.count, n, n, static_cast<T*>(dbias), num_threads);
  });
}

}  // namespace fg::FG_LEVEL

FG_EXPORTS(linear, FG_EXPORT(linear_few_rows), FG_EXPORT(gemm), FG_EXPORT(linear_dbias))
