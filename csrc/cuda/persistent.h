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

template <typename Product, typename scalar_t>
struct Persistent {
  using Fwd = FwdRecurrence<scalar_t>;
  using Bwd = BwdRecurrence<scalar_t>;

  // The division that a kernel would run with here; without warps if it cannot.
  static Tiling tiling(CellKind cell, const Fwd& p, Kernel kernel);
  static Tiling tiling(CellKind cell, const Bwd& p, Kernel kernel);
  static void run(CellKind cell, const Fwd& p, const Tiling& tiling, Stream stream);
  static void run(CellKind cell, const Bwd& p, const Tiling& tiling, Stream stream);
};

// d_by_lane: [p.steps, lanes, columns]; steps: the span's.
template <typename scalar_t>
void run_sum_lanes(const BwdRecurrence<scalar_t>& p, const scalar_t* d_by_lane, int64_t steps,
                   int64_t columns, Stream stream);

}  // namespace fastbptt
