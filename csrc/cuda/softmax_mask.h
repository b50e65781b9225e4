// The gradient of softmax's float mask: ds = p * (g - sum p g) summed over the rows that share a row of the
// mask.
//
// Two stages in a fixed order, whatever the device: every part of a group's members is summed by its own
// warps, then the parts are. ds is computed anew from dy, p and what softmax_bwd left per row.
#pragma once

#include "launch.h"
#include "softmax.h"

namespace fg::FG_LEVEL {
namespace {

struct MaskGradient {
  Problem problem;
  Sharing sharing;
  const void *dy, *p;
  const float* sums;  // [rows, 2]: sum p g, sum ds
  void* dmask;        // [groups, mask_cols]
  float* partial;     // [groups, parts, mask_cols], if there are several parts
  bool fp32;          // dmask's dtype; else it is p's
  int64_t mask_cols, groups, members, parts;

  template <class T>
  FG_DEVICE void store(int64_t at, float value) const {
    if (fp32) {
      static_cast<float*>(dmask)[at] = value;
    } else {
      static_cast<T*>(dmask)[at] = from_float<T>(value);
    }
  }
};

constexpr int kMaskWarps = 8;  // of a block
constexpr int kRun = 32;       // terms that are added one after the other, before they are added to the rest

// ds of one element.
template <class T>
FG_DEVICE float gradient_at(const MaskGradient& a, int64_t row, int64_t column) {
  if (column >= a.problem.visible(row)) return 0.0f;
  const int64_t at = row * a.problem.cols + column;
  float g = to_float(static_cast<const T*>(a.dy)[at]);
  if (a.problem.rng != nullptr) g = a.problem.dropped(g, kept_bits<1, 1>(a.problem, at, 0) != 0);
  return to_float(static_cast<const T*>(a.p)[at]) * (g - a.sums[2 * row]);
}

// `splits` warps of a block share a unit: 32 columns of a part of a group. Of a mask with one column the
// lanes take the members instead.
template <class T>
__global__ void __launch_bounds__(kMaskWarps* kWarpSize)
    softmax_bwd_mask_kernel(const MaskGradient a, int splits) {
  __shared__ float sums[kMaskWarps][kWarpSize];
  const bool one_column = a.mask_cols == 1;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize,
            lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int split = warp % splits;
  const int64_t tiles = (a.mask_cols + kWarpSize - 1) / kWarpSize, units = a.groups * a.parts * tiles;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * (kMaskWarps / splits) + warp / splits;
  const int64_t part = unit / tiles % a.parts, group = unit / tiles / a.parts;
  const int64_t column = one_column ? 0 : unit % tiles * kWarpSize + lane;
  const bool exists = unit < units && column < a.mask_cols;

  float sum = 0.0f;
  if (exists) {
    const int64_t size = (a.members + a.parts - 1) / a.parts, last = (part + 1) * size;
    const int64_t end = last < a.members ? last : a.members;
    const int64_t step = one_column ? splits * kWarpSize : splits;
    const int64_t group_row = a.sharing.part_of_row(group, false);
    int64_t member = part * size + (one_column ? split * kWarpSize + lane : split);
    while (member < end) {
      float run = 0.0f;
      for (int i = 0; i < kRun && member < end; ++i, member += step) {
        const int64_t row = group_row + a.sharing.part_of_row(member, true);
        run += one_column ? a.sums[2 * row + 1] : gradient_at<T>(a, row, column);
      }
      sum += run;
    }
  }
  if (one_column) sum = warp_reduce(sum, Add());
  sums[warp][lane] = sum;
  __syncthreads();
  if (!exists || split != 0 || (one_column && lane != 0)) return;
  for (int s = 1; s < splits; ++s) sum += sums[warp + s][lane];
  if (a.parts == 1) {
    a.template store<T>(group * a.mask_cols + column, sum);
  } else {
    a.partial[(group * a.parts + part) * a.mask_cols + column] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(256) softmax_bwd_mask_parts_kernel(const MaskGradient a) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= a.groups * a.mask_cols) return;
  const int64_t group = at / a.mask_cols, column = at % a.mask_cols;
  const float* partial = a.partial + group * a.parts * a.mask_cols + column;
  float sum = 0.0f;
  for (int64_t part = 0; part < a.parts; part += kRun) {
    float run = 0.0f;
    for (int64_t i = part; i < part + kRun && i < a.parts; ++i) run += partial[i * a.mask_cols];
    sum += run;
  }
  a.store<T>(at, sum);
}

template <class T>
void launch_mask_gradient(const Stream& on, const MaskGradient& a) {
  const int64_t in_a_part = ceil_div(a.members, a.parts);
  const int64_t wanted = a.mask_cols == 1 ? ceil_div(in_a_part, kWarpSize) : in_a_part;
  int splits = 1;
  while (splits < kMaskWarps && splits < wanted) splits *= 2;
  const int64_t units = a.groups * a.parts * ceil_div(a.mask_cols, kWarpSize);
  on.launch(softmax_bwd_mask_kernel<T>, ceil_div(units, kMaskWarps / splits), kMaskWarps * kWarpSize, 0, a,
            splits);
  if (a.parts > 1)
    on.launch(softmax_bwd_mask_parts_kernel<T>, ceil_div(a.groups * a.mask_cols, 256), 256, 0, a);
}

}  // namespace
}  // namespace fg::FG_LEVEL
