// The product of few rows with a matrix: what a step of few sequences does with W_hh. The library's kernels
// are made for many rows; those that it takes for 5 to 16 need up to twenty times as long as this.
//
// A block has a tile of the product. Its threads share the depth, and each adds up its part of all the
// tile's sums; these are added up over warps by halves, and over the block in shared memory, always in the
// same order.
//
// Who includes this has the primitives: cuda/device.cuh or user_cell/device.cuh.
#pragma once

#include "few_rows.h"
#include "host_device.h"
#include "unrolled.cuh"

namespace fastbptt {
namespace {

template <int n>
struct alignas(n * sizeof(float)) Floats {
  float values[n];
};

// Collective over the warp: what each of `count` values is, summed over the lanes. Each lane gets as many
// of them as there are for each, or two lanes and more get the same one; values[0] is then that of
// place lane * count / kWarp.
template <int count, int mask = kWarp / 2>
__device__ __forceinline__ void sum_over_warp(float* values) {
  if constexpr (mask > 0) {
    constexpr int kept = count > 1 ? count / 2 : 1;
    if constexpr (count > 1) {
      const bool is_upper = threadIdx.x & mask;
      FASTBPTT_UNROLL
      for (int i = 0; i < kept; ++i) {
        const float own = is_upper ? values[i + kept] : values[i];
        const float sent = is_upper ? values[i] : values[i + kept];
        values[i] = own + shuffle_xor(sent, mask);
      }
    } else {
      values[0] += shuffle_xor(values[0], mask);
    }
    sum_over_warp<kept, mask / 2>(values);
  }
}

template <int kRows, int kColumns, int kVector>
__device__ __forceinline__ void multiply_few_rows(const FewRowsProduct& p) {
  constexpr int kSums = kRows * kColumns;
  constexpr int kOwn = kSums > kWarp ? kSums / kWarp : 1,
                kSharers = kSums < kWarp ? kWarp / kSums : 1;
  using Vector = Floats<kVector>;
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int first_row = int(blockIdx.y) * kRows, first = int(blockIdx.x) * kColumns;
  // Beyond the last one it is once more the last one, whose sums nobody stores.
  const float *row[kRows], *column[kColumns];
  unrolled<kRows>([&](auto r) {
    const int at = first_row + r;
    row[r] = p.rows + p.ld_rows * (at < p.count ? at : p.count - 1);
  });
  unrolled<kColumns>([&](auto c) {
    const int at = first + c;
    column[c] = p.weight + p.ld_weight * (at < p.columns ? at : p.columns - 1);
  });

  float sums[kSums] = {};
  for (int k = int(threadIdx.x) * kVector; k < p.depth; k += int(blockDim.x) * kVector) {
    Vector weights[kColumns];
    unrolled<kColumns>(
        [&](auto c) { weights[c] = *reinterpret_cast<const Vector*>(column[c] + k); });
    unrolled<kRows>([&](auto r) {
      const Vector x = *reinterpret_cast<const Vector*>(row[r] + k);
      unrolled<kColumns>([&](auto c) {
        unrolled<kVector>(
            [&](auto j) { sums[r * kColumns + c] += weights[c].values[j] * x.values[j]; });
      });
    });
  }
  sum_over_warp<kSums>(sums);

  float* const shared = reinterpret_cast<float*>(dynamic_shared());  // [warps, kSums]
  if (lane % kSharers == 0) {
    unrolled<kOwn>([&](auto i) { shared[warp * kSums + lane / kSharers * kOwn + i] = sums[i]; });
  }
  sync_block();
  for (int i = int(threadIdx.x); i < kSums; i += int(blockDim.x)) {
    const int r = first_row + i / kColumns, c = first + i % kColumns;
    float sum = 0;
    for (int w = 0; w < int(blockDim.x) / kWarp; ++w) sum += shared[w * kSums + i];
    if (r < p.count && c < p.columns) p.out[r * p.ld_out + c] = sum;
  }
}

}  // namespace
}  // namespace fastbptt
