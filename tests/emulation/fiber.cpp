// A stack is entered once by ucontext; from then on switches are by _setjmp and _longjmp, which unlike
// swapcontext need no system call.
#undef _FORTIFY_SOURCE  // its longjmp takes another stack for an error

#include "fiber.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastbptt::emulation {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStack = 512 << 10;
#else
constexpr size_t kStack = 128 << 10;
#endif

size_t page() {
  static const size_t size = size_t(sysconf(_SC_PAGESIZE));
  return size;
}

std::jmp_buf caller;
Fiber* running = nullptr;

#ifdef __SANITIZE_ADDRESS__
const void* caller_stack = nullptr;
size_t caller_size = 0;
#endif

}  // namespace

// Below the stack a page that may not be touched, so that an overflow is a crash and not a wrong
// result. Pages that are never used take no memory.
Fiber::Fiber() {
  void* memory = mmap(nullptr, kStack + page(), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, page(), PROT_NONE);
  stack_ = static_cast<unsigned char*>(memory) + page();
}

Fiber::~Fiber() { munmap(stack_ - page(), kStack + page()); }

void Fiber::main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &caller_stack, &caller_size);
#endif
  for (;;) {
    running->body_();
    pause();
  }
}

void Fiber::run(void (*body)()) {
  running = this;
  body_ = body;
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, stack_, kStack);
#endif
  if (_setjmp(caller) == 0) {
    if (entered_) _longjmp(paused_, 1);
    entered_ = true;
    ucontext_t context;
    getcontext(&context);
    // Stacks that begin at the same place of a page would share a few lines of the cache.
    const size_t shift = (uintptr_t(this) / 64 * 320) % 4096;
    context.uc_stack.ss_sp = stack_;
    context.uc_stack.ss_size = kStack - shift;
    context.uc_link = nullptr;
    makecontext(&context, main, 0);
    setcontext(&context);
  }
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void Fiber::pause() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&running->fake_stack_, caller_stack, caller_size);
#endif
  if (_setjmp(running->paused_) == 0) _longjmp(caller, 1);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(running->fake_stack_, &caller_stack, &caller_size);
#endif
}

}  // namespace fastbptt::emulation
