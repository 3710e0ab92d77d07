// The emulation's bodies of csrc/cuda/async.cuh, which says what they mean. The schedule decides
// whether a copy is carried out when it is issued or when its group is waited for.
#pragma once

#include "emulation/runtime.h"

namespace fastbptt {

template <int bytes>
void copy_async(void* shared_target, const void* global_source, bool predicate = true,
                emulation::Site site = emulation::Site::here()) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "4, 8 or 16 bytes");
  emulation::copy_async(shared_target, global_source, bytes, !predicate, site);
}

inline void commit_async() { emulation::commit_async(); }

template <int groups>
void wait_async() {
  emulation::wait_async(groups);
}

}  // namespace fastbptt
