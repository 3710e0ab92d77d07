// Between the phases of a user's cell: the mean and the deviation of values over all units of a lane,
// and in the backward pass the sums that their derivative takes.
//
// Parts of the work that share a lane each sum over their own units; at the barrier after a phase all
// sums are there, and in the next one each part adds them up for itself.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/schedule.h"
#include "user_cell/interface.h"

namespace fastbptt {
namespace {

template <typename scalar_t>
struct Norms {
  using V = Vec<scalar_t>;
  static constexpr int W = kLanes<scalar_t>;

  // What a part knows of values that are normalized together: how many, and of them the mean and the
  // sum of squared distances from it; or the two sums of a derivative.
  struct Moments {
    double count, mean, squares;
  };

  const LayerParams<scalar_t>& p;
  const UserShape& cell;
  int per_norm;     // vectors in which the cell adds up
  scalar_t* slots;  // [num_lanes, slots, ld_slots]
  int64_t num_slots, ld_slots;
  scalar_t* sums;    // [unit parts, num_lanes, norms, per_norm, W]
  Moments* moments;  // [unit parts, num_lanes, norms]
  scalar_t* stats;   // [unit parts, num_lanes, norms, UserPhase::kStats]

  Norms(const LayerParams<scalar_t>& params, const UserShape& shape, Arena* arena,
        int slots_of_unit, int sums_of_norm)
      : p(params), cell(shape), per_norm(sums_of_norm), num_slots(slots_of_unit) {
    const int64_t rows = cell.norms * p.num_lanes;
    ld_slots = padded_stride<scalar_t>(p.H);
    slots = arena->take<scalar_t>(p.num_lanes * num_slots * ld_slots);
    sums = arena->take<scalar_t>(p.threads * rows * per_norm * W);
    moments = arena->template take<Moments>(p.threads * rows);
    stats = arena->take<scalar_t>(p.threads * rows * UserPhase<scalar_t>::kStats);
  }

  UserPhase<scalar_t> of(const Share& mine, int64_t i, int phase) const {
    const int64_t index = mine.index(i);
    return {phase, slots + index * num_slots * ld_slots, ld_slots,
            sums + row(mine, index) * per_norm * W,
            stats + row(mine, index) * UserPhase<scalar_t>::kStats};
  }

  // Before the sums of a phase.
  void clear(const Share& mine, int64_t lanes) const {
    if (cell.norms == 0) return;
    for (int64_t i = 0; i < lanes; ++i) {
      scalar_t* const own = of(mine, i, 0).sums;
      std::fill(own, own + cell.norms * per_norm * W, scalar_t(0));
    }
  }

  // After a phase of the forward pass: the part's own moments of what the next one normalizes.
  void measure(const Share& mine, const Packed<scalar_t>& units, int phase, int64_t lanes) const {
    if (cell.norms == 0) return;
    const Range own = own_values(units, mine.panels, 1).made;
    for (int64_t i = 0; i < lanes; ++i) {
      const UserPhase<scalar_t> lane = of(mine, i, phase);
      for (int n = 0; n < cell.norms; ++n) {
        const UserNorm& norm = cell.norm_table[n];
        if (norm.phase != phase + 1) continue;
        Moments& found = moments[row(mine, mine.index(i)) + n];
        const double count = double((own.end - own.begin) * norm.count);
        const scalar_t mean = count > 0 ? scalar_t(add_up(lane.sums + n * W) / count) : 0;
        found = {count, mean, 0};
        for (int k = 0; k < norm.count; ++k) {
          const scalar_t* const values = lane.slots + (norm.first_slot + k) * ld_slots;
          found.squares += squares(values, own, mean);
        }
      }
    }
  }

  // After a phase of the backward pass: the part's own sums.
  void add_up_sums(const Share& mine, int phase, int64_t lanes) const {
    if (cell.norms == 0) return;
    for (int64_t i = 0; i < lanes; ++i) {
      const UserPhase<scalar_t> lane = of(mine, i, phase);
      for (int n = 0; n < cell.norms; ++n) {
        if (cell.norm_table[n].phase != phase) continue;
        moments[row(mine, mine.index(i)) + n] = {0, add_up(lane.sums + 2 * n * W),
                                                 add_up(lane.sums + (2 * n + 1) * W)};
      }
    }
  }

  // Before a phase of the forward pass: mean and scale, which are kept too if `kept` is there.
  void find(const Share& mine, int64_t i, int phase, scalar_t* kept) const {
    scalar_t* const lane = stats + row(mine, mine.index(i)) * UserPhase<scalar_t>::kStats;
    for (int n = 0; n < cell.norms; ++n) {
      const UserNorm& norm = cell.norm_table[n];
      if (norm.phase != phase) continue;
      Moments all{};
      for (int part = 0; part < mine.group.size; ++part) {
        const Moments& other = moments[row(part, mine.index(i)) + n];
        if (other.count == 0) continue;
        const double count = all.count + other.count, apart = other.mean - all.mean;
        all.squares += other.squares + apart * apart * all.count * other.count / count;
        all.mean += apart * other.count / count;
        all.count = count;
      }
      scalar_t* const own = lane + n * UserPhase<scalar_t>::kStats;
      own[0] = scalar_t(all.mean);
      own[1] = scalar_t(1 / std::sqrt(all.squares / all.count + norm.eps));
      if (kept && mine.group.id == 0) std::copy(own, own + 2, kept + 2 * n);
    }
  }

  // Before a phase of the backward pass: mean and scale as they were kept, and after the first one
  // of that pass what the derivative has in common for all units.
  void find_gradients(const Share& mine, int64_t i, int phase, const scalar_t* kept) const {
    scalar_t* const lane = stats + row(mine, mine.index(i)) * UserPhase<scalar_t>::kStats;
    for (int n = 0; n < cell.norms; ++n) {
      const UserNorm& norm = cell.norm_table[n];
      scalar_t* const own = lane + n * UserPhase<scalar_t>::kStats;
      std::copy(kept + 2 * n, kept + 2 * n + 2, own);
      if (norm.phase != phase + 1) continue;
      double sum = 0, product = 0;
      for (int part = 0; part < mine.group.size; ++part) {
        const Moments& other = moments[row(part, mine.index(i)) + n];
        sum += other.mean;
        product += other.squares;
      }
      own[2] = scalar_t(sum / double(norm.count * p.H));
      own[3] = scalar_t(product / double(norm.count * p.H));
    }
  }

 private:
  int64_t row(int part, int64_t index) const { return (part * p.num_lanes + index) * cell.norms; }
  int64_t row(const Share& mine, int64_t index) const { return row(mine.group.id, index); }

  static double add_up(const scalar_t* vector) {
    double sum = 0;
    for (int i = 0; i < W; ++i) sum += double(vector[i]);
    return sum;
  }

  static double squares(const scalar_t* values, Range units, scalar_t mean) {
    V sum{};
    int64_t unit = units.begin;
    for (; unit + W <= units.end; unit += W) {
      const V apart = load(values + unit) - mean;
      sum += apart * apart;
    }
    scalar_t lanes[W];
    store(lanes, sum);
    double all = add_up(lanes);
    for (; unit < units.end; ++unit) {
      all += (values[unit] - mean) * (values[unit] - mean);
    }
    return all;
  }
};

}  // namespace
}  // namespace fastbptt
