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
