// The emulation's bodies of csrc/cuda/flags.cuh, which says what they mean.
#pragma once

#include "emulation/runtime.h"

namespace fastbptt {

inline void add_to_flag(Flag* flag, emulation::Site site = emulation::Site::here()) {
  emulation::add_to_flag(flag, site);
}

inline void wait_flag(const Flag* flag, uint32_t value,
                      emulation::Site site = emulation::Site::here()) {
  emulation::wait_flag(flag, value, site);
}

template <typename T>
T load_fresh(const T* from, emulation::Site site = emulation::Site::here()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  emulation::require(uintptr_t(from) % sizeof(T) == 0,
                     "load_fresh from a place that is not aligned", site);
  return *from;
}

}  // namespace fastbptt
