// Launchers of small kernels that use the primitives. All memory is the device's.
#pragma once

#include "cuda/launch.h"

namespace fastbptt::test {

// What is wrong with a kernel on purpose; each kernel knows some of them.
enum class Fault {
  kNone,
  kMissingBarrier,         // block_sum, reversed_tiles, gather, exchange: before others' reads
  kMissingBarrierAfter,    // reversed_tiles, gather: between reads and what ends or overwrites;
                           // exchange: after waits for flags
  kDivergentBarrier,       // block_sum
  kEarlyExit,              // block_sum: before a barrier
  kOutsider,               // block_sum: at a barrier of the first threads
  kOtherCount,             // block_sum: of those threads
  kSharedBounds,           // block_sum: a write by one element
  kGlobalBounds,           // block_sum: likewise
  kDivergentShuffle,       // warp_sum
  kMissingWait,            // reversed_tiles: for the copies
  kNotRounded,             // product of tf32
  kWrongCount,             // ring: of arrivals
  kWrongBytes,             // ring: announced
  kMissingFence,           // ring: after barrier_init
  kMissingInit,            // ring: no barrier between it and the first use
  kMissingEmpty,           // ring: sends without asking whether there is room
  kMissingWaitForBarrier,  // ring: reads without waiting for the bytes
  kDivergentCluster,       // gather: lanes arrive at different places
  kMissingRaise,           // exchange: the last block's last flag
  kMissingWaitForFlag,     // exchange: of the last block
  kNotCooperative,         // exchange
};

// y [blocks]: sums of x [blocks, threads], by halves in shared memory. threads: a power of two.
void run_block_sum(const float* x, float* y, int64_t blocks, int threads, Fault fault,
                   Stream stream);

// y [blocks, threads]: the sum of x's values in each warp, in all its lanes.
void run_warp_sum(const float* x, float* y, int64_t blocks, int threads, Fault fault,
                  Stream stream);

// y [steps, threads, 4]: each step of x [steps, threads, 4] with its threads' fours in reverse order,
// step t copied to shared memory while step t - 1 is worked on. Steps from `valid` on are zeros.
void run_reversed_tiles(const float* x, float* y, int steps, int valid, int threads, Fault fault,
                        Stream stream);

// d [16, 8] = a [16, K] b [K, 8], with fragments put together from global memory or from shared
// memory by load_matrix_x4. K: 16 for 16-bit numbers, 8 for tf32 (scalar_t float).
template <typename scalar_t>
void run_product(const scalar_t* a, const scalar_t* b, float* d, bool by_load_matrix, Fault fault,
                 Stream stream);

// y [clusters, size, threads]: sums over the blocks of a cluster of x of that shape, which each block
// reads in the others' shared memory.
void run_gather(const float* x, float* y, int64_t clusters, int size, int threads, Fault fault,
                Stream stream);

// How blocks send.
enum class By {
  kStoreAsync,  // whose bytes complete an mbarrier
  kStores,      // ordinary ones, and arrivals at an mbarrier
  kBarrier,     // ordinary ones, and the cluster's barrier in two halves
};

// y [clusters, size, threads]: x of that shape after `steps` steps in which every block sends its row
// to the next block of its cluster, which adds 1. cooperative: all clusters run at once.
void run_ring(const float* x, float* y, int64_t clusters, int size, int threads, int steps, By by,
              bool cooperative, Fault fault, Stream stream);

// y [blocks, threads, each]: x of that shape after `steps` steps in which each block sends what it has
// to all others, and makes of the sum over the blocks, modulo 101 and plus its number, what it has
// next. states [2, blocks, threads, each] and the flag, which is zero, are the blocks' own.
// each: 1, 2 or 4.
void run_exchange(const float* x, float* y, float* states, uint32_t* flag, int64_t blocks,
                  int threads, int each, int steps, Fault fault, Stream stream);

// How many clusters of run_gather could run side by side.
int64_t resident_gathers(int64_t clusters, int size, int64_t shared_bytes, int threads);

// y [5, n]: exp2, tanh and reciprocal of x [n] approximately, x rounded to half and to bfloat16.
void run_approximations(const float* x, float* y, int64_t n, Stream stream);

}  // namespace fastbptt::test
