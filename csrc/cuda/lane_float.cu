#include "cuda/launch_lane.cuh"

namespace fastbptt {

template PersistentKernel<FwdRecurrence<float>> lane_kernel(CellKind, const Tiling&);
template PersistentKernel<BwdRecurrence<float>> lane_kernel(CellKind, const Tiling&);

}  // namespace fastbptt
