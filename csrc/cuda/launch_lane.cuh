// The body of lane_kernel, for a source of each dtype.
#pragma once

#include <iterator>
#include <stdexcept>

#include "cuda/for_cell.h"
#include "cuda/lane.cuh"
#include "cuda/persistent.h"

namespace fastbptt {
namespace {

template <typename Params, typename Cell, size_t kShape>
struct LaneKernel;

template <typename scalar_t, typename Cell, size_t kShape>
struct LaneKernel<FwdRecurrence<scalar_t>, Cell, kShape> {
  static constexpr auto kIs = lane_forward_kernel<Cell, scalar_t, kShape>;
};
template <typename scalar_t, typename Cell, size_t kShape>
struct LaneKernel<BwdRecurrence<scalar_t>, Cell, kShape> {
  static constexpr auto kIs = lane_backward_kernel<Cell, scalar_t, kShape>;
};

template <typename Params, typename Cell, size_t kShape = 0>
PersistentKernel<Params> find_lane_kernel(const Tiling& tiling) {
  if constexpr (kShape < std::size(kLaneShapes)) {
    constexpr LaneShape shape = kLaneShapes[kShape];
    if constexpr (shape.is_for(Cell::kGates)) {
      if (tiling.lane_units == shape.units && tiling.sharers == shape.sharers) {
        return LaneKernel<Params, Cell, kShape>::kIs;
      }
    }
    return find_lane_kernel<Params, Cell, kShape + 1>(tiling);
  } else {
    throw std::logic_error("no lane kernel has such a shape");
  }
}

}  // namespace

template <typename Params>
PersistentKernel<Params> lane_kernel(CellKind cell, const Tiling& tiling) {
  PersistentKernel<Params> result = nullptr;
  for_cell(cell, [&](auto c) { result = find_lane_kernel<Params, decltype(c)>(tiling); });
  return result;
}

}  // namespace fastbptt
