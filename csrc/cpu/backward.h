// The backward pass of one direction, run by every thread of a team.
//
//   step by step       lambda_t = g_t + d_{t+1} W_hh + carry,  d_t = the cell's derivative of it
//   then, all at once  dx = d W_ih,  dW_ih = d^T x,  dW_hh = d^T h_{t-1},  db = sum of d
//
// d are the gradients of the gates' pre-activations. The pass goes in blocks of steps: the
// recurrence fills a block of d, [rows, stride], which is still in the cache when the products read
// it, and d is never kept whole. Rows of a block are ordered by step, last step first, then by lane.
// Two blocks take turns, since the first step of one reads the last step of the other.
#pragma once

#include "cpu/products.h"
#include "cpu/recompute.h"
#include "cpu/schedule.h"

namespace fastbptt {
namespace {

// What one block of steps holds, a row for each (step, lane).
template <typename scalar_t>
struct Block {
  int64_t begin, end;  // steps
  int64_t num_rows;
  scalar_t* d;            // [rows, stride] columns of H as the cell orders them
  scalar_t* d_projected;  // [rows, projected_stride] gradients of the projected state
  scalar_t* unprojected;  // [rows, wide_stride] the state before its projection
  scalar_t* gates;        // [rows, gates_stride] the activations, where they were not kept
  int64_t* rows;          // the row of (t, b)
  int64_t* before;        // the row of (t-1, b), or -1 - b where that is hx
};

template <typename Cell, typename scalar_t>
struct Backward {
  using V = Vec<scalar_t>;
  static constexpr int W = kLanes<scalar_t>;
  static constexpr int G = Cell::kGates;

  const BwdParams<scalar_t>& p;
  Packed<scalar_t> w_ih, w_hh, w_hr;
  int64_t block_steps;
  int64_t stride, projected_stride, wide_stride, gates_stride;
  Block<scalar_t> blocks[2];
  Recomputation<Cell, scalar_t> recomputation;
  scalar_t* carry;    // [num_lanes, wide_stride]
  scalar_t* scratch;  // [threads][OuterProduct::kScratch]
  int64_t bytes;

  Backward(const BwdParams<scalar_t>& params, Arena arena, Split split) : p(params) {
    w_ih = arena.take_packed<scalar_t>(G * p.H, p.d_input ? p.I : 0, 1, kPanelVecs);
    w_hh = arena.take_packed<scalar_t>(G * p.H, p.R, 1, panel_vecs_for<scalar_t>(p.R, 1, split));
    w_hr = arena.take_packed<scalar_t>(p.R, p.w_hr ? p.H : 0, 1,
                                       panel_vecs_for<scalar_t>(p.H, 1, split));
    block_steps = min(p.lanes[0].steps, ceil_div(kBlockRows, p.num_lanes));
    stride = padded_stride<scalar_t>(Cell::kColumns * p.H);
    projected_stride = padded_stride<scalar_t>(p.R);
    wide_stride = padded_stride<scalar_t>(p.H);
    gates_stride = padded_stride<scalar_t>(Cell::kSaved * p.H);
    const int64_t rows = block_steps * p.num_lanes;
    for (Block<scalar_t>& block : blocks) {
      block.d = arena.take<scalar_t>(rows * stride);
      block.d_projected = arena.take<scalar_t>(p.w_hr ? rows * projected_stride : 0);
      block.unprojected = arena.take<scalar_t>(p.w_hr ? rows * wide_stride : 0);
      block.rows = arena.take<int64_t>(rows);
      block.before = arena.take<int64_t>(rows);
    }
    if (recomputes()) {
      recomputation = Recomputation<Cell, scalar_t>(p, &arena, rows);
      blocks[0].gates = blocks[1].gates = arena.take<scalar_t>(rows * gates_stride);
    }
    carry = arena.take<scalar_t>(Cell::kHasCarry ? p.num_lanes * wide_stride : 0);
    scratch = arena.take<scalar_t>(p.threads * outer_product_scratch<scalar_t>());
    bytes = arena.used;
  }

  bool recomputes() const { return Cell::kSaved > 0 && !p.gates; }

  void pack(const Worker& worker) const {
    const auto part = [&](const Packed<scalar_t>& to) {
      return share(to.panels(), worker.id, worker.count);
    };
    constexpr int kInOrder[] = {0, 1, 2, 3};
    pack_direct(w_ih, p.w_ih, G, Cell::kInputGate, part(w_ih));
    pack_direct(w_hh, p.w_hh, G, kInOrder, part(w_hh));
    if (p.w_hr) pack_direct(w_hr, p.w_hr, 1, kInOrder, part(w_hr));
    if (recomputes()) recomputation.pack(p, worker);
  }

  // Fills in which rows the steps [begin, end) of a block belong to. Each thread of a team fills
  // every `count`-th step.
  void start_block(Block<scalar_t>* block, int64_t begin, int64_t end, const Worker& worker) const {
    block->begin = begin;
    block->end = end;
    const Share all = everyone(p);
    int64_t first = 0;
    for (int64_t s = end - 1; s >= begin; --s) {
      const int64_t active = all.active_at(s);
      if (s % worker.count == worker.id) {
        for (int64_t i = 0; i < active; ++i) {
          block->rows[first + i] = row_at(p, p.lanes[i], s);
          block->before[first + i] = row_before(p, p.lanes[i], s);
        }
      }
      first += active;
    }
    block->num_rows = first;
  }

  // A row of [N, ...] memory, or of [B, ...] initial states, or null where the state was zero.
  static const scalar_t* state_row(const scalar_t* memory, int64_t ld, const scalar_t* initial,
                                   int64_t columns, int64_t before) {
    if (before >= 0) return memory + before * ld;
    return initial ? initial + (-1 - before) * columns : nullptr;
  }
  const scalar_t* h_before(int64_t before) const {
    return state_row(p.output, p.ld_out, p.hx, p.R, before);
  }

  // Fills the block's activations, from the states that are all known, for a share of its rows.
  void recompute(const Block<scalar_t>& block, const Worker& worker) const {
    recomputation.run(
        p, share(block.num_rows, worker.id, worker.count), block.gates, gates_stride,
        [&](int64_t r) { return p.input + block.rows[r] * p.I; },
        [&](int64_t r) { return h_before(block.before[r]); });
  }

  // What a thread knows of the recurrence between two blocks.
  struct Progress {
    int64_t entered;    // the group's lanes that have taken their last step
    const scalar_t* d;  // their d of the step just taken, as W_hh saw it
  };

  // The gradient of the state of lane i at step s: `sum` from the step after it, and what the loss
  // adds at this step.
  V add_gradients(V sum, const Lane& lane, int64_t s, int64_t row, int64_t unit,
                  int64_t count) const {
    if (p.d_output) sum += load_first(p.d_output + row * p.ld_out + unit, count);
    if (p.d_h_n && ends_sequence(lane, s)) {
      sum += load_first(p.d_h_n + lane.batch * p.R + unit, count);
    }
    return sum;
  }

  static bool ends_sequence(const Lane& lane, int64_t s) {
    return s + 1 == lane.steps && lane.to_end;
  }

  // The cell's derivative for some units of one row of a block, given the gradient dh of its state.
  void finish_units(V dh, const Lane& lane, int64_t lane_index, int64_t s,
                    const Block<scalar_t>& block, int64_t block_row, int64_t unit,
                    int64_t count) const {
    const int64_t row = row_at(p, lane, s);
    V d[Cell::kColumns];
    if constexpr (Cell::kSaved == 0) {
      Cell::backward(dh, load_first(p.output + row * p.ld_out + unit, count), d);
    } else {
      const scalar_t* gates = unit + (p.gates ? p.gates + row * Cell::kSaved * p.H
                                              : block.gates + block_row * gates_stride);
      V saved[Cell::kSaved];
      for (int k = 0; k < Cell::kSaved; ++k) saved[k] = load_first(gates + k * p.H, count);
      scalar_t* carried = carry + lane_index * wide_stride + unit;
      V from_after = s + 1 == lane.steps ? V{} : load(carried);
      V to_before;
      const int64_t before_row = row_before(p, lane, s);
      if constexpr (Cell::kHasCellState) {
        if (p.d_c_n && ends_sequence(lane, s)) {
          from_after = load_first(p.d_c_n + lane.batch * p.H + unit, count);
        }
        const V c = load_first(p.c + row * p.H + unit, count);
        const scalar_t* before = state_row(p.c, p.H, p.cx, p.H, before_row);
        const V c_before = before ? load_first(before + unit, count) : V{};
        Cell::backward(dh, from_after, saved, c_before, c, d, &to_before);
        if (p.w_hr) store(block.unprojected + block_row * wide_stride + unit, saved[3] * tanh(c));
      } else {
        const scalar_t* before = h_before(before_row);
        const V state = before ? load_first(before + unit, count) : V{};
        Cell::backward(dh + from_after, saved, state, d, &to_before);
      }
      store(carried, to_before);
    }
    scalar_t* d_row = block.d + block_row * stride + unit;
    for (int k = 0; k < Cell::kColumns; ++k) store_first(d_row + k * p.H, d[k], count);
  }

  // Runs the recurrence over a block, last step first, for the thread's lanes and units.
  void run_steps(const Share& mine, const Block<scalar_t>& block, Progress* progress) const {
    const int64_t ld = stride * mine.lane_step;
    const Share all = everyone(p);
    const OwnValues own = p.w_hr ? OwnValues{} : own_values(w_hh, mine.panels, G);
    int64_t first_row = 0;
    for (int64_t s = block.end - 1; s >= block.begin; --s) {
      const auto finish_row = [&](int64_t i, int64_t panel, const scalar_t* acc) {
        const Lane& lane = mine.lane(i);
        const int64_t row = row_at(p, lane, s), block_row = first_row + mine.index(i);
        for_each_unit_vec(w_hh, panel, [&](int64_t v, int64_t unit, int64_t count) {
          const V dh = add_gradients(load(acc + v * W), lane, s, row, unit, count);
          if (p.w_hr) {
            store(block.d_projected + block_row * projected_stride + unit, dh);
          } else {
            finish_units(dh, lane, mine.index(i), s, block, block_row, unit, count);
          }
        });
      };
      const int64_t active = mine.active_at(s);
      const auto await = [&] { mine.group.await(); };
      step_tiles(mine.panels, w_hh, G * p.H, progress->d, ld, own, 0, progress->entered, await,
                 finish_row);
      step_tiles(mine.panels, w_hh, 0, progress->d, ld, progress->entered, active, finish_row);
      mine.group.arrive();
      if (p.w_hr) {
        mine.group.await();
        step_tiles(mine.projected, w_hr, p.R,
                   block.d_projected + (first_row + mine.first_lane) * projected_stride,
                   mine.lane_step * projected_stride, 0, active,
                   [&](int64_t i, int64_t panel, const scalar_t* acc) {
                     for_each_unit_vec(w_hr, panel, [&](int64_t v, int64_t unit, int64_t count) {
                       finish_units(load(acc + v * W), mine.lane(i), mine.index(i), s, block,
                                    first_row + mine.index(i), unit, count);
                     });
                   });
        mine.group.arrive();
      }
      *progress = {active,
                   block.d + (first_row + mine.first_lane) * stride + Cell::kFirstRecurrent * p.H};
      first_row += all.active_at(s);
    }
  }

  // What the recurrence carries beyond the first step of a sequence.
  void finish_initial_states(const Share& mine, const Progress& progress) const {
    mine.group.await();
    if (p.d_hx) {
      step_tiles(mine.panels, w_hh, G * p.H, progress.d, stride * mine.lane_step, 0, mine.num_lanes,
                 [&](int64_t i, int64_t panel, const scalar_t* acc) {
                   const Lane& lane = mine.lane(i);
                   if (!lane.from_start) return;
                   for_each_unit_vec(w_hh, panel, [&](int64_t v, int64_t unit, int64_t count) {
                     V dh = load(acc + v * W);
                     if constexpr (Cell::kHasCarry && !Cell::kHasCellState) {
                       dh += load(carry + mine.index(i) * wide_stride + unit);
                     }
                     store_first(p.d_hx + lane.batch * p.R + unit, dh, count);
                   });
                 });
    }
    if (!p.d_cx) return;
    const Packed<scalar_t>& units = p.w_hr ? w_hr : w_hh;
    const Range panels = p.w_hr ? mine.projected : mine.panels;
    for (int64_t i = 0; i < mine.num_lanes; ++i) {
      const Lane& lane = mine.lane(i);
      if (!lane.from_start) continue;
      for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
        for_each_unit_vec(units, panel, [&](int64_t, int64_t unit, int64_t count) {
          store_first(p.d_cx + lane.batch * p.H + unit,
                      load(carry + mine.index(i) * wide_stride + unit), count);
        });
      }
    }
  }

  // The products of a finished block: dx for a share of its rows, and its part of the weights'
  // gradients for a share of the units.
  void add_products(const Block<scalar_t>& block, bool first_block, const Worker& worker) const {
    if (p.d_input) {
      gemm_rows(block.d, stride, w_ih, share(block.num_rows, worker.id, worker.count),
                [&](int64_t r, int64_t column, int64_t count, V sum) {
                  scalar_t* to = p.d_input + block.rows[r] * p.I + column;
                  if (p.accumulate_d_input) sum += load_first(to, count);
                  store_first(to, sum, count);
                });
    }
    if (!p.d_w_ih) return;
    constexpr int kInOrder[] = {0, 1, 2, 3};
    const OuterProduct<scalar_t> inputs{block.d,          stride, block.num_rows, G,
                                        Cell::kInputGate, p.H,    !first_block};
    OuterProduct<scalar_t> states = inputs;
    states.d += Cell::kFirstRecurrent * p.H;
    states.order = kInOrder;
    const Range units = share(p.H, worker.id, worker.count);
    scalar_t* mine = scratch + worker.id * outer_product_scratch<scalar_t>();
    inputs.add(p.d_w_ih, p.I, units, mine,
               [&](int64_t r) { return p.input + block.rows[r] * p.I; });
    states.add(p.d_w_hh, p.R, units, mine, [&](int64_t r) { return h_before(block.before[r]); });
    if (p.d_b_ih) {
      inputs.add_sums(p.d_b_ih, units);
      states.add_sums(p.d_b_hh, units);
    }
    if (p.d_w_hr) {
      const OuterProduct<scalar_t> projected{
          block.d_projected, projected_stride, block.num_rows, 1, kInOrder, p.R, !first_block};
      projected.add(p.d_w_hr, p.H, share(p.R, worker.id, worker.count), mine,
                    [&](int64_t r) { return block.unprojected + r * wide_stride; });
    }
  }
};

template <typename Cell, typename scalar_t>
int64_t backward_workspace(const BwdParams<scalar_t>& p) {
  return Backward<Cell, scalar_t>(p, Arena{nullptr}, {1, 1}).bytes;
}

template <typename Cell, typename scalar_t>
void backward(const BwdParams<scalar_t>& p, const Worker& worker) {
  using Pass = Backward<Cell, scalar_t>;
  const Split split = split_for(p, Cell::kGates * p.H, p.R, 1, worker);
  Pass pass(p, Arena{static_cast<char*>(p.workspace)}, split);
  pass.pack(worker);
  worker.everyone.wait();

  const Share mine = share_of(p, pass.w_hh, pass.w_hr, split, worker);
  typename Pass::Progress progress{0, pass.blocks[0].d};
  const int64_t steps = p.lanes[0].steps;
  for (int64_t end = steps, turn = 0; end > 0; end -= pass.block_steps, turn ^= 1) {
    Block<scalar_t>& block = pass.blocks[turn];
    pass.start_block(&block, max(0, end - pass.block_steps), end, worker);
    if (pass.recomputes()) {
      worker.everyone.wait();
      pass.recompute(block, worker);
      worker.everyone.wait();
    }
    if (!mine.idle) pass.run_steps(mine, block, &progress);
    worker.everyone.wait();
    pass.add_products(block, end == steps, worker);
  }
  if (!mine.idle) pass.finish_initial_states(mine, progress);
}

}  // namespace
}  // namespace fastbptt
