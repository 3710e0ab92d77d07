// Launchers of the persistent kernels; see persistent.cuh.
#pragma once

#include "cuda/choose.h"
#include "cuda/launch.h"
#include "cuda/params.cuh"

namespace fastbptt {

// What multiplies; see product.cuh.
template <typename number>
struct TensorCores;
struct Tf32Cores;
struct PlainFma;

// Params: FwdRecurrence or BwdRecurrence.
template <typename Params>
using PersistentKernel = void (*)(Params, Tiling, GridMemory);

// The one of lane.cuh that is so divided.
template <typename Params>
PersistentKernel<Params> lane_kernel(CellKind cell, const Tiling& tiling);

template <typename Product, typename scalar_t>
struct Persistent {
  using Fwd = FwdRecurrence<scalar_t>;
  using Bwd = BwdRecurrence<scalar_t>;

  // How a kernel would run a recurrence of so many lanes here; a plan that does not exist if it cannot.
  // is_replayed: whether the stepwise kernel would be replayed from a graph.
  static Plan plan(CellKind cell, bool is_backward, int64_t H, int64_t lanes, bool is_replayed,
                   const Wish& wish);
  // Throws LaunchError, and nothing has run, if the kernel cannot be launched; then the plan for such a
  // call is the stepwise kernel. memory: of a plan for a grid; for all launches.
  static void run(CellKind cell, const Fwd& p, const Plan& plan, const GridMemory& memory,
                  Stream stream);
  static void run(CellKind cell, const Bwd& p, const Plan& plan, const GridMemory& memory,
                  Stream stream);
};

// d_by_lane: [p.steps, lanes, columns]; steps: the span's.
template <typename scalar_t>
void run_sum_lanes(const BwdRecurrence<scalar_t>& p, const scalar_t* d_by_lane, int64_t steps,
                   int64_t columns, Stream stream);

}  // namespace fastbptt
