// What the blocks of a cooperative grid tell each other through global memory: flags, numbers that
// only grow. They must be zero before the launch.
//
//   the writer:   all threads write to global memory; sync_block(); one thread: add_to_flag(f)
//   the readers:  one thread: wait_flag(f, n), n for as many writers; sync_block() for the others;
//                 load_fresh(...) of what was written
//
// A buffer may be written again only when all of its readers have said, by adding to a flag after a
// sync_block(), that they have read it. Only blocks that run at the same time may wait for one
// another: of a launch with Grid::cooperative.
#pragma once

#include "device.cuh"

namespace fastbptt {

using Flag = uint32_t;

}  // namespace fastbptt

#ifdef FASTBPTT_EMULATED
#include "emulation/flags.h"
#else

#include <cstring>

namespace fastbptt {

// Adds one. Who waits for the sum sees what the thread wrote before, and what others of its block wrote
// before a sync_block(). The fence that this takes lasts until all of that is in L2.
__device__ __forceinline__ void add_to_flag(Flag* flag) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(__cvta_generic_to_global(flag))
               : "memory");
}

// Returns when the flag is `value` or more; it may have gone round.
__device__ __forceinline__ void wait_flag(const Flag* flag, uint32_t value) {
  uint32_t now;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                 : "=r"(now)
                 : "l"(__cvta_generic_to_global(flag))
                 : "memory");
  } while (int32_t(now - value) < 0);
}

// 4, 8 or 16 bytes, aligned to as many, from where they are up to date: L1 may hold those of before.
template <typename T>
__device__ __forceinline__ T load_fresh(const T* from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  const size_t address = __cvta_generic_to_global(from);
  uint32_t words[sizeof(T) / 4];
  if constexpr (sizeof(T) == 4) {
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(words[0]) : "l"(address) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "l"(address)
                 : "memory");
  } else {
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(address)
                 : "memory");
  }
  T value;
  memcpy(&value, words, sizeof(T));
  return value;
}

}  // namespace fastbptt

#endif
