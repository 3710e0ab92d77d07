// The tangents of one direction's states, step by step:
//
//   rec_t = h'_{t-1} W_hh^T, the tangent of the cell of pre_t and rec_t, and with a projection
//   h'_t = W_hr h'_t + projected_t.
//
// As in the forward pass the state that a step hands to the next stands in a small double buffer, here
// with the gate on its way applied.
#pragma once

#include "cpu/tangent_steps.h"

namespace fastbptt {
namespace {

template <typename Cell, typename scalar_t>
struct ForwardTangent {
  using Params = ForwardTangentParams<scalar_t>;
  using V = Vec<scalar_t>;
  static constexpr int W = kLanes<scalar_t>;
  static constexpr int G = Cell::kGates, C = Cell::kColumns, S = Cell::kSaved;

  const Params& p;
  Packed<scalar_t> w_hh, w_hr;
  scalar_t* state[2];  // [num_lanes, stride] h'
  int64_t stride;
  scalar_t* carried;      // [num_lanes, wide_stride] c'
  scalar_t* unprojected;  // [num_lanes, wide_stride] h' before the projection
  int64_t wide_stride;
  int64_t bytes;

  ForwardTangent(const Params& params, Arena arena, Split split) : p(params) {
    stride = padded_stride<scalar_t>(p.R);
    wide_stride = padded_stride<scalar_t>(p.H);
    w_hh = arena.take_packed<scalar_t>(p.R, p.H, G, panel_vecs_for<scalar_t>(p.H, G, split));
    w_hr = arena.take_packed<scalar_t>(p.H, p.w_hr ? p.R : 0, 1,
                                       panel_vecs_for<scalar_t>(p.R, 1, split));
    for (scalar_t*& s : state) s = arena.take<scalar_t>(p.num_lanes * stride);
    carried = arena.take<scalar_t>(Cell::kHasCellState ? p.num_lanes * wide_stride : 0);
    unprojected = arena.take<scalar_t>(p.w_hr ? p.num_lanes * wide_stride : 0);
    bytes = arena.used;
  }

  static StepWork work_of(const Params& p) { return work_of_step(p, p.R, p.H, G); }

  void pack(const Worker& worker) const {
    pack_transposed(w_hh, p.w_hh, share(w_hh.panels(), worker.id, worker.count));
    if (p.w_hr) pack_transposed(w_hr, p.w_hr, share(w_hr.panels(), worker.id, worker.count));
  }

  void run_steps(const std::vector<Share>& shares, Parts parts, int64_t s, int64_t end) const {
    if (s == 0) {
      for_each_share(shares, parts, [&](const Share& mine) {
        load_initial(mine);
        mine.group.arrive();
      });
    }
    for (; s < end; ++s) {
      for_each_share(shares, parts, [&](const Share& mine) { take_step(mine, s); });
      if (!p.w_hr) continue;
      for_each_share(shares, parts, [&](const Share& mine) { project_step(mine, s); });
    }
  }
  void finish(const Share&) const {}

 private:
  void load_initial(const Share& mine) const {
    const auto load_into = [&](const Packed<scalar_t>& units, Range panels, scalar_t* to,
                               int64_t ld, const scalar_t* from, int64_t columns) {
      for (int64_t i = 0; i < mine.num_lanes; ++i) {
        const Lane& lane = mine.lane(i);
        const scalar_t gate = gate_before(p, lane);
        for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
          for_each_unit_vec(units, panel, [&](int64_t, int64_t unit, auto count) {
            const V x = load_or_zero(from ? from + lane.batch * columns : from, unit, count);
            store(to + mine.index(i) * ld + unit, through(gate, x));
          });
        }
      }
    };
    load_into(p.w_hr ? w_hr : w_hh, p.w_hr ? mine.projected : mine.panels, state[0], stride, p.hx,
              p.R);
    if (Cell::kHasCellState) load_into(w_hh, mine.panels, carried, wide_stride, p.cx, p.H);
  }

  // What a step needs to know of a lane, for all of its units.
  struct Row {
    int64_t row;
    scalar_t gate;                   // on what goes on to the next step
    const scalar_t* output;          // of the Elman cell
    const scalar_t* state;           // the tangent that enters
    scalar_t *carried, *h;           // what goes on: c', and h', projected or not
    scalar_t *output_t, *h_n, *c_n;  // null where they are another's, or a projection is to come
  };

  Row row_of(const Share& mine, int64_t i, int64_t s) const {
    const Lane& lane = mine.lane(i);
    const int64_t index = mine.index(i);
    const bool ends = s + 1 == lane.steps;
    Row r{};
    r.row = row_at(p, lane, s);
    r.gate = gate_after(p, lane, s);
    r.output = p.output.at(r.row);
    r.state = state[s % 2] + index * stride;
    if constexpr (Cell::kHasCellState) {
      r.carried = carried + index * wide_stride;
      r.c_n = ends ? p.c_n_t + lane.batch * p.H : nullptr;
    }
    if (p.w_hr) {
      r.h = unprojected + index * wide_stride;
    } else {
      r.h = state[(s + 1) % 2] + index * stride;
      r.output_t = p.output_t + r.row * p.R;
      r.h_n = ends ? p.h_n_t + lane.batch * p.R : nullptr;
    }
    return r;
  }

  // The cell for a step of one lane and the units of a panel.
  void finish_row(const Row& row, int64_t panel, const scalar_t* acc) const {
    const scalar_t* const pre = p.pre + row.row * C * p.H;
    for_each_unit_vec(w_hh, panel, [&](int64_t v, int64_t unit, auto count) {
      V in[G], rec[G], saved[S + 1], saved_t[S + 1], h{}, c_t{};
      for (int g = 0; g < G; ++g) {
        in[Cell::kInputGate[g]] = load_first(pre + g * p.H + unit, count);
        rec[g] = load(acc + (v * G + g) * W);
      }
      if constexpr (C > G) rec[G - 1] += load_first(pre + (C - 1) * p.H + unit, count);
      for (int k = 0; k < S; ++k) {
        saved[k] = load_first(p.gates + (row.row * S + k) * p.H + unit, count);
      }
      Dual<V> before{};
      if constexpr (Cell::kHasCarry) {
        before.value = load_first(p.before + row.row * p.H + unit, count);
        before.tangent = load(Cell::kHasCellState ? row.carried + unit : row.state + unit);
      } else {
        h = load_first(row.output + unit, count);
      }
      V h_t;
      for_phi<Cell>(p.kind, [&](auto cell) {
        h_t = forward_tangent<decltype(cell)>(saved, h, before, in, rec, saved_t, &c_t);
      });
      for (int k = 0; k < S; ++k) {
        store_first(p.gates_t + (row.row * S + k) * p.H + unit, saved_t[k], count);
      }
      if constexpr (Cell::kHasCellState) {
        store_first(p.c_t + row.row * p.H + unit, c_t, count);
        if (row.c_n) store_first(row.c_n + unit, c_t, count);
        store(row.carried + unit, through(row.gate, c_t));
      }
      store(row.h + unit, p.w_hr ? h_t : through(row.gate, h_t));
      if (row.output_t) store_first(row.output_t + unit, h_t, count);
      if (row.h_n) store_first(row.h_n + unit, h_t, count);
    });
  }

  void take_step(const Share& mine, int64_t s) const {
    const scalar_t* const entering = state[s % 2] + mine.first_lane * stride;
    const OwnValues own = p.w_hr ? OwnValues{} : own_values(w_hh, mine.panels, 1);
    const auto await = [&] { mine.group.await(); };
    for_each_row_group<Row>(
        0, mine.active_at(s), [&](int64_t i) { return row_of(mine, i, s); },
        [&](int64_t first, int64_t last, const Row* rows) {
          step_tiles(mine.panels, w_hh, p.R, entering, stride * mine.lane_step, own, first, last,
                     await, [&](int64_t i, int64_t panel, const scalar_t* acc) {
                       finish_row(rows[i - first], panel, acc);
                     });
        });
    mine.group.arrive();
  }

  void project_step(const Share& mine, int64_t s) const {
    const int64_t wide_ld = wide_stride * mine.lane_step;
    mine.group.await();
    step_tiles(mine.projected, w_hr, p.H, unprojected + mine.first_lane * wide_stride, wide_ld, 0,
               mine.active_at(s), [&](int64_t i, int64_t panel, const scalar_t* acc) {
                 const Lane& lane = mine.lane(i);
                 const int64_t row = row_at(p, lane, s);
                 const scalar_t gate = gate_after(p, lane, s);
                 const scalar_t* known = p.projected ? p.projected + row * p.R : nullptr;
                 scalar_t* h_n = s + 1 == lane.steps ? p.h_n_t + lane.batch * p.R : nullptr;
                 scalar_t* next = state[(s + 1) % 2] + mine.index(i) * stride;
                 for_each_unit_vec(w_hr, panel, [&](int64_t v, int64_t unit, auto count) {
                   const V h_t = load(acc + v * W) + load_or_zero(known, unit, count);
                   store(next + unit, through(gate, h_t));
                   store_first(p.output_t + row * p.R + unit, h_t, count);
                   if (h_n) store_first(h_n + unit, h_t, count);
                 });
               });
    mine.group.arrive();
  }
};

}  // namespace
}  // namespace fastbptt
