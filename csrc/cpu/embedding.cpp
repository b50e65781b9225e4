// Rows of a table by their index, and the scatter of the gradient.
//
//   out[i] = token_weight[tokens[i]] + position_weight[positions[i]]
//   dweight[v] = sum of dout[i] over the i whose index is v, in their order
//
// A stable counting sort says which i those are, so that every row of dweight has one writer and one order of
// summation: no atomics, and the same bits for any number of threads.

#include <cstring>

#include "export.h"
#include "parallel.h"
#include "stream.h"
#include "vec.h"

namespace fg::FG_LEVEL {
namespace {

// Rows added in registers before the sum goes to memory.
constexpr int kGroup = 4;
// A row with more occurrences is summed in pieces of this many: threads share them, and sums stay short.
constexpr int64_t kPiece = 64;
// Zeros from this many bytes on go past the cache: they would only push out what is still needed.
constexpr int64_t kStreamedBytes = 1024;

class Integers {
 public:
  explicit Integers(int64_t n) : data(static_cast<int64_t*>(std::malloc(static_cast<uint64_t>(n) * 8 + 8))) {
    if (data == nullptr) __builtin_trap();
  }
  ~Integers() { std::free(data); }
  Integers(const Integers&) = delete;
  Integers& operator=(const Integers&) = delete;

  int64_t* data;
};

// --- forward ---

struct Forward {
  const void *token_weight, *position_weight;
  const int64_t *tokens, *positions;  // positions null: i % length
  void* out;
  int64_t count, length, n, token_rows, token_stride, position_rows, position_stride;
};

// The row an index stands for; null outside of the table.
template <class T>
const T* row_of(const void* table, int64_t index, int64_t rows, int64_t stride) {
  return index >= 0 && index < rows ? static_cast<const T*>(table) + index * stride : nullptr;
}

template <class T>
void forward_rows(const Forward& a, int64_t begin, int64_t end) {
  const int64_t bytes = a.n * static_cast<int64_t>(sizeof(T));
  const Streaming streaming(a.count * bytes);
  const T* row = row_of<T>(a.token_weight, a.tokens[begin], a.token_rows, a.token_stride);
  for (int64_t i = begin; i < end; ++i) {
    T* out = static_cast<T*>(a.out) + i * a.n;
    const T* next =
        i + 1 < end ? row_of<T>(a.token_weight, a.tokens[i + 1], a.token_rows, a.token_stride) : row;
    const T* place = row;
    if (a.position_weight != nullptr) {
      const int64_t position = a.positions == nullptr ? i % a.length : a.positions[i];
      place = row_of<T>(a.position_weight, position, a.position_rows, a.position_stride);
    }
    if (row == nullptr || place == nullptr) {
      for_lanes<1>(
          a.n, [&](int64_t j, int, auto lanes) FG_LAMBDA { store(out + j, set(__builtin_nanf("")), lanes); });
    } else if (a.position_weight == nullptr) {
      if (streaming.on) {
        stream_copy(out, row, bytes, next);
      } else {
        for (int64_t j = 0; j < a.n; j += 64 / static_cast<int64_t>(sizeof(T))) prefetch(next + j);
        if (bytes > 0) std::memcpy(out, row, static_cast<uint64_t>(bytes));
      }
    } else {
      for_lanes_out<4, kTwice<T>>(out, a.n, streaming.on, [&](int64_t j, int, auto lanes) FG_LAMBDA {
        prefetch(next + j);
        put(out + j, load(row + j, lanes) + load(place + j, lanes), lanes);
      });
    }
    row = next;
  }
}

// --- backward ---

// Which rows of dout belong to each row of dweight, in order.
struct Segments {
  const int64_t* order;  // all of them, row by row; null: row v has v, v + step, v + 2 step, …
  const int64_t* ends;   // where in `order` each row's end
  int64_t step, each;    // without order: rows v < step have `each` of them, the others none

  FG_INLINE int64_t begin(int64_t v) const { return v > 0 ? ends[v - 1] : 0; }
  FG_INLINE int64_t count(int64_t v) const {
    if (order == nullptr) return v < step ? each : 0;
    return ends[v] - begin(v);
  }
  FG_INLINE int64_t at(int64_t v, int64_t k) const {
    return order == nullptr ? v + k * step : order[begin(v) + k];
  }
};

// Fills order and ends from the indices; those out of range, and `left_out`, belong to no row.
void sort_by_index(const int64_t* index, int64_t count, int64_t rows, int64_t left_out, int64_t* order,
                   int64_t* ends) {
  const auto kept = [&](int64_t v) { return v >= 0 && v < rows && v != left_out; };
  if (rows > 0) std::memset(ends, 0, static_cast<uint64_t>(rows) * sizeof(int64_t));
  for (int64_t i = 0; i < count; ++i)
    if (kept(index[i])) ++ends[index[i]];
  int64_t total = 0;
  for (int64_t v = 0; v < rows; ++v) {
    const int64_t here = ends[v];
    ends[v] = total;
    total += here;
  }
  for (int64_t i = 0; i < count; ++i)
    if (kept(index[i])) order[ends[index[i]]++] = i;
}

void write_zeros(void* to, int64_t bytes) {
  if (bytes >= kStreamedBytes) return stream_zeros(to, bytes);
  if (bytes > 0) std::memset(to, 0, static_cast<uint64_t>(bytes));
}

// out = before + sum of K rows, all of n elements; `before` may be null, or out itself.
template <int K, class T, class Out>
FG_INLINE void add_rows(const T* const* rows, const float* before, Out* out, int64_t n, const T* next) {
  for_lanes<2>(n, [&](int64_t j, int, auto lanes) FG_LAMBDA {
    F x[kGroup];
    for (int k = 0; k < K; ++k) x[k] = load(rows[k] + j, lanes);
    prefetch(next + j);
    F total = x[0];
    if constexpr (K == 2) total = x[0] + x[1];
    if constexpr (K == 3) total = (x[0] + x[1]) + x[2];
    if constexpr (K == 4) total = (x[0] + x[1]) + (x[2] + x[3]);
    if (before != nullptr) total = load(before + j, lanes) + total;
    store(out + j, total, lanes);
  });
}

// out = sum of `count` > 0 rows, at(0), at(1), …, in groups; longer sums lie in fp32 scratch of n on the way.
template <class T, class Out, class At>
void sum_rows(int64_t count, int64_t n, float* scratch, Out* out, const At& at) {
  const float* before = nullptr;
  for (int64_t k = 0; k < count; k += kGroup) {
    const int64_t here = min_of(kGroup, count - k);
    const T* rows[kGroup];
    for (int64_t u = 0; u < here; ++u) rows[u] = at(k + u);
    const T* next = k + here < count ? at(k + here) : rows[0];
    const auto add = [&](auto* to) FG_LAMBDA {
      if (here == 1) return add_rows<1>(rows, before, to, n, next);
      if (here == 2) return add_rows<2>(rows, before, to, n, next);
      if (here == 3) return add_rows<3>(rows, before, to, n, next);
      add_rows<4>(rows, before, to, n, next);
    };
    if (k + here < count) {
      add(scratch);
    } else {
      add(out);
    }
    before = scratch;
  }
}

template <class T>
void scatter_rows(const T* dout, const Segments& segments, T* dweight, int64_t rows, int64_t n,
                  int64_t stride, int64_t count, int num_threads) {
  // Rows with many occurrences come last, in pieces.
  Integers busy(count / kPiece + 1), first_piece(count / kPiece + 2);
  int64_t num_busy = 0;
  first_piece.data[0] = 0;
  for (int64_t v = 0; v < rows; ++v) {
    const int64_t occurrences = segments.count(v);
    if (occurrences <= kPiece) continue;
    busy.data[num_busy] = v;
    first_piece.data[num_busy + 1] = first_piece.data[num_busy] + ceil_div(occurrences, kPiece);
    ++num_busy;
  }
  const int64_t pieces = first_piece.data[num_busy];

  parallel_chunks(rows, rows_per_chunk(rows, n, num_threads), (rows + count) * n, num_threads,
                  [&](int64_t begin, int64_t end) {
                    Scratch scratch(n);
                    for (int64_t v = begin; v < end; ++v) {
                      const int64_t occurrences = segments.count(v);
                      if (occurrences > kPiece) continue;
                      if (occurrences > 0) {
                        sum_rows<T>(occurrences, n, scratch.data, dweight + v * n,
                                    [&](int64_t k) FG_LAMBDA { return dout + segments.at(v, k) * stride; });
                        continue;
                      }
                      int64_t used = v + 1;
                      while (used < end && segments.count(used) == 0) ++used;
                      write_zeros(dweight + v * n, (used - v) * n * static_cast<int64_t>(sizeof(T)));
                      v = used - 1;
                    }
#if defined(__SSE2__)
                    _mm_sfence();  // orders the stores of its own thread alone
#endif
                  });
  if (num_busy == 0) return;

  Scratch sums(pieces * n);
  parallel_chunks(pieces, 1, count * n, num_threads, [&](int64_t begin, int64_t end) {
    Scratch scratch(n);
    for (int64_t piece = begin; piece < end; ++piece) {
      int64_t b = 0;
      while (first_piece.data[b + 1] <= piece) ++b;
      const int64_t v = busy.data[b], from = (piece - first_piece.data[b]) * kPiece;
      sum_rows<T>(min_of(kPiece, segments.count(v) - from), n, scratch.data, sums.data + piece * n,
                  [&](int64_t k) FG_LAMBDA { return dout + segments.at(v, from + k) * stride; });
    }
  });
  parallel_chunks(num_busy, 1, pieces * n, num_threads, [&](int64_t begin, int64_t end) {
    Scratch scratch(n);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = first_piece.data[b];
      sum_rows<float>(first_piece.data[b + 1] - first, n, scratch.data, dweight + busy.data[b] * n,
                      [&](int64_t k) FG_LAMBDA { return sums.data + (first + k) * n; });
    }
  });
}

}  // namespace

// position_weight null where there is none, positions null where they are 0 … length - 1 again and again.
// Strides are between rows, in elements; tokens, positions and out [count, n] are contiguous.
void embedding_fwd(const void* token_weight, const int64_t* tokens, const void* position_weight,
                   const int64_t* positions, void* out, int64_t count, int64_t length, int64_t n,
                   int64_t token_rows, int64_t token_stride, int64_t position_rows, int64_t position_stride,
                   int dtype, int num_threads) {
  const Forward a{token_weight, position_weight, tokens,        positions,      out, count, length, n,
                  token_rows,   token_stride,    position_rows, position_stride};
  parallel_chunks(
      count, rows_per_chunk(count, n, num_threads), count * n, num_threads, [&](int64_t begin, int64_t end) {
        with_dtype(dtype, [&](auto type) { forward_rows<typename decltype(type)::type>(a, begin, end); });
      });
}

// dweight [rows, n] of the gradient dout [count, n] (a stride between rows, in elements). index null: i %
// length.
void embedding_bwd(const void* dout, const int64_t* index, void* dweight, int64_t count, int64_t length,
                   int64_t n, int64_t rows, int64_t stride, int64_t left_out, int dtype, int num_threads) {
  const bool sorted = index != nullptr;
  Integers order(sorted ? count : 0), ends(sorted ? rows : 0);
  if (sorted) sort_by_index(index, count, rows, left_out, order.data, ends.data);
  const Segments segments{sorted ? order.data : nullptr, ends.data, length,
                          sorted || length == 0 ? 0 : count / length};
  with_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    scatter_rows(static_cast<const T*>(dout), segments, static_cast<T*>(dweight), rows, n, stride, count,
                 num_threads);
  });
}

}  // namespace fg::FG_LEVEL

FG_EXPORTS(embedding, FG_EXPORT(embedding_fwd), FG_EXPORT(embedding_bwd))
