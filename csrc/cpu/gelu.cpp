// GELU of x + bias, and its gradient: gelu(z) = z * cdf(z), by the error function or its tanh approximation
// (Hendrycks and Gimpel, arXiv:1606.08415). z = x + bias is not rounded to the input's type.

#include "export.h"
#include "math.h"
#include "parallel.h"
#include "reduce.h"
#include "stream.h"

namespace fg::FG_LEVEL {
namespace {

constexpr int kAhead = 1024;  // elements to prefetch: a page or half, where the hardware's prefetching stops

template <class T, int A>
void forward_range(const T* x, const T* bias, T* y, int64_t count, bool streaming) {
  const auto activate = [](F z) FG_LAMBDA { return gelu_for<T, A>(z); };
  if (bias == nullptr) {
    for_lanes_out<2, kTwice<T>>(y, count, streaming, [&](int64_t j, int, auto lanes) FG_LAMBDA {
      prefetch(x + j + kAhead);
      put(y + j, each(activate, load(x + j, lanes)), lanes);
    });
  } else {
    for_lanes_out<2, kTwice<T>>(y, count, streaming, [&](int64_t j, int, auto lanes) FG_LAMBDA {
      prefetch(x + j + kAhead);
      put(y + j, each(activate, load(x + j, lanes) + load(bias + j, lanes)), lanes);
    });
  }
}

// dx may be null; with dbias (fp32) the row's gradient is added to it. Two: whether numbers are taken Twice,
// and dbias is in that order.
template <class T, int A, bool HasBias, bool NeedBias>
void backward_range(const T* dy, const T* x, const T* bias, T* dx, float* dbias, int64_t count,
                    bool streaming) {
  const auto gradient = [](F dy, F z) FG_LAMBDA { return dy * gelu_slope_for<T, A>(z); };
  for_lanes_out<2, kTwice<T>>(dx, count, streaming && dx != nullptr,
                              [&](int64_t j, int, auto lanes) FG_LAMBDA {
                                auto z = load(x + j, lanes);
                                if constexpr (HasBias) z = z + load(bias + j, lanes);
                                const auto d = each(gradient, load(dy + j, lanes), z);
                                if (dx != nullptr) put(dx + j, d, lanes);
                                if constexpr (NeedBias)
                                  store_scratch(dbias + j, load_scratch(dbias + j, lanes) + d, lanes);
                              });
}

template <class Body>
void with_kind(int dtype, int approximate, const Body& body) {
  with_dtype(dtype, [&](auto type) {
    if (approximate == kErf) {
      body(type, Constant<kErf>{});
    } else {
      body(type, Constant<kTanh>{});
    }
  });
}

}  // namespace

// x [rows, n] contiguous; bias [n] or null.
void gelu_fwd(const void* x, const void* bias, void* y, int64_t rows, int64_t n, int dtype, int approximate,
              int num_threads) {
  if (bias == nullptr) {  // rows mean nothing: equal pieces of the whole
    const int64_t total = rows * n;
    n = min_of(total, 16 * 1024);
    rows = n > 0 ? ceil_div(total, n) : 0;
    with_kind(dtype, approximate, [&](auto type, auto kind) {
      using T = typename decltype(type)::type;
      parallel_chunks(rows, 1, total, num_threads, [&](int64_t i, int64_t) {
        const Streaming streaming(total * static_cast<int64_t>(sizeof(T)));
        const int64_t at = i * n;
        forward_range<T, decltype(kind)::value>(static_cast<const T*>(x) + at, nullptr,
                                                static_cast<T*>(y) + at, min_of(n, total - at), streaming.on);
      });
    });
    return;
  }
  with_kind(dtype, approximate, [&](auto type, auto kind) {
    using T = typename decltype(type)::type;
    parallel_chunks(rows, rows_per_chunk(rows, n, num_threads), rows * n, num_threads,
                    [&](int64_t begin, int64_t end) {
                      const Streaming streaming(rows * n * static_cast<int64_t>(sizeof(T)));
                      for (int64_t i = begin; i < end; ++i) {
                        forward_range<T, decltype(kind)::value>(static_cast<const T*>(x) + i * n,
                                                                static_cast<const T*>(bias),
                                                                static_cast<T*>(y) + i * n, n, streaming.on);
                      }
                    });
  });
}

// dx, dbias: null where not needed; bias null where there is none.
void gelu_bwd(const void* dy, const void* x, const void* bias, void* dx, void* dbias, int64_t rows, int64_t n,
              int dtype, int approximate, int num_threads) {
  if (dbias == nullptr) {
    const int64_t total = rows * n;
    if (bias == nullptr) {
      n = min_of(total, 16 * 1024);
      rows = n > 0 ? ceil_div(total, n) : 0;
    }
    with_kind(dtype, approximate, [&](auto type, auto kind) {
      using T = typename decltype(type)::type;
      constexpr int A = decltype(kind)::value;
      parallel_chunks(
          rows, rows_per_chunk(rows, n, num_threads), total, num_threads, [&](int64_t begin, int64_t end) {
            const Streaming streaming(total * static_cast<int64_t>(sizeof(T)));
            for (int64_t i = begin; i < end; ++i) {
              const int64_t at = i * n, count = min_of(n, total - at);
              const T *dy_i = static_cast<const T*>(dy) + at, *x_i = static_cast<const T*>(x) + at;
              T* dx_i = static_cast<T*>(dx) + at;
              if (bias == nullptr) {
                backward_range<T, A, false, false>(dy_i, x_i, nullptr, dx_i, nullptr, count, streaming.on);
              } else {
                backward_range<T, A, true, false>(dy_i, x_i, static_cast<const T*>(bias), dx_i, nullptr,
                                                  count, streaming.on);
              }
            }
          });
    });
    return;
  }
  const Parts parts(rows);
  Scratch sums(parts.count * n);
  with_kind(dtype, approximate, [&](auto type, auto kind) {
    using T = typename decltype(type)::type;
    parallel_chunks(rows, max_of(1, parts.size), rows * n, num_threads, [&](int64_t begin, int64_t end) {
      const Streaming streaming(streamed_bytes(static_cast<const T*>(dx), rows, n));
      Scratch block(n);
      float* own = sums.data + begin / parts.size * n;
      std::memset(own, 0, static_cast<uint64_t>(n) * sizeof(float));
      for (int64_t i = begin; i < end; ++i) {
        if ((i - begin) % kFlushRows == 0)
          std::memset(block.data, 0, static_cast<uint64_t>(n) * sizeof(float));
        backward_range<T, decltype(kind)::value, true, true>(
            static_cast<const T*>(dy) + i * n, static_cast<const T*>(x) + i * n, static_cast<const T*>(bias),
            dx != nullptr ? static_cast<T*>(dx) + i * n : nullptr, block.data, n, streaming.on);
        if ((i - begin) % kFlushRows == kFlushRows - 1 || i + 1 == end) add_into(own, block.data, n);
      }
    });
    reduce_parts<kTwice<T>>(sums.data, parts.count, n, n, static_cast<T*>(dbias), num_threads);
  });
}

}  // namespace fg::FG_LEVEL

FG_EXPORTS(gelu, FG_EXPORT(gelu_fwd), FG_EXPORT(gelu_bwd))
