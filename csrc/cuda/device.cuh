// What kernels are written with: the primitives whose bodies differ between nvcc and the test-only
// emulation (tests/emulation), which runs the same kernels as C++. A kernel uses these, CUDA's
// qualifiers, threadIdx, blockIdx, blockDim and gridDim (blocks are one-dimensional), and nothing else
// of CUDA; all of its shared memory is dynamic.
//
// "Collective" means that all threads of the warp (the block, the cluster) must call it, at the same
// place of the source. A warp is kWarp consecutive threads; blocks that use a warp's collectives have
// a multiple of kWarp threads.
#pragma once

#include <cstdint>

#include "cuda/numbers.h"
#include "grid.h"

namespace fastbptt {

// n numbers that are loaded and stored by one instruction, from memory that is aligned to all of them.
template <typename T, int n>
struct alignas(n * sizeof(T)) Packed {
  T values[n];
};

}  // namespace fastbptt

#ifdef FASTBPTT_EMULATED
#include "emulation/device.h"
#else

#include <cuda_runtime.h>

namespace fastbptt {

// --- Numbers -------------------------------------------------------------------------------------

__device__ __forceinline__ double to_acc(double x) { return x; }
__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ float to_acc(half_t x) { return __half2float(x); }
__device__ __forceinline__ float to_acc(bfloat16_t x) { return __bfloat162float(x); }

// Rounds to the nearest; ties to even.
template <typename scalar_t>
__device__ __forceinline__ scalar_t from_acc(Accumulator<scalar_t> x) {
  return x;
}
template <>
__device__ __forceinline__ half_t from_acc<half_t>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ bfloat16_t from_acc<bfloat16_t>(float x) {
  return __float2bfloat16_rn(x);
}

// 2^x, relative error 2^-22; subnormal results are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// tanh(x), relative error 2^-11: enough for 16-bit results only.
__device__ __forceinline__ float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1/x, error 1 ulp; subnormal arguments count as 0.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x, as if the compiler could not know it: what depends on it is computed where it stands, and not once
// before a loop, to be kept in registers that the loop needs.
template <typename T>
__device__ __forceinline__ T opaque(T x) {
  static_assert(sizeof(T) == 4, "of 32 bits");
  asm volatile("" : "+r"(x));
  return x;
}

// --- Block and warp ------------------------------------------------------------------------------

// The block's shared memory, as many bytes as its launch asked for, aligned to 128. Undefined until
// written.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  return shared_bytes;
}

// Where it begins, in a form that fits a register, and the place so many bytes behind.
using SharedBase = uint32_t;
__device__ __forceinline__ SharedBase shared_base() {
  return uint32_t(__cvta_generic_to_shared(dynamic_shared()));
}
template <typename T>
__device__ __forceinline__ T* shared_at(SharedBase base, int offset) {
  return static_cast<T*>(__cvta_shared_to_generic(base + uint32_t(offset)));
}

// Collective over the block: what its threads wrote before, to shared or global memory, its threads
// see afterwards.
__device__ __forceinline__ void sync_block() { __syncthreads(); }

// The same for the block's first threads alone, a multiple of kWarp: collective over them.
__device__ __forceinline__ void sync_first(int threads) {
  asm volatile("barrier.sync 1, %0;" ::"r"(threads) : "memory");
}

// The same for a warp.
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// Collective over the warp: v of lane src (modulo kWarp), of lane own ^ mask, and of lane own + delta
// (the own v where there is no such lane). T: a number of 4 or 8 bytes. Orders no memory accesses.
template <typename T>
__device__ __forceinline__ T shuffle(T v, int src) {
  return __shfl_sync(0xffffffffu, v, src);
}
template <typename T>
__device__ __forceinline__ T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
template <typename T>
__device__ __forceinline__ T shuffle_down(T v, int delta) {
  return __shfl_down_sync(0xffffffffu, v, delta);
}

}  // namespace fastbptt

#endif

#include "async.cuh"
#include "cluster.cuh"
#include "flags.cuh"
#include "mma.cuh"
