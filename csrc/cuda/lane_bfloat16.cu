#include "cuda/launch_lane.cuh"

namespace fastbptt {

template PersistentKernel<FwdRecurrence<bfloat16_t>> lane_kernel(CellKind, const Tiling&);
template PersistentKernel<BwdRecurrence<bfloat16_t>> lane_kernel(CellKind, const Tiling&);

}  // namespace fastbptt
