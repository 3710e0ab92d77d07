// To be preloaded: allocations of tensors, and those of one library, of which the n-th fails.
//
// Tensors come of posix_memalign. What a library's threads allocate in a parallel region comes of
// operator new, which knows by its return address who asked: elsewhere torch's headers, of which the
// library has copies, end the process where that fails. How many of the tensors' allocations live says
// whether any was lost.
#include <dlfcn.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>

extern "C" void* __libc_memalign(size_t alignment, size_t size);
extern "C" void __libc_free(void* memory);

namespace {

constexpr size_t kSlots = 1 << 16;  // far more than tensors that live at a time
std::mutex mutex;
void* slots[kSlots];
std::atomic<int64_t> live{0}, count{0}, failing{0};
std::atomic<uintptr_t> library_begin{0}, library_end{0};

size_t slot_of(const void* memory) { return (uintptr_t(memory) >> 6) % kSlots; }

void note(void* memory) {
  const std::lock_guard lock(mutex);
  size_t slot = slot_of(memory);
  while (slots[slot]) slot = (slot + 1) % kSlots;
  slots[slot] = memory;
  ++live;
}

void forget(void* memory) {
  const std::lock_guard lock(mutex);
  size_t slot = slot_of(memory);
  while (slots[slot] && slots[slot] != memory) slot = (slot + 1) % kSlots;
  if (!slots[slot]) return;
  --live;
  slots[slot] = nullptr;
  // What was put behind it for want of this slot, or of one before, moves up.
  for (size_t next = (slot + 1) % kSlots; slots[next]; next = (next + 1) % kSlots) {
    void* const moved = slots[next];
    slots[next] = nullptr;
    size_t to = slot_of(moved);
    while (slots[to]) to = (to + 1) % kSlots;
    slots[to] = moved;
  }
}

thread_local bool in_region = false;

struct Region {
  void (*run)(void*);
  void* data;
};

bool fails() { return failing.load() > 0 && count.fetch_add(1) + 1 == failing.load(); }

}  // namespace

// From now on the n-th fails; 0: none. The count begins again.
extern "C" void fail_at(int64_t n) {
  count = 0;
  failing = n;
}
extern "C" int64_t allocations() { return count; }
extern "C" int64_t live_tensors() { return live; }
extern "C" void watch_library(uintptr_t begin, uintptr_t end) {
  library_begin = begin;
  library_end = end;
}

extern "C" int posix_memalign(void** memory, size_t alignment, size_t size) noexcept {
  if (fails()) return ENOMEM;
  *memory = __libc_memalign(alignment, size);
  if (!*memory) return ENOMEM;
  note(*memory);
  return 0;
}

extern "C" void free(void* memory) noexcept {
  if (memory && uintptr_t(memory) % 64 == 0) forget(memory);
  __libc_free(memory);
}

void* operator new(size_t size) {
  const auto caller = uintptr_t(__builtin_return_address(0));
  const bool is_watched = in_region && caller >= library_begin && caller < library_end;
  if (is_watched && fails()) throw std::bad_alloc();
  if (void* const memory = std::malloc(size ? size : 1)) return memory;
  throw std::bad_alloc();
}

extern "C" void GOMP_parallel(void (*run)(void*), void* data, unsigned threads, unsigned flags) {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const auto real = reinterpret_cast<Parallel>(dlsym(RTLD_NEXT, "GOMP_parallel"));
  Region region{run, data};
  real(
      [](void* pointer) {
        const Region& region = *static_cast<Region*>(pointer);
        in_region = true;
        region.run(region.data);
        in_region = false;
      },
      &region, threads, flags);
}
