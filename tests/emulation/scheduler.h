// What the emulation's own sources share.
#pragma once

#include "emulation/runtime.h"

namespace fastbptt::emulation {

Cluster& this_cluster();
bool is_early();

// Pauses the thread that runs until make_ready has been called for it.
void wait(const char* what, const Site& site);
template <typename Get>
void make_ready(size_t count, const Get& get) {
  const bool reverse = schedule().order == Order::kReverse;
  auto& ready = this_cluster().ready;
  for (size_t i = 0; i < count; ++i) ready.push_back(get(reverse ? count - 1 - i : i));
}

void reserve_shared(Block& block, size_t bytes);
void poison_shared(Block& block);
void end_block(Block& block);
void end_cluster(Cluster& cluster);

// Carries out store_asyncs. Idle: no thread can run, so one that is late cannot stay so. Says whether
// there was one.
bool deliver_stores(bool idle);
// What the mbarrier still needs, in words; nothing for null.
std::string describe_barrier(const void* barrier);

}  // namespace fastbptt::emulation
