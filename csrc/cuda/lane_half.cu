#include "cuda/launch_lane.cuh"

namespace fastbptt {

template PersistentKernel<FwdRecurrence<half_t>> lane_kernel(CellKind, const Tiling&);
template PersistentKernel<BwdRecurrence<half_t>> lane_kernel(CellKind, const Tiling&);

}  // namespace fastbptt
