// The forward pass of one direction of a user's cell, step by step: rec_t = W_hh h_{t-1}, where h is
// the state that W_hh sees, and the cell of pre_t, rec_t and all states.
//
// As in the forward pass of the built-in cells, h also stands in a small double buffer. The other
// states are read where they are written.
#pragma once

#include "cpu/projection.h"
#include "user_cell/norms.h"
#include "user_cell/run.h"

namespace fastbptt {
namespace {

template <typename scalar_t>
struct UserForward {
  using Params = UserForwardParams<scalar_t>;
  using V = Vec<scalar_t>;
  static constexpr int W = kLanes<scalar_t>;

  // Where the next steps begin: the number taken, and the row of the next one's first lane in its block.
  struct Progress {
    int64_t taken = 0;
    int64_t first_row = 0;
  };

  const Params& p;
  InputProjection<scalar_t> projection;
  Packed<scalar_t> w_hh, w_hr;  // w_hr: none
  scalar_t* state[2];           // [num_lanes, stride] h
  int64_t stride;
  Norms<scalar_t> norms;
  int64_t bytes;

  UserForward(const Params& params, Arena arena, Split split)
      : p(params),
        projection(p, &arena, p.cell.gates * p.H, p.pre, p.cell.gates * p.H),
        norms(p, p.cell, &arena, p.cell.slots, 1) {
    const int64_t G = p.cell.gates, panel_vecs = panel_vecs_for<scalar_t>(p.H, G, split);
    w_hh = Packed<scalar_t>{nullptr, terms(p), p.H, G, panel_vecs, p.w_hh};
    if (p.w_hh && is_worth_packing(p.layout.N, p.H, p.lanes[0].steps == 1)) {
      w_hh = arena.take_packed<scalar_t>(p.H, p.H, G, panel_vecs);
    }
    w_hr = Packed<scalar_t>{nullptr, 0, 0, 1, 1};
    stride = padded_stride<scalar_t>(p.H);
    for (scalar_t*& s : state) s = arena.take<scalar_t>(p.num_lanes * stride);
    bytes = arena.used;
  }

  // What a sum of W_hh is over.
  static int64_t terms(const Params& p) { return p.w_hh ? p.H : 0; }
  static StepWork work_of(const Params& p) {
    return work_of_phases(p, work_of_step(p, max(1, terms(p)), p.H, p.cell.gates));
  }

  void pack(const Worker& worker) const {
    projection.pack(worker);
    if (!p.w_hh || w_hh.unpacked) return;
    pack_transposed(w_hh, p.w_hh, share(w_hh.panels(), worker.id, worker.count));
  }

  // Begins a block of steps, and returns how many are taken at its end.
  int64_t start_block(Progress* at, Team& team) const {
    const int64_t end = projection.block_end(at->taken);
    projection.run(at->taken, end, team);
    at->first_row = 0;
    return end;
  }
  void finish_block(Team&) const {}
  void finish(const Share&, Progress) const {}

  void advance(Progress* at) const { at->first_row += everyone(p).active_at(at->taken++); }

  void run_steps(const std::vector<Share>& shares, Parts parts, Progress at, int64_t end) const {
    if (at.taken == 0) {
      for_each_share(shares, parts, [&](const Share& mine) {
        load_initial(mine);
        mine.group.arrive();
      });
    }
    for (; at.taken < end; advance(&at)) {
      for_each_share(shares, parts, [&](const Share& mine) { take_step(mine, at); });
      for (int phase = 1; phase < p.cell.phases; ++phase) {
        for_each_share(shares, parts, [&](const Share& mine) { take_phase(mine, at, phase); });
      }
    }
  }

 private:
  using Row = UserForwardRow<scalar_t>;

  void load_initial(const Share& mine) const {
    for (int64_t i = 0; i < mine.num_lanes; ++i) {
      const int64_t before = user_row_before(p, mine.lane(i), 0);
      const scalar_t* const initial = entering_row(p, p, p.cell.recurrent, before);
      for (int64_t panel = mine.panels.begin; panel < mine.panels.end; ++panel) {
        for_each_unit_vec(w_hh, panel, [&](int64_t, int64_t unit, auto count) {
          store(state[0] + mine.index(i) * stride + unit,
                initial ? load_first(initial + unit, count) : V{});
        });
      }
    }
  }

  Row row_of(const Share& mine, int64_t i, Progress at, int phase) const {
    const int64_t s = at.taken, index = mine.index(i);
    const Lane& lane = mine.lane(i);
    const int64_t row = row_at(p, lane, s);
    const bool is_reset = is_reset_after(p, lane, s);
    const int64_t next =
        is_reset && p.reset_to ? kFirstReset + row_of_boundary(p, lane, s) : kNoRow;
    return {row,
            user_row_before(p, lane, s),
            projection.row(row, at.first_row + index),
            state[(s + 1) % 2] + index * stride,
            is_reset,
            entering_row(p, p, p.cell.recurrent, next),
            ends_sequence(lane, s) ? lane.batch : -1,
            norms.of(mine, i, phase)};
  }

  void take_step(const Share& mine, Progress at) const {
    const scalar_t* const entering = state[at.taken % 2] + mine.first_lane * stride;
    const OwnValues own = own_values(w_hh, mine.panels, 1);
    const auto await = [&] { mine.group.await(); };
    const int64_t active = mine.active_at(at.taken);
    norms.clear(mine, active);
    for_each_row_group<Row>(
        0, active, [&](int64_t i) { return row_of(mine, i, at, 0); },
        [&](int64_t first, int64_t last, const Row* rows) {
          step_tiles(mine.panels, w_hh, terms(p), entering, stride * mine.lane_step, own, first,
                     last, await, [&](int64_t i, int64_t panel, const scalar_t* acc) {
                       const auto [begin, end] = units_of(w_hh, panel);
                       p.run(p, rows[i - first], begin, end, acc);
                     });
        });
    norms.measure(mine, w_hh, 0, active);
    mine.group.arrive();
  }

  // A phase after the first one, which takes the product.
  void take_phase(const Share& mine, Progress at, int phase) const {
    const int64_t active = mine.active_at(at.taken);
    const Range own = own_values(w_hh, mine.panels, 1).made;
    mine.group.await();
    norms.clear(mine, active);
    for (int64_t i = 0; i < active; ++i) {
      const Row row = row_of(mine, i, at, phase);
      norms.find(mine, i, phase, p.kept ? row_of_norms(p, row.row) : nullptr);
      p.run(p, row, own.begin, own.end, nullptr);
    }
    norms.measure(mine, w_hh, phase, active);
    mine.group.arrive();
  }
};

}  // namespace
}  // namespace fastbptt
