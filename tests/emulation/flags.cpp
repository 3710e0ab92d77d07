// What blocks of a cooperative grid share: flags in global memory.
#include <sstream>

#include "emulation/scheduler.h"

namespace fastbptt::emulation {
namespace {

void check_flag(const uint32_t* flag, const Site& site) {
  require(uintptr_t(flag) % sizeof(*flag) == 0, "a flag that is not aligned to 4 bytes", site);
  require(!this_thread().block->holds(flag, sizeof(*flag)), "a flag in shared memory", site);
  const bool is_first = wave().waiting.try_emplace(flag).second;
  require(!is_first || *flag == 0, "a flag that was not set to zero before the launch", site);
}

}  // namespace

void add_to_flag(uint32_t* flag, const Site& site) {
  check_flag(flag, site);
  const uint32_t value = ++*flag;
  auto& waiting = wave().waiting[flag];
  std::vector<Thread*> go_on, still;
  for (Thread* thread : waiting) (thread->wanted <= value ? go_on : still).push_back(thread);
  waiting.swap(still);
  make_ready(go_on.size(), [&](size_t i) { return go_on[i]; });
}

void wait_flag(const uint32_t* flag, uint32_t value, const Site& site) {
  check_flag(flag, site);
  require(wave().cooperative, "wait_flag in a launch that is not cooperative", site);
  if (*flag >= value) return;
  Thread& thread = this_thread();
  wave().waiting[flag].push_back(&thread);
  thread.waits_for = flag;
  thread.wanted = value;
  wait("wait_flag", site);
  thread.waits_for = nullptr;
}

std::string describe_flag(const Thread& thread) {
  const auto found = wave().waiting.find(static_cast<const uint32_t*>(thread.waits_for));
  if (found == wave().waiting.end()) return "";
  std::ostringstream text;
  text << " for " << describe_global(found->first) << ", which is " << *found->first
       << ", to become " << thread.wanted;
  return text.str();
}

}  // namespace fastbptt::emulation
