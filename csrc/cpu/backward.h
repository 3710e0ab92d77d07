// The backward pass of one direction.
//
//   step by step       lambda_t = g_t + d_{t+1} W_hh + carry,  d_t = the cell's derivative of it
//   then, all at once  dx = d W_ih,  dW_ih = d^T x,  dW_hh = d^T h_{t-1},  db = sum of d
//
// d are the gradients of the gates' pre-activations. The pass goes in blocks of steps: the
// recurrence fills a block of d, [rows, stride], which is still in the cache when the products read
// it, and d is never kept whole. Rows of a block are ordered by step, last step first, then by lane.
// Two blocks take turns, since the first step of one reads the last step of the other.
//
// Where lanes overlap, the products are linear in d and their other factors the same for all lanes:
// so each block is added to a sum of d over the lanes, and the products are those of the sum.
#pragma once

#include "cpu/any_elman.h"
#include "cpu/overlap.h"
#include "cpu/recompute.h"

namespace fastbptt {
namespace {

template <typename Cell, typename scalar_t>
struct Backward {
  using V = Vec<scalar_t>;
  using acc_t = Accumulator<scalar_t>;
  using operand_t = Operand<scalar_t>;
  static constexpr int W = kLanes<scalar_t>;
  static constexpr int G = Cell::kGates;
  static constexpr int kInOrder[] = {0, 1, 2, 3};
  // Whether products read d from copies of it that are rounded.
  static constexpr bool kRoundsD = !std::is_same_v<operand_t, acc_t>;

  const BwdParams<scalar_t>& p;
  Packed<scalar_t> w_ih, w_hh, w_hr;
  int64_t stride, projected_stride, wide_stride, gates_stride;
  Block<acc_t> blocks[2] = {};  // the second where one has not room for all steps
  Recomputation<Cell, scalar_t> recomputation;
  OverlapSum<scalar_t> sum;
  acc_t* carry;    // [num_lanes, wide_stride]
  acc_t* initial;  // [num_lanes, projected_stride] where lanes overlap: d_hx of each
  acc_t* hx_sums;  // [B, projected_stride] of these
  acc_t* cx_sums;  // [B, wide_stride] likewise
  // For OuterProduct: d, that of the projected state, and a scratch for each thread.
  operand_t *packed, *projected_packed, *scratch;
  int64_t max_depth;
  // Where d is rounded: of two steps in turn as W_hh saw it, [num_lanes, stride], likewise of the
  // projected state, [num_lanes, projected_stride], and of a block's rows.
  operand_t *d_step[2] = {}, *projected_step = nullptr;
  RowGather<operand_t> d_rows;
  WeightGradients<scalar_t> d_weights;
  int64_t bytes;

  Backward(const BwdParams<scalar_t>& params, Arena arena, Split split) : p(params) {
    const auto take = [&](const scalar_t* w, int64_t K, int64_t units, int blocks, const int* order,
                          int64_t panel_vecs, bool at_once) {
      if (is_worth_packing(lane_rows(p), K, at_once)) {
        return arena.take_packed<scalar_t>(K, units, 1, panel_vecs);
      }
      return Packed<scalar_t>{nullptr, K, units, 1, panel_vecs, w, order, blocks};
    };
    const bool one_step = p.lanes[0].steps == 1;
    w_ih = take(p.w_ih, G * p.H, p.d_input ? p.I : 0, G, Cell::kInputGate, kPanelVecs, true);
    w_hh =
        take(p.w_hh, G * p.H, p.R, G, kInOrder, panel_vecs_for<scalar_t>(p.R, 1, split), one_step);
    w_hr = take(p.w_hr, p.R, p.w_hr ? p.H : 0, 1, kInOrder, panel_vecs_for<scalar_t>(p.H, 1, split),
                one_step);
    stride = padded_stride<scalar_t>(Cell::kColumns * p.H);
    projected_stride = padded_stride<scalar_t>(p.R);
    wide_stride = padded_stride<scalar_t>(p.H);
    gates_stride = padded_stride<scalar_t>(Cell::kSaved * p.H);
    const int64_t rows = max_block_rows(p);
    // A block that is not full before step 0 takes that one too, and there is no other.
    const int num_blocks = lane_rows(p) - p.num_lanes < kBlockRows ? 1 : 2;
    for (int i = 0; i < num_blocks; ++i) {
      Block<acc_t>& block = blocks[i];
      block.d = arena.take<acc_t>(rows * stride);
      block.d_projected = arena.take<acc_t>(p.w_hr ? rows * projected_stride : 0);
      block.unprojected = arena.take<acc_t>(p.w_hr ? rows * wide_stride : 0);
      block.rows = arena.take<int64_t>(rows);
      block.before = arena.take<int64_t>(rows);
      block.sum_rows = arena.take<int64_t>(p.overlapping ? rows : 0);
    }
    if (recomputes()) {
      recomputation = Recomputation<Cell, scalar_t>(p, &arena, rows);
      blocks[0].gates = blocks[1].gates = arena.take<acc_t>(rows * gates_stride);
    }
    if (p.overlapping) {
      sum = OverlapSum<scalar_t>(p, &arena, stride, projected_stride, wide_stride);
    }
    carry = arena.take<acc_t>(Cell::kHasCarry ? p.num_lanes * wide_stride : 0);
    initial = arena.take<acc_t>(p.overlapping && p.d_hx ? p.num_lanes * projected_stride : 0);
    hx_sums = arena.take<acc_t>(p.overlapping && p.d_hx ? p.layout.B * projected_stride : 0);
    cx_sums = arena.take<acc_t>(p.overlapping && p.d_cx ? p.layout.B * wide_stride : 0);
    // A sum over lanes has rows for steps that no lane takes, too.
    const int64_t most = p.overlapping ? max(rows, min(kBlockRows, sum.all.num_rows)) : rows;
    using Products = OuterProduct<operand_t>;
    max_depth = p.d_w_ih ? Products::depth_of(most) : 0;
    packed = arena.take<operand_t>(Cell::kColumns * p.H * max_depth);
    projected_packed = arena.take<operand_t>(p.d_w_hr ? p.R * max_depth : 0);
    scratch = arena.take<operand_t>(p.threads * Products::scratch_size(max_depth));
    if constexpr (kRoundsD) {
      for (operand_t*& d : d_step) d = arena.take<operand_t>(p.num_lanes * stride);
      if (p.d_input) d_rows = RowGather<operand_t>(&arena, most, G * p.H);
      if (p.w_hr) projected_step = arena.take<operand_t>(p.num_lanes * projected_stride);
    }
    d_weights = WeightGradients<scalar_t>(p, G, &arena);
    bytes = arena.used;
  }

  bool recomputes() const { return Cell::kSaved > 0 && !p.gates; }

  void pack(const Worker& worker) const {
    const auto part = [&](const Packed<scalar_t>& to) {
      return share(to.panels(), worker.id, worker.count);
    };
    const auto pack_one = [&](const Packed<scalar_t>& to, const scalar_t* w, int blocks,
                              const int* order) {
      if (!to.unpacked) pack_direct(to, w, blocks, order, part(to));
    };
    pack_one(w_ih, p.w_ih, G, Cell::kInputGate);
    const bool goes_back = p.lanes[0].steps > 1 || p.d_hx;
    if (goes_back) pack_one(w_hh, p.w_hh, G, kInOrder);
    if (p.w_hr) pack_one(w_hr, p.w_hr, 1, kInOrder);
    if (recomputes()) recomputation.pack(p, worker);
  }

  // Fills in which rows the steps of a block belong to, for every `count`-th step.
  void find_rows(const Block<acc_t>& block, const Worker& worker) const {
    fastbptt::find_rows(p, block, worker, [&](int64_t r, const Lane& lane, int64_t s) {
      if (!p.overlapping) return;
      block.sum_rows[r] = sum.row(p, lane.first + p.direction * s, lane.batch);
    });
  }

  const scalar_t* h_before(int64_t before) const {
    return state_row(p.output, p.ld_out, p.hx, p.R, before);
  }

  // Fills the block's activations, from the states that are all known, for a share of its rows.
  void recompute(const Block<acc_t>& block, const Worker& worker) const {
    recomputation.run(
        p, share(block.num_rows, worker.id, worker.count), block.gates, gates_stride,
        [&](int64_t r) { return p.input + block.rows[r] * p.I; },
        [&](int64_t r) { return h_before(block.before[r]); });
  }

  // Where the next steps begin, which go from the last one to the first.
  struct Progress {
    int64_t end;         // step: the one behind it is taken next
    int64_t first_row;   // of that step in its block
    const operand_t* d;  // [num_lanes, stride] of the step just taken, as W_hh saw it
  };

  // What a step needs to know of a lane, for all of its units.
  struct Row {
    acc_t gate;                            // see gate_after
    const scalar_t *loss, *d_h_n, *d_c_n;  // what the loss adds, or null
    const scalar_t *output, *gates, *c;
    const acc_t* recomputed;  // the activations, where they are not kept
    const scalar_t* before;   // c, or h, of the step before, or null: zeros
    acc_t* carried;
    bool is_last;  // nothing is carried yet
    acc_t *d, *d_projected, *unprojected;
    operand_t *d_rounded, *projected_rounded;  // where products read rounded d
  };

  Row row_of(const Share& mine, int64_t i, const Block<acc_t>& block, Progress at) const {
    const int64_t s = at.end - 1, index = mine.index(i), block_row = at.first_row + index;
    const Lane& lane = mine.lane(i);
    const int64_t row = row_at(p, lane, s);
    const bool ends = ends_sequence(lane, s);
    Row r{};
    r.gate = gate_after(p, lane, s);
    if (p.d_lanes) {
      r.loss = p.d_lanes + (block.lane_row + block_row) * p.R;
    } else if (p.d_output && lane.loss_begin <= s && s < lane.loss_end) {
      r.loss = p.d_output + row * p.ld_out;
    }
    r.d_h_n = p.d_h_n && ends ? p.d_h_n + lane.batch * p.R : nullptr;
    r.output = p.output + row * p.ld_out;
    if constexpr (Cell::kSaved > 0) {
      r.gates = p.gates ? p.gates + row * Cell::kSaved * p.H : nullptr;
      r.recomputed = p.gates ? nullptr : block.gates + block_row * gates_stride;
      r.carried = carry + index * wide_stride;
      r.is_last = s + 1 == lane.steps;
      const int64_t before = row_before(p, lane, s);
      if constexpr (Cell::kHasCellState) {
        r.d_c_n = p.d_c_n && ends ? p.d_c_n + lane.batch * p.H : nullptr;
        r.c = p.c + row * p.H;
        r.before = state_row(p.c, p.H, p.cx, p.H, before);
      } else {
        r.before = h_before(before);
      }
    }
    r.d = block.d + block_row * stride;
    if (p.w_hr) {
      r.d_projected = block.d_projected + block_row * projected_stride;
      r.unprojected = block.unprojected + block_row * wide_stride;
    }
    if constexpr (kRoundsD) {
      r.d_rounded = d_step[s % 2] + index * stride;
      r.projected_rounded = p.w_hr ? projected_step + index * projected_stride : nullptr;
    }
    return r;
  }

  // The gradient of the state: `sum` from the step after it, and what the loss adds.
  template <typename Count>
  static V add_gradients(V sum, const Row& row, int64_t unit, Count count) {
    if (row.loss) sum += load_first(row.loss + unit, count);
    if (row.d_h_n) sum += load_first(row.d_h_n + unit, count);
    return sum;
  }

  // The cell's derivative for some units, given the gradient dh of its state.
  template <typename OneCell, typename Count>
  void finish_units(OneCell cell, V dh, const Row& row, int64_t unit, Count count) const {
    V d[Cell::kColumns];
    if constexpr (Cell::kSaved == 0) {
      cell.backward(dh, load_first(row.output + unit, count), d);
    } else {
      V saved[Cell::kSaved];
      for (int k = 0; k < Cell::kSaved; ++k) {
        const int64_t column = k * p.H + unit;
        saved[k] = row.gates ? load_first(row.gates + column, count)
                             : load_first(row.recomputed + column, count);
      }
      V from_after = row.is_last ? V{} : through(row.gate, load(row.carried + unit));
      V to_before;
      const V before = row.before ? load_first(row.before + unit, count) : V{};
      if constexpr (Cell::kHasCellState) {
        if (row.d_c_n) from_after = load_first(row.d_c_n + unit, count);
        const V c = load_first(row.c + unit, count);
        cell.backward(dh, from_after, saved, before, c, d, &to_before);
        if (p.w_hr) store(row.unprojected + unit, saved[3] * tanh(c));
      } else {
        cell.backward(dh + from_after, saved, before, d, &to_before);
      }
      store(row.carried + unit, to_before);
    }
    for (int k = 0; k < Cell::kColumns; ++k) store_first(row.d + k * p.H + unit, d[k], count);
    if constexpr (kRoundsD) {
      for (int k = 0; k < G; ++k) {
        store_first(row.d_rounded + k * p.H + unit, d[Cell::kFirstRecurrent + k], count);
      }
    }
  }

  // Takes steps down to `begin` with some of the parts.
  void run_steps(const std::vector<Share>& shares, Parts parts, const Block<acc_t>& block,
                 Progress at, int64_t begin) const {
    while (at.end > begin) {
      for_each_share(shares, parts, [&](const Share& mine) { take_step(mine, block, at); });
      if (p.w_hr) {
        for_each_share(shares, parts, [&](const Share& mine) { project_step(mine, block, at); });
      }
      advance(&at, block, at.end - 1);
    }
  }

  void advance(Progress* at, const Block<acc_t>& block, int64_t begin) const {
    const Share all = everyone(p);
    for (; at->end > begin; --at->end) {
      if constexpr (kRoundsD) {
        at->d = d_step[(at->end - 1) % 2];
      } else {
        at->d = block.d + at->first_row * stride + Cell::kFirstRecurrent * p.H;
      }
      at->first_row += all.active_at(at->end - 1);
    }
  }

  void take_step(const Share& mine, const Block<acc_t>& block, Progress at) const {
    const int64_t s = at.end - 1, ld = stride * mine.lane_step;
    const int64_t entered = mine.active_at(s + 1), active = mine.active_at(s);
    const operand_t* d = at.d + (entered > 0 ? mine.first_lane * stride : 0);
    const OwnValues own = p.w_hr ? OwnValues{} : own_values(w_hh, mine.panels, G);
    const auto await = [&] { mine.group.await(); };
    const auto row_of_lane = [&](int64_t i) { return row_of(mine, i, block, at); };
    const auto run = [&](int64_t begin, int64_t end, int64_t K) {
      for_each_row_group<Row>(begin, end, row_of_lane,
                              [&](int64_t first, int64_t last, const Row* rows) {
                                step_tiles(mine.panels, w_hh, K, d, ld, own, first, last, await,
                                           [&](int64_t i, int64_t panel, const acc_t* acc) {
                                             const Row& row = rows[i - first];
                                             if (panel + 1 < mine.panels.end)
                                               prefetch(row, panel + 1);
                                             finish_row(row, panel, acc);
                                           });
                              });
    };
    run(0, entered, G * p.H);
    if (entered < active) run(entered, active, 0);
    mine.group.arrive();
  }

  // What finish_row will read of memory, where it has no projection to wait for.
  void prefetch(const Row& row, int64_t panel) const {
    if (row.loss) prefetch_units(row.loss, w_hh, panel);
    if (p.w_hr) return;
    if constexpr (Cell::kSaved == 0) {
      prefetch_units(row.output, w_hh, panel);
    } else {
      for (int k = 0; k < Cell::kSaved; ++k) {
        if (row.gates) prefetch_units(row.gates + k * p.H, w_hh, panel);
        if (row.recomputed) prefetch_units(row.recomputed + k * p.H, w_hh, panel);
      }
      if (row.before) prefetch_units(row.before, w_hh, panel);
      if constexpr (Cell::kHasCellState) prefetch_units(row.c, w_hh, panel);
    }
  }

  void finish_row(const Row& row, int64_t panel, const acc_t* acc) const {
    for_phi<Cell>(p.kind, [&](auto cell) { finish_row(cell, row, panel, acc); });
  }

  template <typename OneCell>
  void finish_row(OneCell cell, const Row& row, int64_t panel, const acc_t* acc) const {
    for_each_unit_vec(w_hh, panel, [&](int64_t v, int64_t unit, auto count) {
      const V dh = add_gradients(through(row.gate, load(acc + v * W)), row, unit, count);
      if (p.w_hr) {
        store(row.d_projected + unit, dh);
        if constexpr (kRoundsD) store(row.projected_rounded + unit, dh);
      } else {
        finish_units(cell, dh, row, unit, count);
      }
    });
  }

  void project_step(const Share& mine, const Block<acc_t>& block, Progress at) const {
    mine.group.await();
    const operand_t* d_projected = projected_step + mine.first_lane * projected_stride;
    if constexpr (!kRoundsD) {
      d_projected = block.d_projected + (at.first_row + mine.first_lane) * projected_stride;
    }
    for_each_row_group<Row>(
        0, mine.active_at(at.end - 1), [&](int64_t i) { return row_of(mine, i, block, at); },
        [&](int64_t first, int64_t last, const Row* rows) {
          step_tiles(mine.projected, w_hr, p.R, d_projected, mine.lane_step * projected_stride,
                     first, last, [&](int64_t i, int64_t panel, const acc_t* acc) {
                       for_each_unit_vec(w_hr, panel, [&](int64_t v, int64_t unit, auto count) {
                         for_phi<Cell>(p.kind, [&](auto cell) {
                           finish_units(cell, load(acc + v * W), rows[i - first], unit, count);
                         });
                       });
                     });
        });
    mine.group.arrive();
  }

  // What the recurrence carries beyond the first step of a sequence. Where lanes overlap it stays in
  // `initial` and `carry`, of which the sums are still to come.
  void finish_initial_states(const Share& mine, const operand_t* d) const {
    if (p.d_hx) {
      step_tiles(mine.panels, w_hh, G * p.H, d + mine.first_lane * stride, stride * mine.lane_step,
                 0, mine.num_lanes, [&](int64_t i, int64_t panel, const acc_t* acc) {
                   const Lane& lane = mine.lane(i);
                   if (lane.before != Before::kInitial) return;
                   const acc_t gate = gate_before(p, lane);
                   for_each_unit_vec(w_hh, panel, [&](int64_t v, int64_t unit, auto count) {
                     V dh = load(acc + v * W);
                     if constexpr (Cell::kHasCarry && !Cell::kHasCellState) {
                       dh += load(carry + mine.index(i) * wide_stride + unit);
                     }
                     dh = through(gate, dh);
                     if (p.overlapping) {
                       store(initial + mine.index(i) * projected_stride + unit, dh);
                     } else {
                       store_first(p.d_hx + lane.batch * p.R + unit, dh, count);
                     }
                   });
                 });
    }
    if (!p.d_cx || p.overlapping) return;
    const Packed<scalar_t>& units = p.w_hr ? w_hr : w_hh;
    const Range panels = p.w_hr ? mine.projected : mine.panels;
    for (int64_t i = 0; i < mine.num_lanes; ++i) {
      const Lane& lane = mine.lane(i);
      if (lane.before != Before::kInitial) continue;
      const acc_t gate = gate_before(p, lane);
      for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
        for_each_unit_vec(units, panel, [&](int64_t, int64_t unit, auto count) {
          store_first(p.d_cx + lane.batch * p.H + unit,
                      through(gate, load(carry + mine.index(i) * wide_stride + unit)), count);
        });
      }
    }
  }

  // dx of some rows of a block.
  void input_gradient(const Block<acc_t>& block, Range rows, Team& team) const {
    const int64_t count = rows.end - rows.begin;
    if constexpr (kRoundsD) {
      team.run([&](const Worker& worker) {
        d_rows.gather(share(count, worker.id, worker.count),
                      [&](int64_t r) { return block.d + (rows.begin + r) * stride; });
      });
    }
    const int64_t* const to_row = p.overlapping ? block.sum_rows : block.rows;
    team.run([&](const Worker& worker) {
      const auto [mine, panels] = share_product(count, w_ih, worker);
      const auto finish = [&](int64_t i, int64_t column, auto columns, V sum) {
        const int64_t r = rows.begin + i;
        const int64_t row = p.d_input_by_lane ? block.lane_row + r : to_row[r];
        scalar_t* to = p.d_input + row * p.I + column;
        if (p.mask) sum *= load_first(p.mask + block.rows[r] * p.I + column, columns);
        if (p.accumulate_d_input) sum += load_first(to, columns);
        store_first(to, sum, columns);
      };
      if constexpr (kRoundsD) {
        gemm_rows(d_rows.rows, d_rows.stride, w_ih, mine, panels, finish);
      } else {
        gemm_rows(block.d + rows.begin * stride, stride, w_ih, mine, panels, finish);
      }
    });
  }

  // The part that a finished block of rows has in the weights' gradients, for a share of the units.
  void add_products(const Block<acc_t>& block, bool first_block, const Worker& worker) const {
    if (!p.d_w_ih) return;
    for_each_tile(0, block.num_rows, kBlockRows, [&](int64_t first, int64_t count) {
      add_weight_gradients(block, {first, first + count}, first_block && first == 0, worker);
    });
  }

  // The part that some rows of a block have in the weights' gradients, for a share of the units.
  void add_weight_gradients(const Block<acc_t>& block, Range rows, bool is_first,
                            const Worker& worker) const {
    operand_t* const mine = scratch + worker.id * OuterProduct<operand_t>::scratch_size(max_depth);
    const Range units = share(p.H, worker.id, worker.count);
    const int64_t count = rows.end - rows.begin;
    const OuterProduct<operand_t> product{
        block.d + rows.begin * stride, stride, count, p.H, !is_first, max_depth, packed, mine};
    product.pack(Cell::kColumns, units);
    d_weights.visit(p, [&](const auto& to) {
      product.add(to.w_ih, p.I, 0, G, Cell::kInputGate, units,
                  [&](int64_t r) { return p.input + block.rows[rows.begin + r] * p.I; });
      product.add(to.w_hh, p.R, Cell::kFirstRecurrent, G, kInOrder, units,
                  [&](int64_t r) { return h_before(block.before[rows.begin + r]); });
      if (p.d_b_ih) {
        product.add_sums(to.b_ih, 0, G, Cell::kInputGate, units);
        product.add_sums(to.b_hh, Cell::kFirstRecurrent, G, kInOrder, units);
      }
      if (p.d_w_hr) {
        const Range projected = share(p.R, worker.id, worker.count);
        const OuterProduct<operand_t> projection{block.d_projected + rows.begin * projected_stride,
                                                 projected_stride,
                                                 count,
                                                 p.R,
                                                 !is_first,
                                                 max_depth,
                                                 projected_packed,
                                                 mine};
        projection.pack(1, projected);
        projection.add(to.w_hr, p.H, 0, 1, kInOrder, projected, [&](int64_t r) {
          return block.unprojected + (rows.begin + r) * wide_stride;
        });
      }
    });
  }
};

}  // namespace
}  // namespace fastbptt
