// AVX-512 with products of bfloat16.
//
// System headers first: the target below must not reach the code in them.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernels.h"

FASTBPTT_TARGET("avx512bf16,avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#define FASTBPTT_VEC_BYTES 64
#define FASTBPTT_AVX512
#define FASTBPTT_AVX512_BF16
#include "cpu/kernels.inc"

namespace fastbptt {

extern const KernelTable kAvx512Bf16Kernels = {
    "avx512_bf16", &kAvx512Kernels, nullptr, nullptr, nullptr, &kKernels<bfloat16_t>};

}  // namespace fastbptt
FASTBPTT_TARGET_END
#endif
