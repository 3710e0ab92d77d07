// System headers first: the target below must not reach the code in them.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernels.h"

FASTBPTT_TARGET("avx2,fma,f16c")
#define FASTBPTT_VEC_BYTES 32
#define FASTBPTT_F16C
#include "cpu/kernels.inc"

namespace fastbptt {

extern const KernelTable kAvx2Kernels = {"avx2",
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
FASTBPTT_TARGET_END
#endif
