// A stack is entered once by ucontext; from then on switches are by _setjmp and _longjmp, which unlike
// swapcontext need no system call.
#undef _FORTIFY_SOURCE  // its longjmp takes another stack for an error

#include "emulation/fiber.h"

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

Fiber* current = nullptr;   // null: the host
Fiber* previous = nullptr;  // the one that was left last
void (*first_call)() = nullptr;

}  // namespace

// Below the stack a page that may not be touched, so that an overflow is a crash and not a wrong
// result. Pages that are never used take no memory.
Fiber::Fiber() : size_(kStack) {
  void* memory = mmap(nullptr, kStack + page(), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, page(), PROT_NONE);
  stack_ = static_cast<unsigned char*>(memory) + page();
}

Fiber::Fiber(Host) : entered_(true) {}

Fiber::~Fiber() {
  if (this != &host()) munmap(stack_ - page(), kStack + page());
}

Fiber& Fiber::host() {
  static Fiber host{Host{}};
  return host;
}

// On this fiber, which has just been switched to.
void Fiber::arrive() {
#ifdef __SANITIZE_ADDRESS__
  const void* stack;
  size_t size;
  __sanitizer_finish_switch_fiber(fake_stack_, &stack, &size);
  if (previous == &host()) {
    previous->stack_ = static_cast<unsigned char*>(const_cast<void*>(stack));
    previous->size_ = size;
  }
#endif
}

void Fiber::enter() {
  current->arrive();
  first_call();
}

void Fiber::resume(void (*body)()) {
  previous = current ? current : &host();
  current = this;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&previous->fake_stack_, stack_, size_);
#endif
  if (_setjmp(previous->left_) == 0) {
    if (entered_) _longjmp(left_, 1);
    entered_ = true;
    first_call = body;
    fake_stack_ = nullptr;
    ucontext_t context;
    getcontext(&context);
    // Stacks that begin at the same place of a page would share a few lines of the cache.
    const size_t shift = (uintptr_t(this) / 64 * 320) % 4096;
    context.uc_stack.ss_sp = stack_;
    context.uc_stack.ss_size = kStack - shift;
    context.uc_link = nullptr;
    makecontext(&context, enter, 0);
    setcontext(&context);
  }
  current->arrive();
}

void Fiber::resume_host() { host().resume(nullptr); }

}  // namespace fastbptt::emulation
