// The gradient of softmax, and of a mask that rows share.
#pragma once

#include "reduce.h"
#include "softmax.h"

namespace fg::FG_LEVEL {
namespace {

// dx (may be null) of one row; ds is added to dmask if that is not null: per column, or as one sum.
template <class T>
void backward_row(const Problem& a, const T* dy, const T* p, T* dx, float* dmask, bool one_column, float* g,
                  int64_t row, bool streaming) {
  const int64_t n = a.visible(row), at = row * a.cols;
  const T* written = streaming || dx == nullptr ? p + at : dx + at;  // asked for while the row is read
  float inner;
  if (a.dropping) {
    inner = sum_lanes(n, [&](int64_t j, auto lanes) FG_LAMBDA {
      prefetch(written + j);
      const F dropped = a.dropout.apply(load(dy + at + j, lanes), at + j);
      store(g + j, dropped, lanes);
      return keep(dropped * load(p + at + j, lanes), lanes, set(0.0f));
    });
  } else {
    inner = sum_lanes<kTwice<T>>(n, [&](int64_t j, auto lanes) FG_LAMBDA {
      prefetch(written + j);
      return keep(load(dy + at + j, lanes) * load(p + at + j, lanes), lanes, set(0.0f));
    });
  }
  const F center = set(inner), scale = set(a.scale);
  const auto write = [&](const auto* gradient) FG_LAMBDA {
    for_lanes_out<2, kTwice<T>>(dx + (dx != nullptr ? at : 0), n, streaming && dx != nullptr,
                                [&](int64_t j, int, auto lanes) FG_LAMBDA {
                                  const auto ds =
                                      load(p + at + j, lanes) * (load(gradient + j, lanes) - center);
                                  prefetch(dy + at + a.cols + j);
                                  prefetch(p + at + a.cols + j);
                                  if (dx != nullptr) put(dx + at + j, ds * scale, lanes);
                                  if (dmask != nullptr && !one_column)
                                    store(dmask + j, load(dmask + j, lanes) + ds, lanes);
                                });
    if (dmask != nullptr && one_column) {
      *dmask += sum_lanes(n, [&](int64_t j, auto lanes) FG_LAMBDA {
        return keep(load(p + at + j, lanes) * (load(gradient + j, lanes) - center), lanes, set(0.0f));
      });
    }
  };
  if (a.dropping) {
    write(static_cast<const float*>(g));
  } else {
    write(dy + at);
  }
  if (dx != nullptr) fill_zero(dx + at, n, a.cols, streaming);
}

// Rows of x that share a row of the mask: the split of the row index over up to four dimensions, of which
// `shared` (bit d for dimension d) are those the mask is broadcast over.
struct Sharing {
  int64_t size[4];
  int shared;
  int64_t groups() const { return product(false); }
  int64_t members() const { return product(true); }
  int64_t row(int64_t group, int64_t member) const {
    int64_t row = 0, step = 1;
    for (int d = 3; d >= 0; --d) {
      int64_t& from = (shared >> d & 1) != 0 ? member : group;
      row += from % size[d] * step;
      from /= size[d];
      step *= size[d];
    }
    return row;
  }

 private:
  int64_t product(bool of_shared) const {
    int64_t result = 1;
    for (int d = 0; d < 4; ++d) result *= ((shared >> d & 1) != 0) == of_shared ? size[d] : 1;
    return result;
  }
};

template <class T, class MaskType>
void backward_masked(const Problem& a, const T* dy, const T* p, T* dx, MaskType* dmask, int64_t mask_cols,
                     const Sharing& sharing, int num_threads) {
  const int64_t groups = sharing.groups(), members = sharing.members();
  // Many mask rows: one part each. Few: the rows that share one are split as well, or there would be no
  // parallel work.
  const int64_t wanted =
      groups >= 64 ? 1 : max_of(1, min_of(ceil_div(64, max_of(1, groups)), ceil_div(members, 8)));
  const int64_t size = max_of(1, ceil_div(members, wanted)), parts = max_of(1, ceil_div(members, size));
  Scratch sums(parts == 1 ? 0 : groups * parts * mask_cols);
  const int64_t chunk = max_of(1, rows_per_chunk(a.rows, a.cols, num_threads) / size);
  parallel_chunks(groups * parts, chunk, a.rows * a.cols, num_threads, [&](int64_t begin, int64_t end) {
    const Streaming streaming(a.streamed(dx, true));
    Scratch block(mask_cols), part(mask_cols), g(a.dropping ? a.cols : 0);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t group = unit / parts, first = unit % parts * size, last = min_of(first + size, members);
      float* own = parts == 1 ? part.data : sums.data + unit * mask_cols;
      fill_zero(own, 0, mask_cols);
      for (int64_t m = first; m < last; m += kFlushRows) {
        fill_zero(block.data, 0, mask_cols);
        for (int64_t k = m; k < min_of(m + kFlushRows, last); ++k) {
          backward_row(a, dy, p, dx, block.data, mask_cols == 1 && a.cols != 1, g.data, sharing.row(group, k),
                       streaming.on);
        }
        add_into(own, block.data, mask_cols);
      }
      if (parts == 1) reduce_parts(own, 1, 0, mask_cols, dmask + group * mask_cols, 1);
    }
  });
  if (parts == 1) return;
  for (int64_t group = 0; group < groups; ++group) {
    reduce_parts(sums.data + group * parts * mask_cols, parts, mask_cols, mask_cols,
                 dmask + group * mask_cols, num_threads);
  }
}

}  // namespace
}  // namespace fg::FG_LEVEL
