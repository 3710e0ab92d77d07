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

// How W is divided, for up to so many units.
struct LaneShape {
  int units;                    // at most
  int sharers;                  // threads that have a unit's state
  int least_gates, most_gates;  // of the cells that have such a kernel
  int shared_numbers;  // of W, that a thread has in shared memory: the rest are in registers
  constexpr bool is_for(int gates) const { return least_gates <= gates && gates <= most_gates; }

  // A thread multiplies for some units, the same ones as the others of its tile, which share the columns. The
  // more units, the less of x it has to read from shared memory; but the more often sums are exchanged, so
  // that few units, whose x is soon read, are faster one by one. Forward there is a sum for each gate.
  constexpr int tile_units(int gates, bool is_backward) const {
    const int x_bytes =
        4 * units * units * (is_backward ? gates : 1);  // that all threads read, one by one
    const int wished = x_bytes > 32768 ? (is_backward || gates == 1 ? 4 : 2) : gates == 4 ? 2 : 1;
    return units % (4 * wished * sharers) == 0 ? wished : 2;
  }
  constexpr int tile_threads(int gates, bool is_backward) const {
    return tile_units(gates, is_backward) * sharers;
  }
  // Of a thread, and how far apart those of a tile's threads begin in x: in other banks.
  constexpr int columns(int gates, bool is_backward) const {
    return units / tile_threads(gates, is_backward);
  }
  constexpr int stride(int gates, bool is_backward) const {
    const int own = columns(gates, is_backward);
    return own % 8 == 0 ? own + 4 : own;
  }
  // Numbers of x, of each of a step's groups of columns.
  constexpr int x_numbers(int gates, bool is_backward) const {
    return tile_threads(gates, is_backward) * stride(gates, is_backward);
  }
  constexpr int threads() const { return units * sharers + kLaneCarriers * kWarp; }
};

// As many numbers of W as threads have registers, and of more units the rest in shared memory.
constexpr LaneShape kLaneShapes[] = {
    {32, 2, 1, 4, 0},  {64, 2, 1, 4, 0},  {80, 2, 3, 3, 0},   {96, 4, 3, 3, 0},
    {96, 2, 4, 4, 96}, {128, 2, 1, 1, 0}, {128, 2, 3, 3, 80},
};

// The least one for so many hidden units; without units if there is none.
constexpr LaneShape lane_shape(int gates, int64_t H) {
  LaneShape least{};
  for (const LaneShape& shape : kLaneShapes) {
    const bool is_less = least.units == 0 || shape.units < least.units;
    if (shape.is_for(gates) && H <= shape.units && is_less) least = shape;
  }
  return least;
}

// Of the lane kernel; without warps if there is none.
inline Tiling divide_lane(const Divided& d) {
  const LaneShape shape = lane_shape(d.gates, d.H);
  Tiling t{};
  if (shape.units == 0) return t;
  t.clusters = t.cluster = t.lanes = 1;
  t.units = int(round_up(d.H, kUnitGroup));
  t.lane_units = shape.units;
  t.sharers = shape.sharers;
  t.warps = int(ceil_div(t.units * t.sharers, kWarp)) + kLaneCarriers;
  const int bytes = tile_shape(d.arithmetic).x_bytes;
  const int x = d.column_gates() * shape.x_numbers(d.gates, d.is_backward);
  SharedLayout& shared = t.shared;
  shared.x_buffers = 2;
  shared.x = kBarrierBytes;
  shared.inputs = shared.x + shared.x_buffers * x * 4;
  shared.results = shared.inputs + kLaneRing * d.inputs * t.pairs() * bytes;
  shared.places = shared.results + 2 * d.results * t.pairs() * bytes;
  shared.addresses = int(round_up(shared.places + kLanePlaces * d.place_bytes, 16));
  const int addresses = d.inputs + 2 * d.results;
  shared.weights =
      int(round_up(shared.addresses + kLanePlaces * addresses * int(sizeof(void*)), 16));
  shared.bytes = shared.weights + shape.units * shape.sharers * shape.shared_numbers * 4;
  return t;
}

}  // namespace fastbptt
