// Stacks that are switched between by hand: one for each thread of the emulated GPU that has started
// and not ended.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <memory>
#include <vector>

namespace fastbptt::emulation {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;

  // Leaves the stack that runs and goes on with this one where it was left; the first time, `body`
  // begins on it, which never returns.
  void resume(void (*body)());
  // The same with the host's own stack, from which the first fiber was resumed.
  static void resume_host();
  // Forgets where it was left.
  void reset() { entered_ = false; }

 private:
  enum class Host {};
  explicit Fiber(Host);
  static Fiber& host();
  static void enter();
  void arrive();

  unsigned char* stack_ = nullptr;
  size_t size_ = 0;
  std::jmp_buf left_;
  bool entered_ = false;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
};

// Fibers to be used again: the last one given back, whose stack is in the cache, goes out first.
class FiberPool {
 public:
  Fiber* take() {
    if (free_.empty()) {
      all_.push_back(std::make_unique<Fiber>());
      free_.push_back(all_.back().get());
    }
    Fiber* fiber = free_.back();
    free_.pop_back();
    return fiber;
  }
  void give_back(Fiber* fiber) { free_.push_back(fiber); }

 private:
  std::vector<std::unique_ptr<Fiber>> all_;
  std::vector<Fiber*> free_;
};

}  // namespace fastbptt::emulation
