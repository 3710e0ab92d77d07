// Marks what both the host's compiler and nvcc compile, and runs on either side.
#pragma once

#ifdef __CUDACC__
#define FASTBPTT_HD __host__ __device__
#define FASTBPTT_UNROLL _Pragma("unroll")
#else
#define FASTBPTT_HD
#define FASTBPTT_UNROLL _Pragma("GCC unroll 16")
#endif
