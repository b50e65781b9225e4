// Matrix products of any size: c = act(a b + bias), or c += a b, where what follows the sum is done while a
// tile of it is in the first cache.
//
// Parts of a and b are copied into panels that the tile product (tile.h) reads from end to end: of a, kPanel
// rows with their elements side by side, so that a block of kBlockPanels of them stays in a core's second
// cache, of b kLanes columns. Each panel of b passes over the block and is read from the last cache once for
// all its rows. Sums are in fp32, over kElements at a time; their order depends on k alone (and the dtype and
// level), so that a row of c is the same bits whatever rows are beside it.
#pragma once

#include "math.h"
#include "tile.h"

namespace fg::FG_LEVEL {

enum Activation : int { kNoActivation = 0, kGelu = 1, kGeluTanh = 2 };

// Of z as a result of type T.
template <class T>
FG_INLINE F activated(F z, int activation) {
  if (activation == kGelu) return gelu_for<T, kErf>(z);
  if (activation == kGeluTanh) return gelu_for<T, kTanh>(z);
  return z;
}

// Rows of k adjacent numbers, or, `along` k, k rows of adjacent numbers: `ld` apart.
template <class T>
struct Operand {
  const T* data;
  int64_t ld;
  bool along;
  FG_INLINE const T* at(int64_t i, int64_t k) const { return data + (along ? k * ld + i : i * ld + k); }
};

template <class T>
struct Matrices {
  Operand<T> a;  // m rows
  Operand<T> b;  // n columns
  T* c;          // [m, n], rows ldc apart
  T* kept;       // [m, n] contiguous: a b alone; or null
  const T* bias;
  int64_t ldc, m, n, k;
  bool add;  // to what is in c; without bias and activation
  int activation;
};

template <class Kind, class T>
class Gemm : Matrices<T> {
  using Matrices<T>::a, Matrices<T>::b, Matrices<T>::c, Matrices<T>::kept, Matrices<T>::bias,
      Matrices<T>::ldc;
  using Matrices<T>::m, Matrices<T>::n, Matrices<T>::k, Matrices<T>::add, Matrices<T>::activation;

 public:
  Gemm(const Matrices<T>& of, int num_threads) : Matrices<T>(of), num_threads(num_threads) {}

  void run() {
    if (m < 1 || n < 1 || k < 1) return;
    const int64_t all = elements<Kind>(k), times = ceil_div(all, kElements);
    const int64_t some = round_up(ceil_div(all, times), W);
    // Never a multiple of 4 KB, or the rows of a tile would push each other out of the first cache.
    row_ = (some + W) % 1024 == 0 ? some + 2 * W : some + W;
    direct_ = sizeof(T) == 4 && activation == kNoActivation && kept == nullptr;
    const bool summed = !direct_ && times > 1;
    const int64_t rows = round_up(ceil_div(m, ceil_div(m, kMostRows)), kPanel);
    columns_ = round_up(ceil_div(n, ceil_div(n, summed ? kMostSummed : kMostColumns)), kLanes);
    const int64_t shared_out = 4 * max_of(1, num_threads) * kLanes;
    narrow_ = rows <= kNarrow && n > shared_out - kLanes;
    if (narrow_) columns_ = summed ? max_of(columns_, shared_out) : round_up(n, kLanes);
    const int64_t held = narrow_ ? max_of(1, num_threads) * (b.along ? kTogether : 1) * kLanes : columns_;
    Scratch a_panels(rows * row_), b_panels(held * some), sums(summed ? rows * columns_ : 0);
    a_panels_ = a_panels.data, b_panels_ = b_panels.data, sums_ = summed ? sums.data : nullptr;
    for (int64_t i = 0; i < m; i += rows) {
      for (int64_t j = 0; j < n; j += columns_) {
        for (int64_t e = 0; e < all; e += some) {
          part_ = {
              i, min_of(rows, m - i), j, min_of(columns_, n - j), e, min_of(some, all - e), e + some >= all};
          pack(j == 0 || times > 1);
          multiply();
        }
      }
    }
  }

 private:
  static constexpr int64_t kPanel = 16;  // rows: of one or several tiles
  // Elements along k summed at once, and panels in a block of some 400 KB.
  static constexpr int64_t kElements = Kind::kEach == 1 ? 768 : 1536;
  static constexpr int64_t kBlockPanels = Kind::kEach == 1 ? 9 : 4;
  // Up to so many rows each thread packs its own panels of b as it takes them: no other core has to be asked
  // for them, and they never leave the second cache. Above, a's panels would come from memory too often.
  static constexpr int64_t kNarrow = 1024;
  // 6 MB of a in panels, 9 MB of b, or 6 MB of sums beside a smaller part of b; twice that of pairs.
  static constexpr int64_t kMostRows = 2048, kMostColumns = 3072, kMostSummed = 768;
  // Along k: panels of b that a thread packs together, and elements of a row packed before the next row's, or
  // memory would be read in bits.
  static constexpr int64_t kTogether = 4, kAtOnce = 16;

  struct Part {
    int64_t i, rows, j, columns, e, elements;
    bool last;
  };

  int num_threads;
  Part part_;
  bool direct_;  // c holds the sums
  bool narrow_;
  int64_t columns_, row_;
  float *a_panels_, *b_panels_, *sums_;

  FG_INLINE int64_t numbers() const {
    return min_of(part_.elements * Kind::kEach, k - part_.e * Kind::kEach);
  }

  void pack(bool with_a) {
    const int64_t a_panels = ceil_div(part_.rows, kPanel);
    const int64_t a_jobs = !with_a ? 0 : a.along ? jobs(a, a_panels) : a_panels;
    const int64_t b_jobs = narrow_ ? 0 : jobs(b, ceil_div(part_.columns, kLanes));
    const int64_t size = ((with_a ? part_.rows : 0) + (narrow_ ? 0 : part_.columns)) * part_.elements;
    parallel_chunks(a_jobs + b_jobs, 1, size, num_threads, [&](int64_t job, int64_t) {
      if (job < a_jobs && !a.along) {
        const int64_t i = job * kPanel;
        pack_rows<Kind>(a.at(part_.i + i, part_.e * Kind::kEach), a.ld, min_of(kPanel, part_.rows - i),
                        kPanel, numbers(), a_panels_ + i * row_, row_);
      } else if (job < a_jobs) {
        pack_job<kPanel>(a, part_.i, part_.rows, job, a_panels_);
      } else {
        pack_job<kLanes>(b, part_.j, part_.columns, job - a_jobs, b_panels_);
      }
    });
  }

  // Panel by panel where k is inside; along k, a few rows through all panels, as they lie in memory.
  FG_INLINE int64_t jobs(const Operand<T>& of, int64_t panels) const {
    return of.along ? ceil_div(part_.elements, kAtOnce) : panels;
  }

  template <int64_t Lanes>
  void pack_job(const Operand<T>& of, int64_t first, int64_t count, int64_t job, float* panels) const {
    const int64_t panel = Lanes * part_.elements, from = part_.e * Kind::kEach;
    if (!of.along) {
      const int64_t i = job * Lanes;
      pack_columns<Kind>(of.at(first + i, from), of.ld, min_of(Lanes, count - i), numbers(),
                         panels + job * panel, Lanes);
      return;
    }
    const int64_t e = job * kAtOnce, at_once = min_of(kAtOnce, part_.elements - e);
    const int64_t rows = min_of(at_once * Kind::kEach, numbers() - e * Kind::kEach);
    for (int64_t i = 0; i < count; i += Lanes) {
      pack_along<Kind>(of.at(first + i, from + e * Kind::kEach), of.ld, rows, at_once * Kind::kEach,
                       min_of(Lanes, count - i), panels + i / Lanes * panel + e * Lanes, Lanes);
    }
  }

  void multiply() {
    if (narrow_) return multiply_narrow();
    const int64_t panels = ceil_div(part_.rows, kPanel), across = ceil_div(part_.columns, kLanes);
    const int64_t threads = max_of(1, num_threads);
    const int64_t blocks = min_of(panels, round_up(ceil_div(panels, kBlockPanels), threads));
    const int64_t groups = min_of(ceil_div(across, 4), ceil_div(16 * threads, blocks));  // 16 jobs a thread
    const int64_t size = part_.rows * part_.columns * part_.elements;
    parallel_chunks(blocks * groups, 1, size, num_threads, [&](int64_t job, int64_t) {
      const int64_t block = job % blocks, group = job / blocks;
      const int64_t begin = panels * block / blocks, end = panels * (block + 1) / blocks;
      for (int64_t p = across * group / groups; p < across * (group + 1) / groups; ++p) {
        const float* panel = b_panels_ + p * kLanes * part_.elements;
        // The next panel; of the last one nothing is lost.
        tiles(begin * kPanel, min_of(end * kPanel, part_.rows), p, panel, panel + kLanes * part_.elements);
      }
    });
  }

  void multiply_narrow() {
    const int64_t across = ceil_div(part_.columns, kLanes), threads = max_of(1, num_threads);
    const int64_t panel = kLanes * part_.elements, size = part_.rows * part_.columns * part_.elements;
    const int64_t groups = b.along ? min_of(across, round_up(ceil_div(across, kTogether), threads)) : across;
    const int64_t at_once = b.along ? ceil_div(part_.elements, kAtOnce) : 1;
    parallel_chunks_by_thread(groups, 1, size, num_threads, [&](int64_t group, int64_t, int thread) {
      const int64_t begin = across * group / groups, end = across * (group + 1) / groups;
      const int64_t first = begin * kLanes, count = min_of(end * kLanes, part_.columns) - first;
      float* own = b_panels_ + thread * (b.along ? kTogether : 1) * panel;
      for (int64_t job = 0; job < at_once; ++job) pack_job<kLanes>(b, part_.j + first, count, job, own);
      for (int64_t p = begin; p < end; ++p) {
        const float* from_b = own + (p - begin) * panel;
        // Likely this thread's next columns, where they lie one after the other; else what is there already.
        const bool in_line = !b.along && b.ld == k && part_.elements == elements<Kind>(k);
        const int64_t next = min_of(part_.j + (p + threads) * kLanes, n - 1);
        tiles(0, part_.rows, p, from_b, in_line ? static_cast<const void*>(b.at(next, 0)) : from_b);
      }
    });
  }

  // Rows begin … end of the part, panel p of b. The first tiles ask for as many bytes `ahead` as a panel has.
  FG_INLINE void tiles(int64_t begin, int64_t end, int64_t p, const float* from_b, const void* ahead) const {
    const int64_t left = part_.columns - p * kLanes, asking = begin + kLanes * 4 / 64 * kRows;
    with_vecs(ceil_div(left, W), [&](auto vecs) FG_LAMBDA {
      for (int64_t i = begin; i < end; i += kRows) {
        const char* line = reinterpret_cast<const char*>(from_b);
        if (i < asking) line = static_cast<const char*>(ahead) + (i - begin) / kRows * 64 * part_.elements;
        if (a.along) {
          tile<decltype(vecs)::value, true>(i, p, from_b, min_of(left, kLanes), line);
        } else {
          tile<decltype(vecs)::value, false>(i, p, from_b, min_of(left, kLanes), line);
        }
      }
    });
  }

  // Rows i … i + kRows of the part, panel p of b.
  template <int V, bool Along>
  FG_INLINE void tile(int64_t i, int64_t p, const float* from_b, int64_t columns, const char* ahead) const {
    const int64_t rows = min_of(kRows, part_.rows - i), j = part_.j + p * kLanes;
    const float* from_a =
        Along ? a_panels_ + i / kPanel * kPanel * part_.elements + i % kPanel : a_panels_ + i * row_;
    T* const to = c + (part_.i + i) * ldc + j;
    const bool first = part_.e == 0;
    if constexpr (sizeof(T) == 4) {
      if (direct_ && rows == kRows && columns == V * W) {
        into<V, Along>(from_a, from_b, to, ldc, first && !add, ahead);
        if (part_.last && bias != nullptr) {
          for (int64_t r = 0; r < kRows; ++r) {
            for (int64_t u = 0; u < V * W; u += W)
              store(to + r * ldc + u, load(to + r * ldc + u, Full{}) + load(bias + j + u, Full{}), Full{});
          }
        }
        return;
      }
    }
    alignas(64) float local[kRows * kLanes];
    const int64_t ld = sums_ != nullptr ? columns_ : kLanes;
    float* const sums = sums_ != nullptr ? sums_ + i * columns_ + p * kLanes : local;
    into<V, Along>(from_a, from_b, sums, ld, sums_ == nullptr || first, ahead);
    if (!direct_ && !part_.last) return;
    for (int64_t r = 0; r < rows; ++r) {
      T* const keep_at = kept != nullptr ? kept + (part_.i + i + r) * n + j : nullptr;
      const bool more = add || (direct_ && !first);
      finish(sums + r * ld, to + r * ldc, keep_at, part_.last && bias != nullptr ? bias + j : nullptr, more,
             columns);
    }
  }

  template <int V, bool Along>
  FG_INLINE void into(const float* from_a, const float* from_b, float* to, int64_t ld, bool fresh,
                      const char* ahead) const {
    const Constant<kLanes> ldb{};
    const auto start = [&](auto row, auto step) FG_LAMBDA {
      if (fresh) {
        product<Kind, V, Start::kZero>(from_a, row, step, from_b, ldb, part_.elements, to, ld, kRows, nullptr,
                                       ahead);
      } else {
        product<Kind, V, Start::kAddLast>(from_a, row, step, from_b, ldb, part_.elements, to, ld, kRows,
                                          nullptr, ahead);
      }
    };
    if constexpr (Along) {
      start(Constant<1>{}, Constant<kPanel>{});
    } else {
      start(row_, Constant<1>{});
    }
  }

  FG_INLINE void finish(const float* sums, T* to, T* keep_at, const T* bias_at, bool more,
                        int64_t columns) const {
    for_lanes<1>(columns, [&](int64_t j, int, auto lanes) FG_LAMBDA {
      F z = load(sums + j, lanes);
      if (more) z = z + load(to + j, lanes);
      if (keep_at != nullptr) store(keep_at + j, z, lanes);
      if (bias_at != nullptr) z = z + load(bias_at + j, lanes);
      store(to + j, activated<T>(z, activation), lanes);
    });
  }
};

}  // namespace fg::FG_LEVEL
