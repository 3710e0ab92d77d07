// The types that numbers are stored in, and those that they are summed in.
#pragma once

#ifdef FASTBPTT_EMULATED
#include "emulation/numbers.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fastbptt {

using half_t = __half;
using bfloat16_t = __nv_bfloat16;

}  // namespace fastbptt

#endif

namespace fastbptt {

// The type that sums and states are kept in: double for double, else float.
template <typename scalar_t>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename scalar_t>
using Accumulator = typename AccumulatorOf<scalar_t>::type;

}  // namespace fastbptt
