// What every processor of the architecture has: SSE2 or NEON.
#include "cpu/kernels.h"

#define FASTBPTT_VEC_BYTES 16
#define FASTBPTT_ISA "baseline"
#define FASTBPTT_TABLE kBaselineKernels
#include "cpu/kernels.inc"
