// The kernels of probe.cu. In each a value is handed from thread to thread, so that no step can begin
// before the last one's exchange is over.
#pragma once

#include <cooperative_groups.h>

#include "cuda/device.cuh"
#include "host_device.h"

namespace {

using namespace fastbptt;

struct Args {
  int steps;
  int* word;        // zero; cluster kernels write 1 if they were compiled for a card with clusters
  uint32_t* flags;  // zeros, one for each block
  uint4* buffer;    // zeros, two of `bytes`
  int bytes;        // that a block receives in a step
};

__global__ void empty_kernel() {}

// A step: 1000 cycles of the multiprocessor's clock.
constexpr int kCycles = 1000;
__global__ void cycles_kernel(Args a) {
  const long long begin = clock64();
  while (clock64() - begin < static_cast<long long>(kCycles) * a.steps) {
  }
}

// A step: a barrier and nothing else.
__global__ void block_barrier_kernel(Args a) {
  for (int k = 0; k < a.steps; ++k) sync_block();
}

// A step: every thread writes a value, waits, and reads its neighbour's from shared memory.
__global__ void block_exchange_kernel(Args a) {
  __shared__ int h[2][1024];
  int value = threadIdx.x;
  const int peer = (threadIdx.x + 33) % blockDim.x;
  for (int k = 0; k < a.steps; ++k) {
    h[k & 1][threadIdx.x] = value;
    sync_block();
    value = h[k & 1][peer] + 1;
  }
  if (value < 0) *a.word = value;
}

__global__ void cluster_barrier_kernel(Args a) {
  if constexpr (kHasClusters) {
    for (int k = 0; k < a.steps; ++k) sync_cluster();
    if (blockIdx.x + threadIdx.x == 0) *a.word = 1;
  }
}

// A step: every block puts a value a thread into the next block's shared memory; cluster barrier.
__global__ void cluster_exchange_kernel(Args a) {
  if constexpr (kHasClusters) {
    __shared__ int h[2][1024];
    int value = threadIdx.x;
    int* const remote = map_shared(&h[0][threadIdx.x], (cluster_rank() + 1) % cluster_size());
    sync_cluster();
    for (int k = 0; k < a.steps; ++k) {
      remote[(k & 1) * 1024] = value;
      sync_cluster();
      value = h[k & 1][threadIdx.x] + 1;
    }
    sync_cluster();  // a peer may still write here
    if (blockIdx.x + threadIdx.x == 0) *a.word = value < 0 ? 2 : 1;
  }
}

// A step: every block pushes its part of so many bytes to each block of the cluster, itself too, 8 at
// a time; stores that complete on the receiver's barrier, as the recurrence's. A thread has one peer.
__global__ void cluster_push_kernel(Args a) {
  if constexpr (kHasClusters) {
    using Group = Packed<int, 2>;
    const int size = cluster_size(), peer = threadIdx.x % size, count = a.bytes / 8;
    auto* const barriers = reinterpret_cast<Barrier*>(dynamic_shared());
    auto* const x = reinterpret_cast<Group*>(dynamic_shared() + 128);
    if (threadIdx.x == 0) {
      barrier_init(&barriers[0], 1);
      barrier_init(&barriers[1], 1);
      fence_barrier_init();
    }
    for (int i = threadIdx.x; i < 2 * count; i += blockDim.x) x[i] = {};
    sync_cluster();
    Group* const to = map_shared(x, peer) + cluster_rank() * (count / size);
    Barrier* const to_barriers = map_shared(barriers, peer);
    int value = 0;
    for (int k = 0; k < a.steps; ++k) {
      const int now = k & 1, next = now ^ 1;
      if (k > 0) barrier_wait(&barriers[now], (k - 1) >> 1 & 1);
      value = x[now * count + threadIdx.x % count].values[0] + 1;
      sync_block();  // all have read, and what is pushed next says so
      if (k + 1 == a.steps) break;
      if (threadIdx.x == 0) barrier_arrive_expect_bytes(&barriers[next], a.bytes);
      for (int i = threadIdx.x / size; i < count / size; i += blockDim.x / size) {
        store_async(to + next * count + i, Group{{value, value}}, to_barriers + next);
      }
    }
    sync_cluster();
    if (blockIdx.x + threadIdx.x == 0) *a.word = value < 0 ? 2 : 1;
  }
}

// A step: every warp multiplies so many tiles of 16 x 16 numbers, held in registers, by x of 8 lanes
// in shared memory, and reads the next x where the sums say.
template <int tiles>
__global__ void product_kernel(Args a) {
  __shared__ alignas(16) uint16_t x[kWarp][16 * tiles + 8];
  const int thread = threadIdx.x % kWarp;
  for (unsigned i = threadIdx.x; i < sizeof(x) / 2; i += blockDim.x) (&x[0][0])[i] = 0;
  uint32_t w[tiles][4];
  FASTBPTT_UNROLL
  for (int j = 0; j < 4 * tiles; ++j) {
    w[j / 4][j % 4] = reinterpret_cast<const uint32_t*>(a.buffer)[j * kWarp + thread];
  }
  sync_block();
  const uint16_t* from = &x[thread % 8][thread / 8 * 8];
  for (int k = 0; k < a.steps; ++k) {
    float sums[2][4] = {};
    FASTBPTT_UNROLL
    for (int j = 0; j < tiles; j += 2) {
      uint32_t matrices[4];
      load_matrix_x4(matrices, from + 16 * j);
      mma_m16n8k16<half_t>(sums[0], w[j], {matrices[0], matrices[1]});
      mma_m16n8k16<half_t>(sums[1], w[j + 1], {matrices[2], matrices[3]});
    }
    if (sums[0][0] + sums[1][3] != 0) from = &x[8][0];  // never
  }
  if (from == &x[8][0]) *a.word = 1;
}

// What a persistent kernel asks of a multiprocessor, for the occupancy query: 512 threads with as many
// registers as they can have. Never run.
constexpr int kThreads = 512;
__global__ __launch_bounds__(kThreads, 1) void persistent_shape_kernel(Args a) {
  constexpr int kValues = 116;
  auto* const memory = reinterpret_cast<volatile float*>(a.buffer);
  float values[kValues];
  FASTBPTT_UNROLL
  for (int i = 0; i < kValues; ++i) values[i] = memory[i * kThreads + threadIdx.x];
  for (int k = 0; k < a.steps; ++k) {
    sync_block();
    FASTBPTT_UNROLL
    for (int i = 0; i < kValues; ++i) values[i] += values[(i + 1) % kValues] * values[i];
  }
  FASTBPTT_UNROLL
  for (int i = 0; i < kValues; ++i) memory[i * kThreads + threadIdx.x] = values[i];
}

// A step: a barrier over all blocks, by cooperative groups.
__global__ void grid_barrier_kernel(Args a) {
  cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  for (int k = 0; k < a.steps; ++k) grid.sync();
}

// A step: a barrier over all blocks, by one counter that only grows.
__global__ void grid_counter_kernel(Args a) {
  for (int k = 1; k <= a.steps; ++k) {
    sync_block();
    if (threadIdx.x == 0) {
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(a.flags) : "memory");
      uint32_t seen = 0;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(a.flags) : "memory");
      } while (seen < k * gridDim.x);
    }
    sync_block();
  }
}

// A step: every block waits for a flag of each block, reads what all have written, `bytes` in all past
// L1, writes its own part of the next step's and raises its flag.
__global__ void grid_exchange_kernel(Args a) {
  const int count = a.bytes / 16, own = count / gridDim.x;
  uint32_t value = 0;
  for (int k = 1; k <= a.steps; ++k) {
    for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) {
      uint32_t seen = 0;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                     : "=r"(seen)
                     : "l"(a.flags + i)
                     : "memory");
      } while (seen + 1 < k);
    }
    sync_block();
    const uint4* const from = a.buffer + ((k - 1) & 1) * count;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      uint4 v;
      asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "l"(from + i)
                   : "memory");
      value += v.x + v.w;
    }
    if (threadIdx.x < own) {
      a.buffer[(k & 1) * count + blockIdx.x * own + threadIdx.x] = {value, 1, 2, value};
    }
    sync_block();
    if (threadIdx.x == 0) {
      asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(a.flags + blockIdx.x), "r"(k)
                   : "memory");
    }
  }
  if (value == 1) *a.word = 1;
}

}  // namespace
