// What every processor of the architecture has: SSE2 or NEON.
#include "cpu/kernels.h"

#define FASTBPTT_VEC_BYTES 16
#include "cpu/kernels.inc"

namespace fastbptt {

extern const KernelTable kBaselineKernels = {"baseline",
                                             nullptr,
                                             &kKernels<float>,
                                             &kKernels<double>,
                                             nullptr,
                                             nullptr,
                                             &kTangentKernels<float>,
                                             &kTangentKernels<double>,
                                             &kUserKernels<float>,
                                             &kUserKernels<double>};

}  // namespace fastbptt
