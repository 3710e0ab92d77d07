#include "cuda/launch_persistent.cuh"

namespace fastbptt {

template struct Persistent<Tf32Cores, float>;

}  // namespace fastbptt
