// How a lane kernel divides W_hh among the threads of a block, and how long its step takes; see lane.cuh.
#pragma once

#include <cstdint>

#include "cuda/tiling.h"

namespace fastbptt {

// Warps that fetch, store and compute places, and steps that inputs are fetched ahead.
constexpr int kLaneCarriers = 3, kLaneAhead = 4;
constexpr int kLaneRing = 8, kLanePlaces = 4 * kPlaceSteps;
// Places of kPlaceSteps steps are written while those from the step before on are read, and those that are
// fetched for meanwhile.
static_assert(kLaneRing > kLaneAhead && kLanePlaces >= 3 * kPlaceSteps + 1 &&
              kPlaceSteps >= kLaneAhead);

// Threads of a unit, and the columns of W that each of them has, of every gate.
struct LaneShape {
  int parts, columns;
  int least_gates, most_gates;                             // of the cells that have such a kernel
  constexpr int units() const { return parts * columns; }  // at most
  constexpr bool is_for(int gates) const { return least_gates <= gates && gates <= most_gates; }
};

// As many numbers of W as threads have registers.
constexpr LaneShape kLaneShapes[] = {{2, 16, 1, 4}, {2, 32, 1, 4}, {2, 40, 3, 3}, {2, 64, 1, 1}};

constexpr int lane_threads(int parts, int columns) {
  return parts * parts * columns + kLaneCarriers * kWarp;
}

// The least one for so many hidden units; without parts if there is none.
constexpr LaneShape lane_shape(int gates, int64_t H) {
  LaneShape least{};
  for (const LaneShape& shape : kLaneShapes) {
    const bool is_less = least.parts == 0 || shape.units() < least.units();
    if (shape.is_for(gates) && H <= shape.units() && is_less) least = shape;
  }
  return least;
}

// Of the lane kernel; without warps if there is none.
inline Tiling divide_lane(const Divided& d) {
  const LaneShape shape = lane_shape(d.gates, d.H);
  Tiling t{};
  if (shape.parts == 0) return t;
  t.clusters = t.cluster = t.lanes = 1;
  t.units = int(round_up(d.H, kUnitGroup));
  t.parts = shape.parts;
  t.part_columns = shape.columns;
  t.warps = int(ceil_div(t.units * t.parts, kWarp)) + kLaneCarriers;
  const int bytes = tile_shape(d.arithmetic).x_bytes;
  const int x = d.column_gates() * t.parts * (t.part_columns + 4);  // as OneLane::kXNumbers
  SharedLayout& shared = t.shared;
  shared.x_buffers = 2;
  shared.x = kBarrierBytes;
  shared.inputs = shared.x + shared.x_buffers * x * 4;
  shared.results = shared.inputs + kLaneRing * d.inputs * t.pairs() * bytes;
  shared.places = shared.results + 2 * d.results * t.pairs() * bytes;
  shared.addresses = int(round_up(shared.places + kLanePlaces * d.place_bytes, 16));
  const int addresses = d.inputs + 2 * d.results;
  shared.bytes = shared.addresses + kLanePlaces * addresses * int(sizeof(void*));
  return t;
}

}  // namespace fastbptt
