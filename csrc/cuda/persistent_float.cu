#include "cuda/launch_persistent.cuh"

namespace fastbptt {

template struct Persistent<PlainFma, float>;
template void run_sum_lanes(const BwdRecurrence<float>&, const float*, int64_t, int64_t, Stream);

}  // namespace fastbptt
