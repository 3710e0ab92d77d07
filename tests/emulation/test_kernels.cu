// Small kernels that use the primitives, right ones and with a fault on purpose.
#include "emulation/test_kernels.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#include "cuda/device.cuh"

namespace fastbptt::test {
namespace {

__global__ void block_sum_kernel(const float* x, float* y, Fault fault) {
  float* sums = reinterpret_cast<float*>(dynamic_shared());  // [threads]
  const int i = int(threadIdx.x), threads = int(blockDim.x);
  if (fault == Fault::kEarlyExit && i == threads - 1) return;
  sums[fault == Fault::kSharedBounds ? i + 1 : i] = x[blockIdx.x * blockDim.x + threadIdx.x];
  if (fault == Fault::kDivergentBarrier && i < kWarp) {
    sync_block();
  } else if (fault != Fault::kMissingBarrier) {
    sync_block();
  }
  for (int half = threads / 2; half > 0; half /= 2) {
    if (i < half) sums[i] += sums[i + half];
    if (half < kWarp) {
      sync_block();
    } else if (i < half || fault == Fault::kOutsider) {  // no others read what these have written
      sync_first(fault == Fault::kOtherCount && i < kWarp ? kWarp : half);
    }
  }
  if (i == 0) y[fault == Fault::kGlobalBounds ? gridDim.x : blockIdx.x] = sums[0];
}

__global__ void warp_sum_kernel(const float* x, float* y, Fault fault) {
  const int lane = int(threadIdx.x) % kWarp;
  float down = x[blockIdx.x * blockDim.x + threadIdx.x], across = down;
  for (int step = kWarp / 2; step > 0; step /= 2) {
    if (fault == Fault::kDivergentShuffle && lane >= 16 && step < 16) continue;
    down += shuffle_down(down, step);
    across += shuffle_xor(across, step);
  }
  down = shuffle(down, 0);
  sync_warp();
  y[blockIdx.x * blockDim.x + threadIdx.x] = lane % 2 ? down : across;
}

__global__ void reversed_tiles_kernel(const float* x, float* y, int steps, int valid, Fault fault) {
  using Four = Packed<float, 4>;
  const int i = int(threadIdx.x), threads = int(blockDim.x);
  Four* tiles = reinterpret_cast<Four*>(dynamic_shared());  // [2, threads]
  const auto prefetch = [&](int t) {
    if (t < steps) {
      copy_async<16>(&tiles[t % 2 * threads + i], x + (int64_t(t) * threads + i) * 4, t < valid);
    }
    commit_async();  // empty at the end, so that one group is ahead in every step
  };
  prefetch(0);
  for (int t = 0; t < steps; ++t) {
    prefetch(t + 1);
    if (fault != Fault::kMissingWait) wait_async<1>();
    if (fault != Fault::kMissingBarrier) sync_block();  // everybody's copies are there
    reinterpret_cast<Four*>(y)[int64_t(t) * threads + i] = tiles[t % 2 * threads + threads - 1 - i];
    if (fault != Fault::kMissingBarrierAfter) sync_block();  // before the tile is copied to again
  }
}

// Two neighbours of a 16-bit matrix as one register.
template <typename scalar_t>
__device__ __forceinline__ uint32_t pair_of(scalar_t low, scalar_t high) {
  return pack_pair<scalar_t>(to_acc(low), to_acc(high));
}

// One warp.
template <typename scalar_t>
__global__ void product_kernel(const scalar_t* a, const scalar_t* b, float* d, bool by_load_matrix,
                               Fault fault) {
  constexpr bool kTf32 = std::is_same_v<scalar_t, float>;
  constexpr int K = kTf32 ? 8 : 16, kChunk = 16 / int(sizeof(scalar_t));
  const int lane = int(threadIdx.x), group = lane / 4, place = lane % 4;
  uint32_t fragment_a[4], fragment_b[2];
  if (by_load_matrix) {
    scalar_t* rows_a = reinterpret_cast<scalar_t*>(dynamic_shared());  // [16, K]
    scalar_t* rows_b = rows_a + 16 * K;                                // [K, 8]
    for (int i = lane; i < 16 * K; i += kWarp) rows_a[i] = a[i];
    for (int i = lane; i < K * 8; i += kWarp) rows_b[i] = b[i];
    sync_warp();
    load_matrix_x4(fragment_a, rows_a + lane % 16 * K + lane / 16 * kChunk);
    if constexpr (kTf32) {  // 32-bit numbers cannot be transposed
      for (int i = 0; i < 2; ++i) {
        memcpy(&fragment_b[i], &rows_b[(place + 4 * i) * 8 + group], sizeof(float));
      }
    } else {
      uint32_t twice[4];  // the same two matrices twice
      load_matrix_x4_transposed(twice, rows_b + lane % 16 * 8);
      fragment_b[0] = twice[0];
      fragment_b[1] = twice[1];
    }
  } else if constexpr (kTf32) {
    for (int i = 0; i < 4; ++i) {
      memcpy(&fragment_a[i], &a[(group + 8 * (i % 2)) * K + place + 4 * (i / 2)], sizeof(float));
    }
    for (int i = 0; i < 2; ++i) {
      memcpy(&fragment_b[i], &b[(place + 4 * i) * 8 + group], sizeof(float));
    }
  } else {
    for (int i = 0; i < 4; ++i) {
      const scalar_t* p = a + (group + 8 * (i % 2)) * K + 2 * place + 8 * (i / 2);
      fragment_a[i] = pair_of(p[0], p[1]);
    }
    for (int i = 0; i < 2; ++i) {
      const scalar_t* p = b + (2 * place + 8 * i) * 8 + group;
      fragment_b[i] = pair_of(p[0], p[8]);
    }
  }

  float sums[4] = {};
  if constexpr (kTf32) {
    for (uint32_t& bits : fragment_a) {
      float x;
      memcpy(&x, &bits, sizeof x);
      if (fault != Fault::kNotRounded) bits = round_to_tf32(x);
    }
    for (uint32_t& bits : fragment_b) {
      float x;
      memcpy(&x, &bits, sizeof x);
      bits = round_to_tf32(x);
    }
    mma_m16n8k8(sums, fragment_a, fragment_b);
  } else {
    mma_m16n8k16<scalar_t>(sums, fragment_a, fragment_b);
  }
  for (int i = 0; i < 4; ++i) d[(group + 8 * (i / 2)) * 8 + 2 * place + i % 2] = sums[i];
}

__global__ void gather_kernel(const float* x, float* y, Fault fault) {
  float* own = reinterpret_cast<float*>(dynamic_shared());  // [threads]
  const int i = int(threadIdx.x), size = cluster_size();
  own[i] = x[blockIdx.x * blockDim.x + threadIdx.x];
  if (fault == Fault::kDivergentCluster && i < kWarp / 2) {
    sync_cluster();
  } else if (fault != Fault::kMissingBarrier) {
    sync_cluster();
  }
  float sum = 0;
  for (int rank = 0; rank < size; ++rank) sum += *map_shared(own + i, rank);
  y[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  if (fault != Fault::kMissingBarrierAfter) sync_cluster();  // nobody reads here any more
}

// One buffer, written while its readers are between the two halves of a barrier.
__global__ void ring_by_barrier_kernel(const float* x, float* y, int steps) {
  float* received = reinterpret_cast<float*>(dynamic_shared());  // [threads]
  const int i = int(threadIdx.x);
  float state = x[blockIdx.x * blockDim.x + threadIdx.x];
  float* target = map_shared(received + i, (cluster_rank() + 1) % cluster_size());
  cluster_arrive();  // this block runs, and later: it has read
  for (int s = 0; s < steps; ++s) {
    cluster_wait();
    *target = state;
    sync_cluster();
    state = received[i] + 1;
    cluster_arrive();
  }
  cluster_wait();
  y[blockIdx.x * blockDim.x + threadIdx.x] = state;
}

__global__ void ring_kernel(const float* x, float* y, int steps, bool by_store_async, Fault fault) {
  // full[b]: buffer b holds what was sent to it. empty[b]: the next block has read its buffer b.
  Barrier* full = reinterpret_cast<Barrier*>(dynamic_shared());  // [2]
  Barrier* empty = full + 2;                                     // [2]
  float* buffers = reinterpret_cast<float*>(empty + 2);          // [2, threads]
  const int i = int(threadIdx.x), threads = int(blockDim.x), size = cluster_size();
  const int next = (cluster_rank() + 1) % size, previous = (cluster_rank() + size - 1) % size;
  float state = x[blockIdx.x * blockDim.x + threadIdx.x];
  if (i == 0) {
    for (int b = 0; b < 2; ++b) {
      barrier_init(&full[b], (by_store_async ? 1 : threads) + (fault == Fault::kWrongCount));
      barrier_init(&empty[b], threads);
    }
    if (fault != Fault::kMissingFence) fence_barrier_init();
  }
  if (fault != Fault::kMissingInit) sync_cluster();
  for (int s = 0; s < steps; ++s) {
    const int b = s % 2, phase = s / 2;
    float* buffer = buffers + b * threads + i;
    if (phase > 0 && fault != Fault::kMissingEmpty) barrier_wait(&empty[b], (phase - 1) % 2);
    if (by_store_async) {
      store_async(map_shared(buffer, next), state, map_shared(&full[b], next));
      const int bytes = threads * int(sizeof(float)) + (fault == Fault::kWrongBytes ? 4 : 0);
      if (i == 0 && phase % 2 == 0) {
        barrier_arrive_expect_bytes(&full[b], bytes);
      } else if (i == 0) {  // the same in two steps
        barrier_expect_bytes(&full[b], bytes);
        barrier_arrive(&full[b]);
      }
    } else {
      *map_shared(buffer, next) = state;
      barrier_arrive_remote(&full[b], next);
    }
    if (fault != Fault::kMissingWaitForBarrier) barrier_wait(&full[b], phase % 2);
    state = *buffer + 1;
    barrier_arrive_remote_after_reads(&empty[b], previous);
  }
  y[blockIdx.x * blockDim.x + threadIdx.x] = state;
  sync_cluster();  // nobody arrives here any more
}

template <int each>
__global__ void exchange_kernel(const float* x, float* y, float* states, Flag* flag, int steps,
                                Fault fault) {
  using Each = Packed<float, each>;
  const int blocks = int(gridDim.x), i = int(threadIdx.x), threads = int(blockDim.x);
  const int place = int(blockIdx.x) * threads + i;
  Each own = reinterpret_cast<const Each*>(x)[place];
  for (int s = 0; s < steps; ++s) {
    Each* const all = reinterpret_cast<Each*>(states) + s % 2 * blocks * threads;
    all[place] = own;
    if (fault != Fault::kMissingBarrier) sync_block();
    const bool silent =
        fault == Fault::kMissingRaise && s == steps - 1 && place / threads == blocks - 1;
    if (i == 0 && !silent) add_to_flag(flag);
    const int awaited = blocks * (s + 1) - (fault == Fault::kMissingWaitForFlag);
    if (i == 0) wait_flag(flag, uint32_t(awaited));
    if (fault != Fault::kMissingBarrierAfter) sync_block();
    Each sums{};
    for (int block = 0; block < blocks; ++block) {
      const Each other = load_fresh(&all[block * threads + i]);
      for (int k = 0; k < each; ++k) sums.values[k] += other.values[k];
    }
    for (int k = 0; k < each; ++k) {
      own.values[k] = sums.values[k] - 101 * floorf(sums.values[k] / 101) + float(blockIdx.x);
    }
  }
  reinterpret_cast<Each*>(y)[place] = own;
}

__global__ void approximations_kernel(const float* x, float* y, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  y[i] = exp2_approx(x[i]);
  y[n + i] = tanh_approx(x[i]);
  y[2 * n + i] = reciprocal_approx(x[i]);
  y[3 * n + i] = to_acc(from_acc<half_t>(x[i]));
  float low, high;
  unpack_pair<bfloat16_t>(pack_pair<bfloat16_t>(x[i], to_acc(from_acc<bfloat16_t>(x[i]))), low,
                          high);
  y[4 * n + i] = low == high ? high : NAN;
}

}  // namespace

void run_block_sum(const float* x, float* y, int64_t blocks, int threads, Fault fault,
                   Stream stream) {
  launch(block_sum_kernel, Grid{{blocks}, threads, 4 * threads}, stream, x, y, fault);
}

void run_warp_sum(const float* x, float* y, int64_t blocks, int threads, Fault fault,
                  Stream stream) {
  launch(warp_sum_kernel, Grid{{blocks}, threads}, stream, x, y, fault);
}

void run_reversed_tiles(const float* x, float* y, int steps, int valid, int threads, Fault fault,
                        Stream stream) {
  launch(reversed_tiles_kernel, Grid{{1}, threads, 2 * 16 * threads}, stream, x, y, steps, valid,
         fault);
}

template <typename scalar_t>
void run_product(const scalar_t* a, const scalar_t* b, float* d, bool by_load_matrix, Fault fault,
                 Stream stream) {
  launch(product_kernel<scalar_t>, Grid{{1}, kWarp, (16 + 8) * 16 * 2}, stream, a, b, d,
         by_load_matrix, fault);
}
template void run_product(const half_t*, const half_t*, float*, bool, Fault, Stream);
template void run_product(const bfloat16_t*, const bfloat16_t*, float*, bool, Fault, Stream);
template void run_product(const float*, const float*, float*, bool, Fault, Stream);

void run_gather(const float* x, float* y, int64_t clusters, int size, int threads, Fault fault,
                Stream stream) {
  launch(gather_kernel, Grid{{clusters * size}, threads, 4 * threads, size}, stream, x, y, fault);
}

void run_ring(const float* x, float* y, int64_t clusters, int size, int threads, int steps, By by,
              bool cooperative, Fault fault, Stream stream) {
  const int bytes = 4 * int(sizeof(Barrier)) + 2 * 4 * threads;
  const Grid grid{{clusters * size}, threads, bytes, size, cooperative};
  if (by == By::kBarrier) {
    launch(ring_by_barrier_kernel, grid, stream, x, y, steps);
  } else {
    launch(ring_kernel, grid, stream, x, y, steps, by == By::kStoreAsync, fault);
  }
}

void run_exchange(const float* x, float* y, float* states, uint32_t* flags, int64_t blocks,
                  int threads, int each, int steps, Fault fault, Stream stream) {
  const Grid grid{{blocks}, threads, 0, 1, fault != Fault::kNotCooperative};
  const auto kernel = each == 1   ? exchange_kernel<1>
                      : each == 2 ? exchange_kernel<2>
                                  : exchange_kernel<4>;
  launch(kernel, grid, stream, x, y, states, flags, steps, fault);
}

int64_t resident_gathers(int64_t clusters, int size, int64_t shared_bytes, int threads) {
  return resident_clusters(gather_kernel, Grid{{clusters * size}, threads, shared_bytes, size});
}

void run_approximations(const float* x, float* y, int64_t n, Stream stream) {
  launch(approximations_kernel, Grid{{(n + 127) / 128}, 128}, stream, x, y, n);
}

}  // namespace fastbptt::test
