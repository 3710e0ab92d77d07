#include "cuda/launch_persistent.cuh"

namespace fastbptt {

template struct Persistent<TensorCores<half_t>, half_t>;
template void run_sum_lanes(const BwdRecurrence<half_t>&, const half_t*, int64_t, int64_t, Stream);

}  // namespace fastbptt
