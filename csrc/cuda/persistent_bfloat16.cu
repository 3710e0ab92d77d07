#include "cuda/launch_persistent.cuh"

namespace fastbptt {

template struct Persistent<TensorCores<bfloat16_t>, bfloat16_t>;
template void run_sum_lanes(const BwdRecurrence<bfloat16_t>&, const bfloat16_t*, int64_t, int64_t,
                            Stream);

}  // namespace fastbptt
