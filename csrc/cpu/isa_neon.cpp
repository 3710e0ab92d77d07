// What every AArch64 processor has: 32 registers of 16 bytes, and conversions of float16.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "cpu/kernels.h"

#ifndef __clang__
// Before registers are chosen GCC would move loads so far up that accumulators go through memory.
#pragma GCC optimize("no-schedule-insns")
#endif
#define FASTBPTT_VEC_BYTES 16
#define FASTBPTT_NEON
#include "cpu/kernels.inc"

namespace fastbptt {

extern const KernelTable kNeonKernels = {"neon",
                                         nullptr,
                                         &kKernels<float>,
                                         &kKernels<double>,
                                         &kKernels<half_t>,
                                         &kKernels<bfloat16_t>,
                                         &kTangentKernels<float>,
                                         &kTangentKernels<double>,
                                         &kUserKernels<float>,
                                         &kUserKernels<double>};

}  // namespace fastbptt
#endif
