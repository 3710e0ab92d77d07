// Shared and global memory: poisoned until written, between guard zones; and asynchronous copies.
#include <algorithm>
#include <map>
#include <mutex>
#include <sstream>

#include "emulation/scheduler.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(memory, bytes) ((void)(memory), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(memory, bytes) ((void)(memory), (void)(bytes))
#endif

namespace fastbptt::emulation {
namespace {

constexpr size_t kAlign = 512;        // cudaMalloc's
constexpr size_t kSharedAlign = 128;  // what dynamic_shared promises, and not more

// The first byte that is no longer poison, or `bytes`.
size_t first_written(const unsigned char* memory, size_t bytes) {
  if (bytes == 0 || (memory[0] == kPoison && std::memcmp(memory, memory + 1, bytes - 1) == 0)) {
    return bytes;
  }
  return size_t(std::find_if(memory, memory + bytes, [](auto b) { return b != kPoison; }) - memory);
}

// Poisons the guard zones. AddressSanitizer, where it runs, then stops reads of them too.
void close_zones(unsigned char* memory, size_t bytes) {
  for (unsigned char* zone : {memory - kGuard, memory + bytes}) {
    ASAN_UNPOISON_MEMORY_REGION(zone, kGuard);
    std::memset(zone, kPoison, kGuard);
    ASAN_POISON_MEMORY_REGION(zone, kGuard);
  }
}

void open_zones(unsigned char* memory, size_t bytes) {
  ASAN_UNPOISON_MEMORY_REGION(memory - kGuard, bytes + 2 * kGuard);
}

// Says what was written there, or nothing, and closes them again.
std::string check_zones(unsigned char* memory, size_t bytes, const std::string& what) {
  open_zones(memory, bytes);
  std::ostringstream text;
  const unsigned char* before = memory - kGuard;
  const unsigned char* behind = memory + bytes;
  size_t at = first_written(before, kGuard);
  if (at < kGuard) text << what << " was written to, " << kGuard - at << " bytes before its begin";
  at = first_written(behind, kGuard);
  if (at < kGuard) {
    text << (text.str().empty() ? what + " was" : " and") << " written to, " << at
         << " bytes behind its end";
  }
  close_zones(memory, bytes);
  return text.str();
}

struct Allocation {
  size_t bytes;
  std::string what;
};

std::mutex allocations_mutex;
std::map<unsigned char*, Allocation> allocations;
std::string found_when_freed;

// Carries out the copies of the thread's first `count` groups, or takes note that they were.
void finish_copies(Thread& thread, size_t count) {
  size_t copies = 0;
  for (size_t i = 0; i < count; ++i) copies += thread.groups[i];
  for (size_t i = 0; i < copies; ++i) {
    const Copy& copy = thread.copies[i];
    if (copy.zero) {
      std::memset(copy.to, 0, size_t(copy.bytes));
    } else if (copy.from) {
      std::memcpy(copy.to, copy.from, size_t(copy.bytes));
    }
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + std::ptrdiff_t(copies));
  thread.groups.erase(thread.groups.begin(), thread.groups.begin() + std::ptrdiff_t(count));
}

}  // namespace

void* allocate_guarded(size_t bytes, const std::string& what) {
  const size_t size = (bytes + 2 * kGuard + kAlign - 1) / kAlign * kAlign;
  auto* base = static_cast<unsigned char*>(std::aligned_alloc(kAlign, size));
  if (!base) throw std::bad_alloc();
  std::memset(base, kPoison, size);
  close_zones(base + kGuard, bytes);
  const std::lock_guard<std::mutex> lock(allocations_mutex);
  allocations[base + kGuard] = {bytes, what};
  return base + kGuard;
}

void free_guarded(void* memory) {
  auto* begin = static_cast<unsigned char*>(memory);
  const std::lock_guard<std::mutex> lock(allocations_mutex);
  const auto found = allocations.find(begin);
  if (found == allocations.end()) return;
  const std::string fault = check_zones(begin, found->second.bytes, found->second.what);
  if (found_when_freed.empty()) found_when_freed = fault;
  open_zones(begin, found->second.bytes);
  allocations.erase(found);
  std::free(begin - kGuard);
}

void check_guards() {
  const std::lock_guard<std::mutex> lock(allocations_mutex);
  std::string faults = std::exchange(found_when_freed, "");
  for (auto& [memory, allocation] : allocations) {
    const std::string fault = check_zones(memory, allocation.bytes, allocation.what);
    if (!fault.empty()) faults += (faults.empty() ? "" : "\n") + fault;
  }
  if (!faults.empty()) throw Fault(faults);
}

std::string describe_global(const void* address) {
  const auto* at = static_cast<const unsigned char*>(address);
  const std::lock_guard<std::mutex> lock(allocations_mutex);
  for (const auto& [memory, allocation] : allocations) {
    if (at < memory || at >= memory + allocation.bytes) continue;
    return "byte " + std::to_string(at - memory) + " of " + allocation.what;
  }
  return "memory that the glue has not allocated";
}

void reserve_shared(Block& block, size_t bytes) {
  if (block.shared) open_zones(block.shared, block.shared_bytes);
  // The begin is an odd multiple of what is promised.
  const size_t size = bytes + 2 * kGuard + 3 * kSharedAlign;
  if (block.memory.size() < size) block.memory.resize(size);
  const uintptr_t base = uintptr_t(block.memory.data()) + kGuard;
  const uintptr_t aligned = (base + 2 * kSharedAlign - 1) / (2 * kSharedAlign) * (2 * kSharedAlign);
  block.shared = reinterpret_cast<unsigned char*>(
      aligned - base >= kSharedAlign ? aligned - kSharedAlign : aligned + kSharedAlign);
  block.shared_bytes = bytes;
}

void poison_shared(Block& block) {
  std::memset(block.shared, kPoison, block.shared_bytes);
  close_zones(block.shared, block.shared_bytes);
}

void end_block(Block& block) {
  std::ostringstream what;
  what << "shared memory of block (" << block.index.x << ", " << block.index.y << ", "
       << block.index.z << "), " << block.shared_bytes << " bytes,";
  const std::string fault = check_zones(block.shared, block.shared_bytes, what.str());
  if (!fault.empty()) throw Fault(fault);
  // Other blocks of the cluster must not use it any more: they read NaN, and what they write is found.
  if (block.cluster->blocks.size() > 1) poison_shared(block);
}

void end_wave() {
  while (deliver_stores(/*idle=*/true)) {  // which finds that the block has ended
  }
  for (const Cluster& cluster : wave().clusters) {
    if (cluster.blocks.size() == 1) continue;
    for (const auto& block : cluster.blocks) {
      if (first_written(block->shared, block->shared_bytes) == block->shared_bytes) continue;
      throw Fault("the shared memory of the cluster's block " + std::to_string(block->rank) +
                  " was written to after it had ended");
    }
  }
}

void copy_async(void* to, const void* from, int bytes, bool zero, const Site& site) {
  Thread& thread = this_thread();
  require(thread.block->holds(to, size_t(bytes)), "copy_async to outside of the shared memory",
          site);
  require(uintptr_t(to) % unsigned(bytes) == 0, "copy_async to a place that is not aligned", site);
  require(zero || uintptr_t(from) % unsigned(bytes) == 0,
          "copy_async from a place that is not aligned", site);
  Copy copy{to, zero ? nullptr : from, bytes, zero};
  if (is_early()) {
    if (zero) {
      std::memset(to, 0, size_t(bytes));
    } else {
      std::memcpy(to, from, size_t(bytes));
    }
    copy.from = nullptr;  // done
    copy.zero = false;
  }
  thread.copies.push_back(copy);
}

void commit_async() {
  Thread& thread = this_thread();
  size_t committed = 0;
  for (const size_t count : thread.groups) committed += count;
  thread.groups.push_back(thread.copies.size() - committed);
}

void wait_async(int groups) {
  Thread& thread = this_thread();
  const size_t pending = thread.groups.size();
  if (pending > size_t(groups)) finish_copies(thread, pending - size_t(groups));
}

}  // namespace fastbptt::emulation
