// What the emulation's own sources share.
#pragma once

#include "emulation/runtime.h"

namespace fastbptt::emulation {

Wave& wave();
Cluster& this_cluster();
bool is_early();

// Pauses the thread that runs until make_ready has been called for it.
void wait(const char* what, const Site& site);
template <typename Get>
void make_ready(size_t count, const Get& get) {
  const bool reverse = schedule().order == Order::kReverse;
  auto& ready = wave().ready;
  for (size_t i = 0; i < count; ++i) ready.push_back(get(reverse ? count - 1 - i : i));
}

void reserve_shared(Block& block, size_t bytes);
void poison_shared(Block& block);
void end_block(Block& block);
void end_wave();

// Carries out store_asyncs. Idle: no thread can run, so one that is late cannot stay so. Says whether
// there was one.
bool deliver_stores(bool idle);
// What the mbarrier that the thread waits for still needs, in words; nothing if it waits for none.
std::string describe_barrier(const Thread& thread);
// The same of a flag.
std::string describe_flag(const Thread& thread);
// Where in which guarded memory that is, in words.
std::string describe_global(const void* address);

}  // namespace fastbptt::emulation
