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

  // Runs `body` on this stack until it pauses or ends; a paused one goes on instead.
  void run(void (*body)());
  // Called on the stack that runs: back to the caller of run.
  static void pause();
  // Forgets a paused body.
  void reset() { entered_ = false; }

 private:
  static void main();

  unsigned char* stack_;
  std::jmp_buf paused_;
  void (*body_)() = nullptr;
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
