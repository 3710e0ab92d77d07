// System headers first: the target below must not reach the code in them.
#if defined(__x86_64__)
#include "cpu/kernels.h"

#pragma GCC target("avx2,fma")
#define FASTBPTT_VEC_BYTES 32
#define FASTBPTT_ISA "avx2"
#define FASTBPTT_TABLE kAvx2Kernels
#include "cpu/kernels.inc"
#endif
