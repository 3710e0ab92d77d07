// What the kernels of a user's cell are written with, for NVRTC, for nvcc and for the test-only emulation:
// the value type is a number, and a block's threads add up. NVRTC has no headers but the package's.
#pragma once

#include "scalar.h"
#include "user_cell/operations.h"

#ifdef FASTBPTT_EMULATED
#include "emulation/device.h"
#else

namespace fastbptt {

constexpr int kWarp = 32;  // threads

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  return shared_bytes;
}
__device__ __forceinline__ void sync_block() { __syncthreads(); }
template <typename T>
__device__ __forceinline__ T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}

}  // namespace fastbptt

#endif

// Needs the qualifiers.
#include "unrolled.cuh"

namespace fastbptt {
namespace {

template <>
struct Bits<float> : FloatBits {};
template <>
struct Bits<double> : DoubleBits {};

template <typename V>
__device__ inline V square_root(V x) {
  return math::sqrt(x);
}
template <typename V>
__device__ inline V log_of(V x) {
  return math::log(x);
}
template <typename V>
__device__ inline V log1p_of(V x) {
  return math::log1p(x);
}
template <typename V>
__device__ inline V erf_of(V x) {
  return math::erf(x);
}
template <typename V>
__device__ inline V sine(V x) {
  return math::sin(x);
}
template <typename V>
__device__ inline V cosine(V x) {
  return math::cos(x);
}
template <typename V>
__device__ inline V power_of(V x, double exponent) {
  return math::pow(x, V(exponent));
}

// Collective over the block, of whole warps: each of the `count` values becomes its sum over all threads,
// always in the same order. Takes shared memory of count values a warp.
template <int count, typename V>
__device__ void sum_over_block(V* values) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  V* const shared = reinterpret_cast<V*>(dynamic_shared());
  sync_block();  // for those who still read the sums before
  for (int i = 0; i < count; ++i) {
    for (int mask = kWarp / 2; mask > 0; mask /= 2) values[i] += shuffle_xor(values[i], mask);
    if (lane == 0) shared[warp * count + i] = values[i];
  }
  sync_block();
  for (int i = 0; i < count; ++i) {
    values[i] = 0;
    for (int w = 0; w < int(blockDim.x) / kWarp; ++w) values[i] += shared[w * count + i];
  }
}

}  // namespace
}  // namespace fastbptt
