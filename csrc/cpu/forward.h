// The forward pass of one direction:
//
//   pre = x W_ih^T for many steps at once, into memory that a step overwrites; then step by step
//   rec_t = h_{t-1} W_hh^T, the cell of pre_t + b and rec_t, and with a projection h_t = W_hr h_t.
//
// The Elman cell's `pre` stands in the output, a gated cell's where its activations will be kept, or if
// they are not kept, or would be rounded there, apart, for a block of steps at a time. Else too it is
// made block by block, where the rows of a block lie side by side. A row of a block is that of a step
// and a lane, by step, then by lane.
//
// The state that a step hands to the next is kept twice: in the output, where rows lie as the
// layout says, and in a small double buffer [2][lanes][stride] that tiles read with one stride. What
// meets W_hh there is the output as it is stored. What a cell carries over beside that, LSTM's c or
// GRU's h, is not rounded.
#pragma once

#include "cpu/any_elman.h"
#include "cpu/projection.h"

namespace fastbptt {
namespace {

template <typename Cell, typename scalar_t>
struct Forward {
  using V = Vec<scalar_t>;
  using acc_t = Accumulator<scalar_t>;
  using operand_t = Operand<scalar_t>;
  static constexpr int W = kLanes<scalar_t>;
  static constexpr bool kCarriesApart = Cell::kHasCarry && kIsRounded<scalar_t>;

  const FwdParams<scalar_t>& p;
  InputProjection<scalar_t> projection;
  Packed<scalar_t> w_hh, w_hr;
  acc_t* bias;          // [G*H], whole vectors: what a cell adds to `pre`
  operand_t* state[2];  // [num_lanes, stride] h
  int64_t stride;
  operand_t* unprojected;  // [num_lanes, wide_stride] h before the projection
  acc_t* carried;          // [num_lanes, wide_stride] what is kept rounded elsewhere
  int64_t wide_stride;
  int64_t bytes;

  Forward(const FwdParams<scalar_t>& params, Arena arena, Split split)
      : p(params),
        projection(p, &arena, Cell::kGates * p.H, given_pre(p),
                   Cell::kSaved == 0 ? p.ld_out : Cell::kSaved * p.H) {
    stride = padded_stride<scalar_t>(p.R);
    wide_stride = padded_stride<scalar_t>(p.H);
    const bool one_step = p.lanes[0].steps == 1;
    const auto take = [&](const scalar_t* w, int64_t K, int64_t units, int64_t gates,
                          int64_t panel_vecs) {
      if (is_worth_packing(p.layout.N, K, one_step)) {
        return arena.take_packed<scalar_t>(K, units, gates, panel_vecs);
      }
      return Packed<scalar_t>{nullptr, K, units, gates, panel_vecs, w};
    };
    w_hh = take(p.w_hh, p.R, p.H, Cell::kGates, panel_vecs_for<scalar_t>(p.H, Cell::kGates, split));
    w_hr = take(p.w_hr, p.H, p.w_hr ? p.R : 0, 1, panel_vecs_for<scalar_t>(p.R, 1, split));
    bias = arena.take<acc_t>(padded_stride<scalar_t>(Cell::kGates * p.H));
    for (operand_t*& s : state) s = arena.take<operand_t>(p.num_lanes * stride);
    unprojected = arena.take<operand_t>(p.w_hr ? p.num_lanes * wide_stride : 0);
    carried = arena.take<acc_t>(kCarriesApart ? p.num_lanes * wide_stride : 0);
    bytes = arena.used;
  }

  // Where `pre` is to stand, or null: apart.
  static acc_t* given_pre(const FwdParams<scalar_t>& p) {
    if constexpr (kIsRounded<scalar_t>) {
      return nullptr;
    } else {
      return Cell::kSaved == 0 ? p.output : p.gates;
    }
  }

  void pack(const Worker& worker) const {
    const auto pack_one = [&](const Packed<scalar_t>& to, const scalar_t* w) {
      if (!to.unpacked) pack_transposed(to, w, share(to.panels(), worker.id, worker.count));
    };
    projection.pack(worker);
    pack_one(w_hh, p.w_hh);
    if (p.w_hr) pack_one(w_hr, p.w_hr);
    if (worker.id > 0) return;
    const int64_t columns = Cell::kGates * p.H;
    const int64_t both = Cell::kRecurrentBias ? columns - p.H : columns;
    for (int64_t n = 0; n < columns; n += W) {
      store(bias + n, p.b_ih ? load_first(p.b_ih + n, columns - n) : V{});
    }
    for (int64_t n = 0; p.b_hh && n < both; n += W) {
      store_first(bias + n, load(bias + n) + load_first(p.b_hh + n, both - n), both - n);
    }
  }

  void load_hx(const Share& mine, operand_t* to, int64_t lane_stride) const {
    const Packed<scalar_t>& units = p.w_hr ? w_hr : w_hh;
    const Range panels = p.w_hr ? mine.projected : mine.panels;
    for (int64_t i = 0; i < mine.num_lanes; ++i) {
      const Lane& lane = mine.lane(i);
      const bool given = lane.before == Before::kInitial;
      const scalar_t* from = p.hx + lane.batch * p.R;
      for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
        for_each_unit_vec(units, panel, [&](int64_t, int64_t unit, auto count) {
          const V h = given ? load_first(from + unit, count) : V{};
          store_operand<scalar_t>(to + i * lane_stride + unit, h);
        });
      }
    }
  }

  // Where the next steps begin: the step, and the row of its first lane in its block.
  struct Progress {
    int64_t step = 0;
    int64_t first_row = 0;
  };

  // What a step needs to know of a lane, for all of its units.
  struct Row {
    const acc_t* pre;
    const scalar_t* kept;  // c, or h, of the step before, or null: zeros
    acc_t* carried;        // the same before it was rounded, where kCarriesApart
    bool is_carried;       // whether it is there
    scalar_t *c, *c_n, *gates;
    operand_t* h;  // what the next step begins with
    bool clears_h;
    scalar_t *output, *h_n;  // null where they are another's, or a projection is still to come
  };

  Row row_of(const Share& mine, int64_t i, Progress at) const {
    const int64_t s = at.step, index = mine.index(i);
    const Lane& lane = mine.lane(i);
    const int64_t row = row_at(p, lane, s), before = row_before(p, lane, s);
    const bool ends = ends_sequence(lane, s);
    Row r{};
    r.pre = projection.row(row, at.first_row + index);
    if constexpr (Cell::kHasCellState) {
      r.kept = state_row<scalar_t>(p.c, p.H, p.cx, p.H, before);
      r.c = p.c + row * p.H;
      r.c_n = ends ? p.c_n + lane.batch * p.H : nullptr;
    } else if constexpr (Cell::kHasCarry) {
      r.kept = state_row<scalar_t>(p.output, p.ld_out, p.hx, p.R, before);
    }
    if constexpr (kCarriesApart) {
      r.carried = carried + index * wide_stride;
      r.is_carried = before >= 0;
    }
    r.gates = p.gates ? p.gates + row * Cell::kSaved * p.H : nullptr;
    if (p.w_hr) {
      r.h = unprojected + index * wide_stride;
    } else {
      r.h = state[(s + 1) % 2] + index * stride;
      r.clears_h = is_reset_after(p, lane, s);
      r.output = p.output + row * p.ld_out;
      r.h_n = ends ? p.h_n + lane.batch * p.R : nullptr;
    }
    return r;
  }

  // What finish_row will read of memory.
  void prefetch(const Row& row, int64_t panel) const {
    for (int g = 0; g < Cell::kGates; ++g) prefetch_units(row.pre + g * p.H, w_hh, panel);
    if (row.kept) prefetch_units(row.kept, w_hh, panel);
  }

  void finish_row(const Row& row, int64_t panel, const acc_t* acc) const {
    for_phi<Cell>(p.kind, [&](auto cell) { finish_row(cell, row, panel, acc); });
  }

  // The cell for a step of one lane and the units of a panel.
  template <typename OneCell>
  void finish_row(OneCell cell, const Row& row, int64_t panel, const acc_t* acc) const {
    constexpr int G = Cell::kGates;
    for_each_unit_vec(w_hh, panel, [&](int64_t v, int64_t unit, auto count) {
      V in[G], rec[G], saved[Cell::kSaved + 1], value, carry{};
      for (int g = 0; g < G; ++g) {
        in[g] = load_first(row.pre + g * p.H + unit, count) + load(bias + g * p.H + unit);
        rec[g] = load(acc + (v * G + g) * W);
      }
      if constexpr (Cell::kRecurrentBias) {
        if (p.b_hh) rec[G - 1] += load_first(p.b_hh + (G - 1) * p.H + unit, count);
      }
      if constexpr (Cell::kHasCarry) {
        if (kCarriesApart && row.is_carried) {
          carry = load(row.carried + unit);
        } else if (row.kept) {
          carry = load_first(row.kept + unit, count);
        }
      }
      if constexpr (Cell::kHasCellState) {
        value = cell.forward(in, rec, carry, saved, &carry);
        store_first(row.c + unit, carry, count);
        if (row.c_n) store_first(row.c_n + unit, carry, count);
      } else {
        value = carry = cell.forward(in, rec, carry, saved);
      }
      if constexpr (kCarriesApart) store(row.carried + unit, carry);
      if (row.gates) {
        for (int k = 0; k < Cell::kSaved; ++k) {
          store_first(row.gates + k * p.H + unit, saved[k], count);
        }
      }
      store_operand<scalar_t>(row.h + unit, row.clears_h ? V{} : value);
      if (row.output) store_first(row.output + unit, value, count);
      if (row.h_n) store_first(row.h_n + unit, value, count);
    });
  }

  void advance(Progress* at, int64_t end) const {
    const Share all = everyone(p);
    for (; projection.in_blocks && at->step < end; ++at->step)
      at->first_row += all.active_at(at->step);
    at->step = end;
  }

  // Takes steps up to `end` with some of the parts.
  void run_steps(const std::vector<Share>& shares, Parts parts, Progress at, int64_t end) const {
    if (at.step == 0 && p.hx) {
      for_each_share(shares, parts, [&](const Share& mine) {
        load_hx(mine, state[0] + mine.first_lane * stride, stride * mine.lane_step);
        mine.group.arrive();
      });
    }
    while (at.step < end) {
      for_each_share(shares, parts, [&](const Share& mine) { take_step(mine, at); });
      if (p.w_hr) {
        for_each_share(shares, parts, [&](const Share& mine) { project_step(mine, at.step); });
      }
      advance(&at, at.step + 1);
    }
  }

 private:
  void take_step(const Share& mine, Progress at) const {
    const int64_t s = at.step;
    const operand_t* const before = state[s % 2] + mine.first_lane * stride;
    const OwnValues own = p.w_hr ? OwnValues{} : own_values(w_hh, mine.panels, 1);
    const auto await = [&] { mine.group.await(); };
    for_each_row_group<Row>(
        0, mine.active_at(s), [&](int64_t i) { return row_of(mine, i, at); },
        [&](int64_t first, int64_t last, const Row* rows) {
          step_tiles(mine.panels, w_hh, s > 0 || p.hx ? p.R : 0, before, stride * mine.lane_step,
                     own, first, last, await, [&](int64_t i, int64_t panel, const acc_t* acc) {
                       if (panel + 1 < mine.panels.end) prefetch(rows[i - first], panel + 1);
                       finish_row(rows[i - first], panel, acc);
                     });
        });
    mine.group.arrive();
  }

  void project_step(const Share& mine, int64_t s) const {
    const int64_t ld = stride * mine.lane_step, wide_ld = wide_stride * mine.lane_step;
    operand_t* const after = state[(s + 1) % 2] + mine.first_lane * stride;
    mine.group.await();
    step_tiles(mine.projected, w_hr, p.H, unprojected + mine.first_lane * wide_stride, wide_ld, 0,
               mine.active_at(s), [&](int64_t i, int64_t panel, const acc_t* acc) {
                 const Lane& lane = mine.lane(i);
                 const int64_t row = row_at(p, lane, s);
                 scalar_t* h_n = ends_sequence(lane, s) ? p.h_n + lane.batch * p.R : nullptr;
                 const bool clears_h = is_reset_after(p, lane, s);
                 for_each_unit_vec(w_hr, panel, [&](int64_t v, int64_t unit, auto count) {
                   const V value = load(acc + v * W);
                   store_operand<scalar_t>(after + i * ld + unit, clears_h ? V{} : value);
                   store_first(p.output + row * p.ld_out + unit, value, count);
                   if (h_n) store_first(h_n + unit, value, count);
                 });
               });
    mine.group.arrive();
  }
};

}  // namespace
}  // namespace fastbptt
