// How long a step takes, in cycles of an SM: what the choice among divisions goes by.
//
// A sum of terms, whose weights were fitted to some 350 divisions of all cells and arithmetics on an
// H100 at 1980 MHz (H from 64 to 2048, B = 16): of four fifths of them it is within 8%. Most of a step
// goes into what no size changes: barriers, branches, and chains of instructions that wait for each
// other.
#pragma once

#include <algorithm>

#include "cuda/lane_shape.h"
#include "cuda/tiling.h"
#include "few_rows_launch.h"

namespace fastbptt {

struct StepModel {
  static constexpr double kStep = 820, kBackward = 650;  // of all; and backward more
  static constexpr double kGated = 250, kLstm = 100, kGatedBackward = 150;
  static constexpr double kWarp = 25, kColumnWarp = 12;  // barriers; sums of one more
  // A pair of tiles beside each other, in registers; of a second row of tiles; in shared memory, and
  // its bytes there.
  static constexpr double kPair = 60, kSecondRow = 74, kExtraPair = 180, kExtraByte = 0.004;
  // Of float32 as it is: at all, and a pair of each lane; the code of a single lane has no branches.
  static constexpr double kFma = 470, kFmaPair = 68, kFmaPairOfOne = 52, kExtraPairOfOne = 60;
  // Forward in a cluster: at all, of more blocks than four and than eight, and a byte of x.
  static constexpr double kPush = 220, kMoreThan4 = 150, kMoreThan8 = 70, kPushedByte = 0.13;
  // Backward: at all, a block's part of the sums, and a byte of what comes in.
  static constexpr double kSend = 90, kPart = 24, kSentByte = 0.028;
  // Through L2: at all, in clusters more, a byte into an SM, and into all.
  static constexpr double kGrid = 2420, kGridOfClusters = 420, kL2Byte = 0.025,
                          kAllL2Byte = 0.00014;

  const Divided& d;
  const Tiling& t;
  int64_t teams = 1;  // that run at once

  double cell() const {
    double cycles = kStep + (d.is_backward ? kBackward : 0);
    if (d.gates > 1) cycles += kGated + (d.is_backward ? kGatedBackward : 0);
    return d.gates == 4 ? cycles + kLstm : cycles;
  }

  double product() const {
    const int64_t pairs = t.column_tiles / 2, extra = t.extra_tiles / 2;
    double cycles = kWarp * t.warps + kColumnWarp * (t.column_warps - 1);
    const int64_t bytes = t.row_warps * t.column_warps * t.row_tiles * t.extra_tiles * kTileBytes;
    cycles += kExtraByte * double(bytes);
    if (d.arithmetic != Arithmetic::kFma) {
      cycles += double(pairs - extra) * (t.row_tiles == 1 ? kPair : kPair + kSecondRow);
    } else if (t.lanes > 1) {
      cycles += kFma + kFmaPair * double(pairs * t.row_tiles * t.lanes);
    } else {
      return cycles + kFmaPairOfOne * double(pairs * t.row_tiles) + kExtraPairOfOne * double(extra);
    }
    return cycles + kExtraPair * double(extra);
  }

  // Bytes of x that a block gets in a step.
  int64_t x_bytes() const {
    return int64_t(t.lanes) * d.column_gates() * t.column_units * tile_shape(d.arithmetic).x_bytes;
  }

  double exchange() const {
    double cycles = 0;
    if (t.is_grid) {
      const int64_t all = x_bytes() * t.team() * teams;
      cycles += kGrid + kL2Byte * double(x_bytes()) + kAllL2Byte * double(all);
      if (t.cluster > 1) cycles += kGridOfClusters;
    }
    if (t.cluster == 1) return cycles;
    if (d.is_backward) {
      const int64_t bytes = int64_t(t.cluster) * t.pairs() * 4;
      return cycles + kSend + kPart * t.cluster + kSentByte * double(bytes);
    }
    if (t.is_grid) return cycles;
    cycles += kPush + (t.cluster > 4 ? kMoreThan4 : 0) + (t.cluster > 8 ? kMoreThan8 : 0);
    return cycles + kPushedByte * double(x_bytes());
  }

  int64_t cycles() const { return int64_t(cell() + product() + exchange()); }
};

inline int64_t step_cycles(const Divided& d, const Tiling& t, int64_t teams = 1) {
  return StepModel{d, t, teams}.cycles();
}

// A lane kernel's, with so many blocks on an SM, that share its issue of instructions; fitted likewise.
inline int64_t lane_cycles(const Divided& d, const Tiling& t, int64_t blocks) {
  const int64_t warps = ceil_div(t.units * t.sharers, 4 * kWarp);  // of each of an SM's four parts
  double cycles = 310 + 2.8 * double(warps * d.gates * t.lane_units / t.sharers);
  if (d.gates > 1) cycles += 140;
  if (d.gates == 4) cycles += 40;
  if (d.is_backward) cycles += d.gates == 1 ? 115 : d.gates == 3 ? 10 : 80;
  if (lane_shape(d.gates, d.H).shared_numbers > 0 && tile_shape(d.arithmetic).x_bytes == 4)
    cycles += 150;
  return int64_t(cycles * (1 + 0.15 * double(blocks - 1)));
}

// A stepwise step's: a kernel, and a product, which reads the weights and is for so few lanes far from an
// H100's peak. Fitted to some 1200 recurrences of 1 to 128 lanes, H from 96 to 2048, half of them within a
// tenth, less 3000 cycles at all: so much of a step's share was the graph's capture. Where the products are
// those of few_rows.cuh, set by the times of these.
struct StepwiseModel {
  double forward, backward;  // at all, replayed from a graph
  double weight, multiply_add;
  static constexpr double kLaunched = 19000;  // the host launches no faster

  static StepwiseModel of(Arithmetic arithmetic, bool is_of_few_rows) {
    switch (arithmetic) {
      case Arithmetic::kTensor16: return {12100, 14700, 8.1e-4, 1.1e-5};
      case Arithmetic::kTf32: return {14800, 17500, 2.5e-3, 2.2e-5};
      case Arithmetic::kFma: break;
    }
    return is_of_few_rows ? StepwiseModel{10000, 12000, 1.3e-3, 1.35e-4}
                          : StepwiseModel{18900, 21600, 3.3e-3, 8.7e-5};
  }
};

inline int64_t stepwise_cycles(const Divided& d, int64_t lanes, bool is_replayed) {
  const int64_t weights = d.gates * d.H * d.H;
  const StepwiseModel model = StepwiseModel::of(d.arithmetic, are_few_rows(lanes, weights));
  const double replayed = (d.is_backward ? model.backward : model.forward) +
                          double(weights) * (model.weight + model.multiply_add * double(lanes));
  return int64_t(is_replayed ? replayed : std::max(replayed, StepwiseModel::kLaunched));
}

}  // namespace fastbptt
