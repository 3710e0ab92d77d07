// The bodies of persistent.h, for a source of each arithmetic.
#pragma once

#include "cuda/for_cell.h"
#include "cuda/persistent.cuh"
#include "cuda/persistent.h"

namespace fastbptt {
namespace {

static_assert(sizeof(FwdPlace) == kFwdPlaceBytes && sizeof(BwdPlace<float>) == kBwdPlaceBytes);

// What differs between the passes.
template <typename Cell, typename Product, typename Params>
struct Pass;

template <typename Cell, typename Product, typename scalar_t>
struct Pass<Cell, Product, FwdRecurrence<scalar_t>> {
  static constexpr auto kKernel = persistent_forward_kernel<Cell, Product>;
  static int64_t lanes(const FwdRecurrence<scalar_t>& p) { return p.sequences.layout.B; }
  static Divided divided(int64_t H) {
    return forward_product(Product::kArithmetic, H, Cell::kGates);
  }
};

template <typename Cell, typename Product, typename scalar_t>
struct Pass<Cell, Product, BwdRecurrence<scalar_t>> {
  static constexpr auto kKernel = persistent_backward_kernel<Cell, Product>;
  static int64_t lanes(const BwdRecurrence<scalar_t>& p) { return p.num_lanes(); }
  static Divided divided(int64_t H) {
    return backward_product(Product::kArithmetic, H, Cell::kGates);
  }
};

Grid grid_of(const Tiling& tiling, int64_t lanes) {
  return {{ceil_div(lanes, tiling.lanes) * tiling.cluster},
          tiling.threads(),
          tiling.shared.bytes,
          tiling.cluster};
}

template <typename Product, typename Params>
Tiling find_tiling(CellKind cell, const Params& p, Kernel kernel) {
  Tiling result{};
  for_cell(cell, [&](auto c) {
    using P = Pass<decltype(c), Product, Params>;
    const auto fits = [](const Tiling& tiling) {
      return resident_clusters(P::kKernel, grid_of(tiling, tiling.lanes)) > 0;
    };
    result = choose_tiling(P::divided(p.H), P::lanes(p), kernel, device_limits(), fits);
  });
  return result;
}

template <typename Product, typename Params>
void launch_persistent(CellKind cell, const Params& p, const Tiling& tiling, Stream stream) {
  for_cell(cell, [&](auto c) {
    using P = Pass<decltype(c), Product, Params>;
    launch(P::kKernel, grid_of(tiling, P::lanes(p)), stream, p, tiling);
  });
}

}  // namespace

template <typename Product, typename scalar_t>
Tiling Persistent<Product, scalar_t>::tiling(CellKind cell, const Fwd& p, Kernel kernel) {
  return find_tiling<Product>(cell, p, kernel);
}
template <typename Product, typename scalar_t>
Tiling Persistent<Product, scalar_t>::tiling(CellKind cell, const Bwd& p, Kernel kernel) {
  return find_tiling<Product>(cell, p, kernel);
}
template <typename Product, typename scalar_t>
void Persistent<Product, scalar_t>::run(CellKind cell, const Fwd& p, const Tiling& tiling,
                                        Stream stream) {
  launch_persistent<Product>(cell, p, tiling, stream);
}
template <typename Product, typename scalar_t>
void Persistent<Product, scalar_t>::run(CellKind cell, const Bwd& p, const Tiling& tiling,
                                        Stream stream) {
  launch_persistent<Product>(cell, p, tiling, stream);
}

template <typename scalar_t>
void run_sum_lanes(const BwdRecurrence<scalar_t>& p, const scalar_t* d_by_lane, int64_t steps,
                   int64_t columns, Stream stream) {
  launch(sum_lanes_kernel<scalar_t>, grid_for(steps * p.sequences.layout.B, columns), stream, p,
         d_by_lane, steps, columns);
}

}  // namespace fastbptt
