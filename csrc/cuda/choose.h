// Which kernel runs a recurrence.
//
//   stepwise  a library product and a kernel a step: any size and dtype, LSTM projections too
//   lane      a block runs one lane, and its threads' registers hold W_hh: few hidden units
//   resident  one block keeps W_hh, and its tile of the batch, for all steps
//   cluster   2 to 16 blocks of a cluster share W_hh (sm_90)
//   grid      as many blocks as the device holds at once share W_hh; they exchange through L2
//
// The fastest by step_model.h's estimate that the device can run. More blocks have more registers to
// keep W_hh in, where it is read in no time, and less each to multiply; but their exchange takes time.
// Fewer lanes a team make a step shorter, until the teams come in waves.
#pragma once

#include <algorithm>
#include <map>
#include <tuple>

#include "cuda/divide.h"
#include "cuda/lane_shape.h"
#include "cuda/wish.h"

namespace fastbptt {

// A division, and how its teams run: `waves` times at most `at_once` of them.
struct Plan {
  Tiling tiling;
  int64_t at_once, waves;
  int64_t cycles;  // of a step, all waves

  bool exists() const { return tiling.warps > 0; }
  Kernel kernel() const {
    return !exists()             ? Kernel::kStepwise
           : tiling.sharers > 0  ? Kernel::kLane
           : tiling.is_grid      ? Kernel::kGrid
           : tiling.cluster == 1 ? Kernel::kResident
                                 : Kernel::kCluster;
  }

  // Of a launch; a grid's waves are launched one after another, since all blocks of one have to run.
  int64_t launches() const { return tiling.is_grid ? waves : 1; }
  int64_t teams(int64_t lanes) const {
    const int64_t tiles = ceil_div(lanes, tiling.lanes);
    return tiling.is_grid ? std::min(tiles, at_once) : tiles;
  }
  // What a launch of a grid needs in global memory: see GridMemory.
  int64_t flags(int64_t lanes) const { return tiling.is_grid ? teams(lanes) * kFlagStride : 0; }
  int64_t x_numbers(int64_t lanes, int column_gates) const {
    return teams(lanes) * 2 * tiling.lanes * column_gates * tiling.team() * tiling.units;
  }
};

// Blocks for choose_plan to try, with all numbers of lanes.
template <typename Fn>
void for_each_shape(const Divided& d, const Wish& wish, const DeviceLimits& limits, Fn&& fn) {
  const int most = limits.capability < 90 ? 1 : kMaxCluster;
  const auto is_wanted = [&](Kernel kernel) {
    return wish.kernel == kernel || wish.kernel == Kernel::kAuto;
  };
  const auto units_of = [&](int64_t blocks) { return round_up(ceil_div(d.H, blocks), kUnitGroup); };
  const auto try_shape = [&](int64_t clusters, int cluster, int64_t units, bool is_grid) {
    if (wish.cluster && cluster != wish.cluster) return;
    fn(Blocks2d{int(clusters), cluster, int(units), 0}, is_grid);
  };
  for (int cluster = 1; cluster <= most; cluster *= 2) {
    if (!is_wanted(cluster == 1 ? Kernel::kResident : Kernel::kCluster)) continue;
    try_shape(1, cluster, units_of(cluster), false);
  }
  if (!is_wanted(Kernel::kGrid)) return;
  // Forward each block needs all of x: clusters have nothing to share.
  for (int cluster = 1; cluster <= (d.is_backward || wish.cluster ? most : 1); cluster *= 2) {
    const int64_t clusters = limits.multiprocessors / cluster;
    if (clusters == 0) break;
    const int64_t least_units = units_of(clusters * cluster);
    for (int64_t units = least_units; units <= 4 * least_units; units += least_units) {
      const int64_t used = ceil_div(d.H, units * cluster);
      try_shape(used, cluster, units, true);
      if (used == 1) break;
    }
  }
}

// A plan that exists, or none. is_replayed: whether the stepwise kernel's launches would be, from a
// graph; blocks_at_once(tiling): how many blocks of such a kernel the device
// holds, a whole number of clusters; 0 if it cannot run it.
template <typename BlocksAtOnce>
Plan choose_plan(const Divided& d, int64_t lanes, bool is_replayed, const Wish& wish,
                 const DeviceLimits& limits, BlocksAtOnce&& blocks_at_once) {
  Plan best{};
  const bool must_beat = wish.kernel == Kernel::kAuto;
  if (must_beat) best.cycles = stepwise_cycles(d, lanes, is_replayed);
  if (wish.kernel == Kernel::kLane || must_beat) {
    const Tiling tiling = divide_lane(d);
    const int64_t at_once = tiling.warps > 0 ? blocks_at_once(tiling) : 0;
    if (at_once > 0) {
      const int64_t waves = ceil_div(lanes, at_once);
      const int64_t blocks = ceil_div(std::min(lanes, at_once), limits.multiprocessors);
      const int64_t cycles = waves * lane_cycles(d, tiling, blocks);
      if (!must_beat || cycles < best.cycles) best = {tiling, at_once, waves, cycles};
    }
  }
  std::map<std::tuple<bool, int, int, int>, int64_t> answers;
  for_each_shape(d, wish, limits, [&](Blocks2d blocks, bool is_grid) {
    for (blocks.lanes = 1; blocks.lanes <= std::min<int64_t>(kTileLanes, lanes); ++blocks.lanes) {
      if (wish.lanes && blocks.lanes != std::min<int64_t>(wish.lanes, lanes)) continue;
      const int64_t tiles = ceil_div(lanes, blocks.lanes);
      const Tiling tiling = divide(d, blocks, is_grid, limits.shared_bytes);
      if (tiling.warps == 0) continue;
      const bool is_known = best.exists() || must_beat;
      if (is_known && step_cycles(d, tiling) >= best.cycles) continue;  // whatever the device says
      const auto key = std::tuple(is_grid, tiling.cluster, tiling.warps, tiling.shared.bytes);
      const auto [found, is_new] = answers.try_emplace(key, 0);
      if (is_new) found->second = blocks_at_once(tiling);
      const int64_t teams = found->second / tiling.team();
      if (teams == 0) continue;
      const int64_t waves = ceil_div(tiles, teams);
      const int64_t cycles = step_cycles(d, tiling, std::min(tiles, teams));
      if (is_known && waves * cycles >= best.cycles) continue;
      best = {tiling, teams, waves, waves * cycles};
    }
  });
  return best;
}

}  // namespace fastbptt
