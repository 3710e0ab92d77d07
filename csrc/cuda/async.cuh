// Copies from global to shared memory that run while the thread goes on (sm_80).
//
// A thread issues copies, closes them into a group with commit_async(), and waits until at most n of
// its latest groups are not done with wait_async<n>(). Then it sees the copies that it issued itself;
// the others see them after a sync_block() that follows everybody's wait. A buffer may be copied to
// again only after a sync_block() that follows everybody's reads of it.
#pragma once

#include "device.cuh"

#ifdef FASTBPTT_EMULATED
#include "emulation/async.h"
#else

namespace fastbptt {

// Copies bytes (4, 8 or 16; both addresses are multiples of it). Where the predicate is false it
// writes zeros, and global_source is not read. 16 bytes bypass L1.
template <int bytes>
__device__ __forceinline__ void copy_async(void* shared_target, const void* global_source,
                                           bool predicate = true) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "4, 8 or 16 bytes");
  const uint32_t target = uint32_t(__cvta_generic_to_shared(shared_target));
  const size_t source = __cvta_generic_to_global(global_source);
  const int read = predicate ? bytes : 0;
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
                 "r"(read)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(source),
                 "n"(bytes), "r"(read)
                 : "memory");
  }
}

// A group may be empty.
__device__ __forceinline__ void commit_async() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Copies that have not been committed are not waited for.
template <int groups>
__device__ __forceinline__ void wait_async() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

}  // namespace fastbptt

#endif
