// Who computes what: the workspace, the threads' shares of a recurrence, and one step of it.
#pragma once

#include <vector>

#include "cpu/gemm.h"
#include "cpu/split.h"
#include "cpu/team.h"
#include "params.h"

namespace fastbptt {
namespace {

// Deals out the workspace, or with a null base only counts its bytes.
struct Arena {
  char* base;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += ceil_div(count * int64_t(sizeof(T)), 64) * 64;
    return p;
  }
  template <typename T>
  Packed<T> take_packed(int64_t K, int64_t units, int64_t gates, int64_t panel_vecs) {
    Packed<T> packed{nullptr, K, units, gates, panel_vecs};
    packed.data = take<T>(packed.size());
    return packed;
  }
};

// A pass takes whole steps in blocks, until there are so many rows: as many as one tile of a
// weight gradient sums over, enough that adding a block's part to dW costs little.
constexpr int64_t kBlockRows = 256;

// Whether a matrix with K rows is packed for a pass that multiplies `rows` rows by it, all of them at
// once or a few in each of many steps. What packing takes is measured.
inline bool is_worth_packing(int64_t rows, int64_t K, bool at_once) {
  return rows > max(4, K / (at_once ? 8 : 16));
}

// A power-of-two stride would put the rows of a tile into the same few sets of the cache.
template <typename scalar_t>
constexpr int64_t padded_stride(int64_t columns) {
  return (ceil_div(columns, kLanes<scalar_t>) + 1) * kLanes<scalar_t>;
}

// Scattered rows side by side, for products that read them with one stride.
template <typename scalar_t>
struct RowGather {
  scalar_t* rows = nullptr;  // [count, stride], converted
  int64_t columns = 0, stride = 0;

  RowGather() = default;
  RowGather(Arena* arena, int64_t count, int64_t columns)
      : columns(columns), stride(padded_stride<scalar_t>(columns)) {
    rows = arena->take<scalar_t>(count * stride);
  }
  // A null row is zero.
  template <typename RowAt>
  void gather(Range which, RowAt&& row_at) const {
    constexpr int W = kLanes<scalar_t>;
    for (int64_t r = which.begin; r < which.end; ++r) {
      const auto* row = row_at(r);
      for (int64_t i = 0; i < columns; i += W) {
        store(rows + r * stride + i, row ? load_first(row + i, columns - i) : Vec<scalar_t>{});
      }
    }
  }
};

// A part's share of a product: of its rows, or where these are few, of its panels.
struct ProductShare {
  Range rows, panels;
};

template <typename scalar_t>
ProductShare share_product(int64_t rows, const Packed<scalar_t>& b, const Worker& worker) {
  const Range all_rows{0, rows}, all_panels{0, b.panels()};
  if (rows >= 2 * kMaxRows * worker.count) {
    return {share(rows, worker.id, worker.count), all_panels};
  }
  return {all_rows, share(b.panels(), worker.id, worker.count)};
}

template <typename scalar_t>
inline int64_t row_at(const LayerParams<scalar_t>& p, const Lane& lane, int64_t s) {
  return p.layout.row(lane.first + p.direction * s, lane.batch);
}

// The row that a boundary between the local steps s and s + 1 of a lane belongs to: that of the later
// of the two in time.
template <typename scalar_t>
inline int64_t row_of_boundary(const LayerParams<scalar_t>& p, const Lane& lane, int64_t s) {
  return row_at(p, lane, p.direction > 0 ? s + 1 : s);
}

// Whether a reset lies between the local steps s and s + 1.
template <typename scalar_t>
inline bool is_reset_after(const LayerParams<scalar_t>& p, const Lane& lane, int64_t s) {
  return p.resets && s + 1 < lane.steps && p.resets[row_of_boundary(p, lane, s)];
}

// The row of the step before, as in state_row.
template <typename scalar_t>
inline int64_t row_before(const LayerParams<scalar_t>& p, const Lane& lane, int64_t s) {
  if (s > 0 && is_reset_after(p, lane, s - 1)) return kNoRow;
  if (s > 0 || lane.before == Before::kStep) return row_at(p, lane, s - 1);
  return lane.before == Before::kInitial ? -1 - lane.batch : kNoRow;
}

// What a gate between steps lets through: a closed one stops infinity and NaN too.
template <typename V, typename scalar_t>
inline V through(scalar_t gate, V x) {
  return gate == 0 ? V{} : x * gate;
}

// Whether local step s is the last of the lane's whole sequence.
inline bool ends_sequence(const Lane& lane, int64_t s) {
  return s + 1 == lane.steps && lane.to_end;
}

// How many rows there are of (step, lane), [M].
template <typename scalar_t>
inline int64_t lane_rows(const LayerParams<scalar_t>& p) {
  int64_t rows = 0;
  for (int64_t i = 0; i < p.num_lanes; ++i) rows += p.lanes[i].steps;
  return rows;
}

// The most rows of a block of steps.
template <typename scalar_t>
inline int64_t max_block_rows(const LayerParams<scalar_t>& p) {
  return min(lane_rows(p), kBlockRows - 1 + p.num_lanes);
}

// What one part of the work has of a recurrence: lane i of its group is lane first_lane + i * lane_step of all.
struct Share {
  const Lane* lanes;
  int64_t first_lane;
  int64_t lane_step;
  int64_t num_lanes;
  Range panels;     // of the units that it computes
  Range projected;  // of the projected state, likewise
  Barrier group;    // of the parts that share these lanes
  bool idle;
  int batch_part = 0;  // which lanes these are

  int64_t index(int64_t i) const { return first_lane + i * lane_step; }
  const Lane& lane(int64_t i) const { return lanes[index(i)]; }
  // How many of the group's lanes have a step s: they are the first ones.
  int64_t active_at(int64_t s) const {
    int64_t low = 0, high = num_lanes;
    if (high > 0 && lane(high - 1).steps > s) return high;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      (lane(middle).steps > s ? low : high) = lane(middle).steps > s ? middle + 1 : middle;
    }
    return low;
  }
};

template <typename scalar_t>
Share everyone(const LayerParams<scalar_t>& p) {
  return {p.lanes, 0, 1, p.num_lanes, {}, {}, {}, false};
}

// How many rows the steps [begin, end) of all lanes have.
template <typename scalar_t>
int64_t rows_of_steps(const LayerParams<scalar_t>& p, int64_t begin, int64_t end) {
  const Share all = everyone(p);
  int64_t rows = 0;
  for (int64_t s = begin; s < end; ++s) rows += all.active_at(s);
  return rows;
}

// A recurrence whose step multiplies K values by the gates of `units` units.
template <typename scalar_t>
StepWork work_of_step(const LayerParams<scalar_t>& p, int64_t K, int64_t units, int64_t gates) {
  return {p.num_lanes,
          K,
          ceil_div(units, kLanes<scalar_t>),
          gates,
          kLanes<scalar_t> * int(sizeof(scalar_t)),
          tile_rows<scalar_t>(kStripVecs)};
}

// Unit vectors in a panel: as many as a tile takes, fewer where the units are shared.
template <typename scalar_t>
int64_t panel_vecs_for(int64_t units, int64_t gates, Split split) {
  const int64_t unit_vecs = ceil_div(units, kLanes<scalar_t>);
  return min(max(1, kPanelVecs / gates), ceil_div(unit_vecs, split.unit_parts));
}

template <typename scalar_t>
Share share_of(const LayerParams<scalar_t>& p, const Packed<scalar_t>& units,
               const Packed<scalar_t>& projected, Split split, const Worker& worker) {
  Share mine{};
  const int group = worker.id / split.unit_parts;
  mine.idle = group >= split.batch_parts;
  if (mine.idle) return mine;
  mine.batch_part = group;
  mine.lanes = p.lanes;
  // Lanes of one length are dealt out in blocks of neighbours; others in turn, so that each group
  // gets long and short ones, and its own stay sorted.
  if (p.lanes[0].steps == p.lanes[p.num_lanes - 1].steps) {
    const Range block = share(p.num_lanes, group, split.batch_parts);
    mine.first_lane = block.begin;
    mine.lane_step = 1;
    mine.num_lanes = block.end - block.begin;
  } else {
    mine.first_lane = group;
    mine.lane_step = split.batch_parts;
    mine.num_lanes = ceil_div(p.num_lanes - group, split.batch_parts);
  }
  mine.panels = share(units.panels(), worker.id % split.unit_parts, split.unit_parts);
  mine.projected = share(projected.panels(), worker.id % split.unit_parts, split.unit_parts);
  mine.group = {worker.group_arrivals + group * split.unit_parts, split.unit_parts,
                worker.id % split.unit_parts};
  return mine;
}

// Those of all parts of a team.
template <typename scalar_t>
std::vector<Share> all_shares(const LayerParams<scalar_t>& p, const Packed<scalar_t>& units,
                              const Packed<scalar_t>& projected, Split split, const Team& team) {
  std::vector<Share> shares;
  for (int part = 0; part < team.parts(); ++part) {
    shares.push_back(share_of(p, units, projected, split, team.worker(part)));
  }
  return shares;
}

// Calls fn(share) for those of some parts that have work to do.
template <typename Fn>
inline void for_each_share(const std::vector<Share>& shares, Parts parts, Fn&& fn) {
  for (int part = parts.begin; part < parts.end; ++part) {
    if (!shares[part].idle) fn(shares[part]);
  }
}

// Which values of a state a part of the work made itself: `made` of each of `groups` groups of `size`.
struct OwnValues {
  Range made;
  int64_t size;
  int64_t groups;
};

template <typename scalar_t>
OwnValues own_values(const Packed<scalar_t>& units, Range panels, int64_t groups) {
  return {{min(units.units, units.first_unit(panels.begin)),
           min(units.units, units.first_unit(panels.end))},
          units.units,
          groups};
}

// Calls fn(first, last, rows) for groups of the rows [begin, end) of a step, once if there are none, with
// what row_of(i) says of each of them: found once for all panels.
template <typename Row, typename RowOf, typename Fn>
inline void for_each_row_group(int64_t begin, int64_t end, RowOf&& row_of, Fn&& fn) {
  int64_t first = begin;
  do {
    const int64_t last = min(end, first + kGroupRows);
    Row rows[kGroupRows];
    for (int64_t i = first; i < last; ++i) rows[i - first] = row_of(i);
    fn(first, last, static_cast<const Row*>(rows));
    first = last;
  } while (first < end);
}

// Asks for a row's numbers for a panel's units: the product that comes before they are read gives them time
// to arrive, from the last cache or from memory.
template <typename T, typename scalar_t>
inline void prefetch_units(const T* row, const Packed<scalar_t>& packed, int64_t panel) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(T));
  const int64_t end = packed.first_unit(panel + 1);
  for (int64_t unit = packed.first_unit(panel); unit < end; unit += kLine) {
    __builtin_prefetch(row + unit);
  }
}

// Multiplies the rows [begin, end) of `state`, `stride` apart, by the thread's panels and hands the
// sums of each row and panel to fn(row, panel, acc). K = 0 leaves the product out. The values that
// other threads make are read only after await(): few rows begin with the thread's own, so that the
// wait costs them little.
template <typename scalar_t, typename Await, typename Fn>
inline void step_tiles(Range panels, const Packed<scalar_t>& packed, int64_t K,
                       const Operand<scalar_t>* state, int64_t stride, const OwnValues& own,
                       int64_t begin, int64_t end, Await&& await, Fn&& fn) {
  constexpr int W = kLanes<scalar_t>;
  constexpr int kEarlyPanels = 8;
  // A group of an odd number of values ends in the middle of a pair.
  const bool apart = own.groups == 1 || own.size % kPair<scalar_t> == 0;
  const bool early =
      apart && K > 0 && !packed.unpacked && own.made.begin < own.made.end && begin < end &&
      own.made.end - own.made.begin < own.size && end - begin <= tile_rows<scalar_t>(kStripVecs) &&
      packed.panel_vecs * packed.gates <= kPanelVecs && panels.end - panels.begin <= kEarlyPanels;
  if (!early) {
    await();
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      panel_product(state, stride, packed, panel, K, begin, end,
                    [&](int64_t r, const auto* acc) { fn(r, panel, acc); });
    }
    return;
  }
  alignas(64) char storage[kEarlyPanels][kMaxRows * kPanelVecs * kVecBytes];
  const auto acc_of = [&](int64_t panel) {
    return reinterpret_cast<Accumulator<scalar_t>*>(storage[panel - panels.begin]);
  };
  const auto add = [&](int64_t panel, int64_t k_begin, int64_t k_end, bool accumulate) {
    if (k_begin == k_end) return;
    multiply_panel(state + begin * stride + k_begin, stride, end - begin, packed, panel, k_begin,
                   k_end - k_begin, accumulate, acc_of(panel), packed.vecs_in(panel) * W);
  };
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    for (int64_t g = 0; g < own.groups; ++g) {
      add(panel, g * own.size + own.made.begin, g * own.size + own.made.end, g > 0);
    }
  }
  await();
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    // Between the thread's own values of one group and of the next lie the others'.
    int64_t from = 0;
    for (int64_t g = 0; g < own.groups; ++g) {
      add(panel, from, g * own.size + own.made.begin, true);
      from = g * own.size + own.made.end;
    }
    add(panel, from, K, true);
    for (int64_t i = 0; i < end - begin; ++i) {
      fn(begin + i, panel, acc_of(panel) + i * packed.vecs_in(panel) * W);
    }
  }
}

// The same where all values are there, and may be read at once.
template <typename scalar_t, typename Fn>
inline void step_tiles(Range panels, const Packed<scalar_t>& packed, int64_t K,
                       const Operand<scalar_t>* state, int64_t stride, int64_t begin, int64_t end,
                       Fn&& fn) {
  step_tiles(panels, packed, K, state, stride, OwnValues{}, begin, end, [] {}, fn);
}

}  // namespace
}  // namespace fastbptt
