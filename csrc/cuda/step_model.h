// How long a step takes, in cycles of an SM, by counts: what the choice among divisions goes by.
//
// Counted: instructions that a sub-partition issues, bytes of shared memory at 128 a cycle, bytes that
// blocks exchange. The rest is assumed, from published latencies, until it has been measured.
#pragma once

#include <algorithm>

#include "cuda/tiling.h"

namespace fastbptt {

struct StepModel {
  static constexpr int64_t kSubPartitions = 4;
  static constexpr int64_t kTilePair = 50;      // a matrix's load, and results that others wait for
  static constexpr int64_t kWait = 50;          // from a barrier's completion to the product
  static constexpr int64_t kBlockBarrier = 70;  // with the stores that it waits for
  static constexpr int64_t kElman = 130, kGated = 260;  // a cell's chain of dependent operations
  static constexpr int64_t kGather = 90;                // a warp's shuffles, and addresses
  static constexpr int64_t kToPeer = 280;               // to another SM, and counted by its barrier
  static constexpr int64_t kPeerBytes = 10;  // a cycle, into an SM from its cluster's others
  // Through L2: a release, a flag that all see and an acquire, and then a load, together 1 us, as long
  // as others' barriers over a grid take; bytes a cycle into an SM, and into all.
  static constexpr int64_t kFlags = 1450, kL2 = 300, kL2Bytes = 64, kAllL2Bytes = 3200;
  // A stepwise step's launches, replayed from a graph or by the host.
  static constexpr int64_t kReplayed = 7000, kLaunched = 19000;

  const Divided& d;
  const Tiling& t;
  int64_t teams = 1;  // that run at once

  // Between the arrival of x and the warps' sums in shared memory.
  int64_t product() const {
    const bool is_fma = d.arithmetic == Arithmetic::kFma;
    const int64_t warps = t.row_warps * t.column_warps, tiles = t.row_tiles * t.column_tiles;
    const int64_t pairs = t.column_tiles / 2;
    const int64_t issue = ceil_div(warps, kSubPartitions) * tiles * (is_fma ? 4 * t.lanes : 8);
    const int64_t chain = pairs * (is_fma ? 16 * t.lanes : kTilePair);
    // A tile's columns of all lanes: 256 bytes, or numbers that all threads of a warp read at once.
    const int64_t x = warps * t.column_tiles * (is_fma ? t.lanes : 2);
    const int64_t weights = warps * t.row_tiles * t.extra_tiles * kTileBytes / 128;
    return std::max({issue, chain, x + weights});
  }
  int64_t sums() const { return 35 + 15 * (t.column_warps - 1); }
  int64_t cell() const { return d.gates == 1 ? kElman : kGated; }

  // Bytes of x that a block gets in a step of a group.
  int64_t x_bytes() const {
    return int64_t(t.lanes) * d.column_gates() * t.column_units * tile_shape(d.arithmetic).x_bytes;
  }
  int64_t partial_bytes() const { return int64_t(t.cluster) * t.lanes * t.units * 4; }
  bool has_partials() const { return d.is_backward && t.cluster > 1; }

  // What keeps the SM from another group.
  int64_t work() const {
    int64_t cycles = product() + kBlockBarrier + t.passes * (sums() + cell());
    if (t.is_grid) {
      const int64_t all = x_bytes() * t.team() * teams;
      cycles += 2 * kBlockBarrier + kL2 + std::max(x_bytes() / kL2Bytes, all / kAllL2Bytes);
    } else if (d.is_backward || t.cluster == 1) {
      cycles += kBlockBarrier;
    } else {
      cycles += t.passes * kGather;
    }
    if (has_partials()) cycles += kBlockBarrier + sums();
    return cycles;
  }
  // What a group waits for beside it.
  int64_t exchange() const {
    int64_t cycles = 0;
    if (t.is_grid) cycles += kFlags;
    if (!t.is_grid && !d.is_backward && t.cluster > 1) {
      cycles += kWait + kToPeer + x_bytes() / kPeerBytes;
    }
    if (has_partials()) cycles += kWait + kToPeer + partial_bytes() / kPeerBytes;
    return cycles;
  }
  // Of all groups.
  int64_t cycles() const { return std::max(work() + exchange(), t.groups * work()); }
};

inline int64_t step_cycles(const Divided& d, const Tiling& t, int64_t teams = 1) {
  return StepModel{d, t, teams}.cycles();
}

// A stepwise step's: two launches, and a product that a library computes at about half of an H100's
// peak, or reads the weights of from L2.
inline int64_t stepwise_cycles(const Divided& d, int64_t lanes, bool is_replayed) {
  const int64_t weights = d.gates * d.H * d.H;
  const int64_t multiply_adds_a_cycle = d.arithmetic == Arithmetic::kTensor16 ? 130000
                                        : d.arithmetic == Arithmetic::kTf32   ? 65000
                                                                              : 11000;
  const int64_t read = weights * tile_shape(d.arithmetic).x_bytes / StepModel::kAllL2Bytes;
  const int64_t launches = is_replayed ? StepModel::kReplayed : StepModel::kLaunched;
  return launches + std::max(lanes * weights / multiply_adds_a_cycle, read);
}

}  // namespace fastbptt
