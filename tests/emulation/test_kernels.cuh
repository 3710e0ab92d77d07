// Small kernels that use the primitives, and the same kernels with a fault each: what is wrong with
// them stands at `kFault ==`.
#pragma once

#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace fastbptt::test {

enum class Fault {
  kNone,
  kMissingBarrier,
  kDivergentBarrier,
  kEarlyExit,
  kSharedBounds,
  kGlobalBounds,
  kDivergentShuffle,
};

// y[b] = sum of x[b * threads .. + threads), by halves in shared memory.
template <Fault kFault>
__global__ void block_sum_kernel(const float* x, float* y) {
  float* sums = reinterpret_cast<float*>(dynamic_shared());  // [threads]
  const int i = int(threadIdx.x), threads = int(blockDim.x);
  if (kFault == Fault::kEarlyExit && i == threads - 1) return;
  sums[kFault == Fault::kSharedBounds ? i + 1 : i] = x[blockIdx.x * blockDim.x + threadIdx.x];
  if (kFault == Fault::kDivergentBarrier && i < 32) {
    sync_block();
  } else if (kFault != Fault::kMissingBarrier) {
    sync_block();
  }
  for (int half = threads / 2; half > 0; half /= 2) {
    if (i < half) sums[i] += sums[i + half];
    sync_block();
  }
  if (i == 0) y[kFault == Fault::kGlobalBounds ? gridDim.x : blockIdx.x] = sums[0];
}

// The same for a warp, by shuffles.
template <Fault kFault>
__global__ void warp_sum_kernel(const float* x, float* y) {
  const int lane = int(threadIdx.x) % kWarp;
  float down = x[blockIdx.x * blockDim.x + threadIdx.x], across = down;
  for (int step = kWarp / 2; step > 0; step /= 2) {
    if (kFault == Fault::kDivergentShuffle && lane >= 16 && step < 16) continue;
    down += shuffle_down(down, step);
    across += shuffle_xor(across, step);
  }
  down = shuffle(down, 0);
  sync_warp();
  y[blockIdx.x * blockDim.x + threadIdx.x] = lane % 2 ? down : across;
}

}  // namespace fastbptt::test
