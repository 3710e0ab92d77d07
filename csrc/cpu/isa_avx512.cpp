// System headers first: the target below must not reach the code in them.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernels.h"

FASTBPTT_TARGET("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#define FASTBPTT_VEC_BYTES 64
#define FASTBPTT_AVX512
#include "cpu/kernels.inc"

namespace fastbptt {

extern const KernelTable kAvx512Kernels = {"avx512",
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
