// What the emulation's own sources share.
#pragma once

#include "emulation/runtime.h"

namespace fastbptt::emulation {

Cluster& this_cluster();
bool is_early();

// Pauses the thread that runs until make_ready has been called for it.
void wait(const char* what, const Site& site);
void make_ready(Thread* const* threads, size_t count);

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
