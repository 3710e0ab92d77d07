// NEON with products of bfloat16.
//
// System headers first: the target below must not reach the code in them.
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/kernels.h"

#ifdef FASTBPTT_HAS_NEON_BF16
FASTBPTT_TARGET("arch=armv8.2-a+bf16")
#ifndef __clang__
// As in isa_neon.cpp.
#pragma GCC optimize("no-schedule-insns")
#endif
#define FASTBPTT_VEC_BYTES 16
#define FASTBPTT_NEON
#define FASTBPTT_NEON_BF16
#include "cpu/kernels.inc"

namespace fastbptt {

extern const KernelTable kNeonBf16Kernels = {"neon_bf16", &kNeonKernels, nullptr,
                                             nullptr,     nullptr,       &kKernels<bfloat16_t>};

}  // namespace fastbptt
FASTBPTT_TARGET_END
#endif
