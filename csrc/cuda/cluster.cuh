// Blocks of a cluster: its barrier, each other's shared memory, and mbarriers (sm_90). On sm_80 these
// trap, but for cluster_rank and cluster_size.
//
// Another block's shared memory may be touched only while that block runs: after a sync_cluster() at
// the kernel's begin, and before one that follows the last access at its end.
//
// The cheapest exchange is store_async: the sender needs no fence, and the receiver's wait is all that
// there is. Ordinary stores to another block have to be released, by cluster_arrive() or
// barrier_arrive_remote(): a fence that lasts until all that the thread has stored, to global memory
// too, is there.
#pragma once

#include "device.cuh"

namespace fastbptt {

// A barrier in shared memory, aligned to 8 bytes, for threads that need not wait where they arrive.
// It goes through phases 0, 1, 2, ... A phase is complete when `count` threads have arrived in it and
// as many bytes have come in by store_async as were announced; then the next one begins.
//
//   One thread:     barrier_init(...) of all; fence_barrier_init()
//   everybody:      sync_cluster() before the first use (sync_block() if other blocks do not use it)
//   the receiver:   one thread, once a phase: barrier_arrive_expect_bytes(bar, bytes)  (count 1)
//   the senders:    store_async(map_shared(target, rank), value, map_shared(bar, rank))
//   every reader:   barrier_wait(bar, phase % 2)
//
// Bytes may be there before they are announced, but not before their phase has begun: a sender may
// send for phase p + 1 only if it knows that phase p is complete, and may overwrite a buffer only if
// it knows that all have read it. Where every block sends to all others in every step, to one of two
// buffers by turns with a barrier each, having received all of step s says both for step s - 1's
// buffer, provided that each thread sends after it has read. Otherwise the readers have to say so, by
// barrier_arrive_remote_after_reads(). Two phases of one parity cannot be told apart: a thread may not
// fall two behind.
using Barrier = uint64_t;

}  // namespace fastbptt

#ifdef FASTBPTT_EMULATED
#include "emulation/cluster.h"
#else

#include <cstring>

namespace fastbptt {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif

#define FASTBPTT_CUDA_VERSION (__CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__)
#if FASTBPTT_CUDA_VERSION < 1201
#error "fastbptt's CUDA kernels need a CUDA toolkit of 12.1 or newer"
#endif
// Fences for shared memory alone came with CUDA 12.7. Without, what orders all memory does as well, and
// takes longer.
#ifndef FASTBPTT_RESTRICTED_FENCES
#define FASTBPTT_RESTRICTED_FENCES (FASTBPTT_CUDA_VERSION >= 1207)
#endif
#if FASTBPTT_RESTRICTED_FENCES
#define FASTBPTT_WAIT_ORDER "relaxed"  // the fence follows
#else
#define FASTBPTT_WAIT_ORDER "acquire"
#endif

// The block's number in its cluster: blockIdx.x % cluster_size().
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank = 0;
  if constexpr (kHasClusters) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}

__device__ __forceinline__ int cluster_size() {
  uint32_t size = 1;
  if constexpr (kHasClusters) asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return int(size);
}

// The cluster's barrier in two halves, each collective over the cluster: what a thread wrote before it
// arrived, to any shared or to global memory, every thread sees after its wait. Between them a thread
// can do what needs neither. Arrivals and waits alternate.
__device__ __forceinline__ void cluster_arrive() {
  if constexpr (kHasClusters) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  } else {
    __trap();
  }
}
__device__ __forceinline__ void cluster_wait() {
  if constexpr (kHasClusters) {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  } else {
    __trap();
  }
}
__device__ __forceinline__ void sync_cluster() {
  cluster_arrive();
  cluster_wait();
}

// The place in block `rank`'s shared memory that `pointer` is in this block's. Loads and stores by it
// are ordinary ones; reads take far longer than of one's own, writes do not wait.
template <typename T>
__device__ __forceinline__ T* map_shared(T* pointer, int rank) {
  uint64_t mapped = 0;
  if constexpr (kHasClusters) {
    asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(pointer), "r"(rank));
  } else {
    __trap();
  }
  return reinterpret_cast<T*>(mapped);
}

// The address in the window of the cluster's shared memory; of one's own, where it is the one in the
// block's.
__device__ __forceinline__ uint32_t cluster_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

// The place in block `rank`'s shared memory that an address is in this block's.
__device__ __forceinline__ uint32_t map_address(uint32_t address, int rank) {
  uint32_t mapped = 0;
  if constexpr (kHasClusters) {
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  } else {
    __trap();
  }
  return mapped;
}

// Phase 0 begins. count: arrivals a phase, 1 to 2^20 - 1.
__device__ __forceinline__ void barrier_init(Barrier* barrier, int count) {
  if constexpr (kHasClusters) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(cluster_address(barrier)),
                 "r"(count)
                 : "memory");
  } else {
    __trap();
  }
}

// Makes the calling thread's barrier_init known to the cluster; a sync_cluster() must follow.
__device__ __forceinline__ void fence_barrier_init() {
  if constexpr (kHasClusters) {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  } else {
    __trap();
  }
}

// Arrives at this block's barrier. What the thread wrote to shared memory before is seen by those that
// wait for the phase.
__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  if constexpr (kHasClusters) {
    asm volatile(
        "mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(cluster_address(barrier))
        : "memory");
  } else {
    __trap();
  }
}

// Arrives at block `rank`'s barrier of the same address. What the thread wrote before, to any memory,
// and other threads' writes that a sync_block() has ordered before, is seen there: by the wait where
// it is in shared memory. The fence that this takes is slow.
__device__ __forceinline__ void barrier_arrive_remote(Barrier* barrier, int rank) {
  if constexpr (kHasClusters) {
    const uint32_t remote = map_address(cluster_address(barrier), rank);
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(remote)
                 : "memory");
  } else {
    __trap();
  }
}

// The same after which the other block may overwrite, or read, what stands in this block's own shared
// memory: only the accesses to that come before.
__device__ __forceinline__ void barrier_arrive_remote_after_reads(Barrier* barrier, int rank) {
  if constexpr (!FASTBPTT_RESTRICTED_FENCES) {
    barrier_arrive_remote(barrier, rank);
  } else if constexpr (kHasClusters) {
    const uint32_t remote = map_address(cluster_address(barrier), rank);
    asm volatile(
        "fence.release.sync_restrict::shared::cta.cluster;\n"
        "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(remote)
        : "memory");
  } else {
    __trap();
  }
}

// The current phase is to wait for so many bytes more. No arrival.
__device__ __forceinline__ void barrier_expect_bytes(Barrier* barrier, int bytes) {
  if constexpr (kHasClusters) {
    asm volatile(
        "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(cluster_address(barrier)),
        "r"(bytes)
        : "memory");
  } else {
    __trap();
  }
}

// Both, as one operation.
__device__ __forceinline__ void barrier_arrive_expect_bytes(Barrier* barrier, int bytes) {
  if constexpr (kHasClusters) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                     cluster_address(barrier)),
                 "r"(bytes)
                 : "memory");
  } else {
    __trap();
  }
}

// Waits until the phase of this block's barrier with that parity is complete: returns at once if the
// current phase has the other one. Then the thread sees what the cluster has put into shared memory,
// its own or another block's, before it arrived or by store_async. Not so global memory: that would
// empty the L1 cache at each wait, and is left to sync_cluster().
__device__ __forceinline__ void barrier_wait(Barrier* barrier, int parity) {
  if constexpr (kHasClusters) {
    uint32_t done;
    do {
      asm volatile(
          "{\n"
          ".reg .pred complete;\n"
          "mbarrier.try_wait.parity." FASTBPTT_WAIT_ORDER
          ".cluster.shared::cta.b64 complete, [%1], %2;\n"
          "selp.u32 %0, 1, 0, complete;\n"
          "}"
          : "=r"(done)
          : "r"(cluster_address(barrier)), "r"(parity)
          : "memory");
    } while (!done);
    if constexpr (FASTBPTT_RESTRICTED_FENCES) {
      asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
    }
  } else {
    __trap();
  }
}

// Sends a value of 4, 8 or 16 bytes to shared memory of the cluster, and its size in bytes to a barrier
// of the same block when it is there; both addresses are map_address's. Those that wait for the phase
// see it. The thread itself cannot wait for it, nor order it after its other writes.
template <typename T>
__device__ __forceinline__ void store_async(uint32_t to, const T& value, uint32_t barrier) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  if constexpr (kHasClusters) {
    uint32_t words[sizeof(T) / 4];
    memcpy(words, &value, sizeof(T));
    if constexpr (sizeof(T) == 4) {
      asm volatile(
          "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
              to),
          "r"(words[0]), "r"(barrier)
          : "memory");
    } else if constexpr (sizeof(T) == 8) {
      asm volatile(
          "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, "
          "[%3];" ::"r"(to),
          "r"(words[0]), "r"(words[1]), "r"(barrier)
          : "memory");
    } else {
      asm volatile(
          "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, "
          "%4}, [%5];" ::"r"(to),
          "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(barrier)
          : "memory");
    }
  } else {
    __trap();
  }
}

// The same with map_shared's pointers.
template <typename T>
__device__ __forceinline__ void store_async(T* remote, const T& value, Barrier* remote_barrier) {
  store_async(cluster_address(remote), value, cluster_address(remote_barrier));
}

}  // namespace fastbptt

#endif
