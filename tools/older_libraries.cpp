// What compilers' headers use of newer C and C++ libraries, for a wheel that runs with older ones.
#include <new>

#define HIDDEN __attribute__((visibility("hidden")))

// Of glibc 2.32: whether the process has had one thread only, so that a count of references needs no
// atomic operation. One with torch's threads never has.
extern "C" HIDDEN char __libc_single_threaded;
char __libc_single_threaded = 0;

namespace std {

// Of GCC 11.
HIDDEN void __throw_bad_array_new_length();
void __throw_bad_array_new_length() { throw bad_array_new_length(); }

}  // namespace std

// Of GCC 11 too: what std::exception_ptr's copies and ends call since its headers have them inline. It
// is a pointer to the exception, which the library counts; its own copies and ends it has had before.
extern "C" {
void copy_exception_ptr(void** to,
                        void* const* from) asm("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
void end_exception_ptr(void** self) asm("_ZNSt15__exception_ptr13exception_ptrD1Ev");
HIDDEN void add_reference(void** self) asm("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
HIDDEN void release(void** self) asm("_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");
}
void add_reference(void** self) {
  void* copy;  // which never ends
  copy_exception_ptr(&copy, self);
}
void release(void** self) {
  end_exception_ptr(self);
  *self = nullptr;
}
