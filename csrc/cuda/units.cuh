// Kernels in which a thread takes one unit of one row at a time, units fastest: a warp reads and
// writes neighbours.
#pragma once

#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace fastbptt {
namespace {

constexpr int kUnitThreads = 128;  // of a block
constexpr int kTileUnits = kWarp;  // of a block: one warp's
constexpr int kTileRows = kUnitThreads / kTileUnits;

// Calls fn(row, unit) for those of [0, rows) x [0, units) that are the thread's.
template <typename Fn>
__device__ __forceinline__ void for_each_unit(int64_t rows, int64_t units, Fn&& fn) {
  const int64_t unit = int64_t(blockIdx.x) * kTileUnits + threadIdx.x % kTileUnits;
  if (unit >= units) return;
  const int64_t stride = int64_t(gridDim.y) * kTileRows;
  for (int64_t row = int64_t(blockIdx.y) * kTileRows + threadIdx.x / kTileUnits; row < rows;
       row += stride) {
    fn(row, unit);
  }
}

// Blocks for it.
inline Grid grid_for(int64_t rows, int64_t units) {
  constexpr int64_t kMostBlocks = 1 << 15;  // along y CUDA takes 65,535
  const int64_t row_tiles = (rows + kTileRows - 1) / kTileRows;
  return {
      {(units + kTileUnits - 1) / kTileUnits, row_tiles < kMostBlocks ? row_tiles : kMostBlocks},
      kUnitThreads};
}

}  // namespace
}  // namespace fastbptt
