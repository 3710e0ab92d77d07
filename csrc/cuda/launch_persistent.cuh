// The bodies of persistent.h, for a source of each arithmetic.
#pragma once

#include "cuda/for_cell.h"
#include "cuda/persistent.cuh"
#include "cuda/persistent.h"
#include "cuda/plan_cache.h"

namespace fastbptt {
namespace {

// What differs between the passes.
template <typename Cell, typename Product, typename Params>
struct Pass;

template <typename Cell, typename Product, typename scalar_t>
struct Pass<Cell, Product, FwdRecurrence<scalar_t>> {
  using Params = FwdRecurrence<scalar_t>;
  using Step = FwdStep<Cell, scalar_t>;
  using Place = FwdPlace;
  template <Reach reach>
  static constexpr auto kOf = persistent_forward_kernel<Cell, Product, reach>;
  static Divided divided(int64_t H) { return Divided::forward<Cell>(Product::kArithmetic, H); }
};

template <typename Cell, typename Product, typename scalar_t>
struct Pass<Cell, Product, BwdRecurrence<scalar_t>> {
  using Params = BwdRecurrence<scalar_t>;
  using Step = BwdStep<Cell, scalar_t>;
  using Place = typename Step::Place;
  template <Reach reach>
  static constexpr auto kOf = persistent_backward_kernel<Cell, Product, reach>;
  static Divided divided(int64_t H) { return Divided::backward<Cell>(Product::kArithmetic, H); }
};

template <typename P>
PersistentKernel<typename P::Params> kernel_of(CellKind cell, const Tiling& tiling) {
  return tiling.sharers > 0    ? lane_kernel<typename P::Params>(cell, tiling)
         : tiling.is_grid      ? P::template kOf<Reach::kGrid>
         : tiling.cluster == 1 ? P::template kOf<Reach::kBlock>
                               : P::template kOf<Reach::kCluster>;
}

inline PlanCache& plan_cache() {
  static PlanCache cache;
  return cache;
}

template <typename P>
PlanCache::Key key_of(int64_t H, int64_t lanes, bool is_replayed, const Wish& wish) {
  const auto kernel = reinterpret_cast<const void*>(P::template kOf<Reach::kBlock>);
  return {current_device(), kernel, H, lanes, is_replayed, wish};
}

Grid grid_of(const Tiling& tiling, int64_t teams) {
  return {{teams * tiling.team()},
          tiling.threads(),
          tiling.shared.bytes,
          tiling.cluster,
          /*cooperative=*/tiling.is_grid};
}

template <typename Product, typename Params>
Plan find_plan(CellKind cell, int64_t H, int64_t lanes, bool is_replayed, const Wish& wish) {
  Plan result{};
  for_cell(cell, [&](auto c) {
    using P = Pass<decltype(c), Product, Params>;
    const auto key = key_of<P>(H, lanes, is_replayed, wish);
    if (const auto known = plan_cache().find(key)) {
      result = *known;
      return;
    }
    const Divided divided = P::divided(H);
    static_assert(sizeof(typename P::Place) <= 40);
    if (divided.place_bytes != int(sizeof(typename P::Place)) ||
        divided.inputs != P::Step::kInputs || divided.results != P::Step::kResults) {
      throw std::logic_error("tiling.h counts other numbers of a step than step.cuh has");
    }
    const auto blocks_at_once = [&](const Tiling& tiling) {
      const Grid grid = grid_of(tiling, 1);
      return tiling.cluster * resident_clusters(kernel_of<P>(cell, tiling), grid);
    };
    result = choose_plan(divided, lanes, is_replayed, wish, device_limits(), blocks_at_once);
    plan_cache().put(key, result);
  });
  return result;
}

template <typename Product, typename Params>
void launch_persistent(CellKind cell, const Params& p, const Plan& plan, GridMemory memory,
                       Stream stream) {
  for_cell(cell, [&](auto c) {
    using P = Pass<decltype(c), Product, Params>;
    const int64_t lanes = p.num_lanes(), teams = plan.teams(lanes);
    const int64_t tiles = ceil_div(lanes, plan.tiling.lanes);
    const auto kernel = kernel_of<P>(cell, plan.tiling);
    for (int64_t tile = 0; tile < tiles; tile += teams) {
      memory.first_lane = tile * plan.tiling.lanes;
      const Grid grid = grid_of(plan.tiling, std::min(teams, tiles - tile));
      try {
        launch(kernel, grid, stream, p, plan.tiling, memory);
      } catch (const LaunchError& error) {
        for (const bool is_replayed : {false, true}) {
          plan_cache().put(key_of<P>(p.H, lanes, is_replayed, Wish{}), Plan{});
        }
        if (tile == 0) throw;
        throw std::runtime_error(error.what());  // too late for another kernel
      }
      memory.flags += plan.flags(lanes);
    }
  });
}

}  // namespace

template <typename Product, typename scalar_t>
Plan Persistent<Product, scalar_t>::plan(CellKind cell, bool is_backward, int64_t H, int64_t lanes,
                                         bool is_replayed, const Wish& wish) {
  return is_backward ? find_plan<Product, Bwd>(cell, H, lanes, is_replayed, wish)
                     : find_plan<Product, Fwd>(cell, H, lanes, is_replayed, wish);
}
template <typename Product, typename scalar_t>
void Persistent<Product, scalar_t>::run(CellKind cell, const Fwd& p, const Plan& plan,
                                        const GridMemory& memory, Stream stream) {
  launch_persistent<Product>(cell, p, plan, memory, stream);
}
template <typename Product, typename scalar_t>
void Persistent<Product, scalar_t>::run(CellKind cell, const Bwd& p, const Plan& plan,
                                        const GridMemory& memory, Stream stream) {
  launch_persistent<Product>(cell, p, plan, memory, stream);
}

template <typename scalar_t>
void run_sum_lanes(const BwdRecurrence<scalar_t>& p, const scalar_t* d_by_lane, int64_t steps,
                   int64_t columns, Stream stream) {
  launch(sum_lanes_kernel<scalar_t>, grid_for(steps * p.sequences.layout.B, columns), stream, p,
         d_by_lane, steps, columns);
}

}  // namespace fastbptt
