// The backward pass of one direction of a user's cell, step by step: the gradient of each state is what
// the loss adds, what the step after hands on, and of the state that W_hh sees also d_{t+1} W_hh; then
// the cell's derivative. As in the backward pass of the built-in cells, the gradients of the gates fill
// a block of steps, which the products read while it is in the cache.
#pragma once

#include "cpu/blocks.h"
#include "user_cell/functions.h"
#include "user_cell/norms.h"
#include "user_cell/run.h"

namespace fastbptt {
namespace {

template <typename scalar_t>
struct UserBackward {
  using Params = UserBackwardParams<scalar_t>;
  using V = Vec<scalar_t>;
  using Product = OuterProduct<scalar_t>;
  static constexpr int W = kLanes<scalar_t>;

  // Where the next steps begin, which go from the last one to the first.
  struct Progress {
    int64_t taken = 0;
    int64_t first_row = 0;        // of the next step's first lane in its block
    const scalar_t* d = nullptr;  // [num_lanes, stride] of the step just taken, as W_hh saw it
  };

  const Params& p;
  Packed<scalar_t> w_ih, w_hh, w_hr;  // w_hr: none
  int64_t stride, carry_stride;
  Block<scalar_t> blocks[2] = {};  // the second where one has not room for all steps
  Block<scalar_t>* block = nullptr;
  scalar_t* carry;             // [num_lanes, S, carry_stride]
  scalar_t* extra_sums;        // [threads, lane_blocks, E, carry_stride]
  scalar_t *packed, *scratch;  // for OuterProduct
  int64_t max_depth;
  Norms<scalar_t> norms;
  int64_t bytes;

  UserBackward(const Params& params, Arena arena, Split split)
      : p(params), norms(p, p.cell, &arena, p.cell.gradient_slots, 2) {
    const auto take = [&](const scalar_t* w, int64_t K, int64_t units, const int* order,
                          int64_t panel_vecs, bool at_once) {
      if (!w || is_worth_packing(lane_rows(p), K, at_once)) {
        return arena.take_packed<scalar_t>(K, units, 1, panel_vecs);
      }
      return Packed<scalar_t>{nullptr, K, units, 1, panel_vecs, w, order, p.cell.gates};
    };
    w_ih =
        take(p.w_ih, p.cell.gates * p.H, p.d_input ? p.I : 0, p.cell.input_order, kPanelVecs, true);
    w_hh = take(p.w_hh, terms(p), p.H, p.cell.recurrent_order,
                panel_vecs_for<scalar_t>(p.H, 1, split), p.lanes[0].steps == 1);
    w_hr = Packed<scalar_t>{nullptr, 0, 0, 1, 1};
    stride = padded_stride<scalar_t>(p.cell.columns * p.H);
    carry_stride = padded_stride<scalar_t>(p.H);
    const int64_t rows = max_block_rows(p);
    // A block that is not full before step 0 takes that one too, and there is no other.
    const int num_blocks = lane_rows(p) - p.num_lanes < kBlockRows ? 1 : 2;
    for (int i = 0; i < num_blocks; ++i) {
      blocks[i].d = arena.take<scalar_t>(rows * stride);
      blocks[i].rows = arena.take<int64_t>(rows);
      blocks[i].before = arena.take<int64_t>(rows);
    }
    carry = arena.take<scalar_t>(p.num_lanes * p.cell.states * carry_stride);
    extra_sums = arena.take<scalar_t>(num_extra_sums());
    max_depth = Product::depth_of(rows);
    packed = arena.take<scalar_t>(p.cell.columns * p.H * max_depth);
    scratch = arena.take<scalar_t>(p.threads * Product::scratch_size(max_depth));
    bytes = arena.used;
  }

  // What a sum of W_hh is over.
  static int64_t terms(const Params& p) { return p.w_hh ? p.cell.gates * p.H : 0; }
  static StepWork work_of(const Params& p) {
    return work_of_phases(p, work_of_step(p, max(1, terms(p)), p.H, 1));
  }

  // Sums of an extra's gradient are of a block of steps and of lanes, so that they are not long.
  int64_t lane_blocks() const { return ceil_div(p.num_lanes, kBlockRows); }
  int64_t num_extra_sums() const {
    return p.threads * lane_blocks() * p.cell.extras * carry_stride;
  }

  void pack(const Worker& worker) const {
    const Range sums = share(num_extra_sums(), worker.id, worker.count);
    std::fill(extra_sums + sums.begin, extra_sums + sums.end, scalar_t(0));
    const auto pack_one = [&](const Packed<scalar_t>& to, const scalar_t* w, const int* order) {
      if (!w || to.unpacked) return;
      pack_direct(to, w, p.cell.gates, order, share(to.panels(), worker.id, worker.count));
    };
    pack_one(w_ih, p.w_ih, p.cell.input_order);
    pack_one(w_hh, p.w_hh, p.cell.recurrent_order);
  }

  // Begins a block of steps, and returns how many are taken at its end.
  int64_t start_block(Progress* at, Team& team) {
    const int64_t steps = p.lanes[0].steps, end = steps - at->taken;
    block = &blocks[block == &blocks[0]];
    fastbptt::start_block(p, block, block_begin(p, end), end, 0);
    team.run([&](const Worker& worker) {
      find_rows(p, *block, worker, [&](int64_t r, const Lane& lane, int64_t s) {
        block->before[r] = user_row_before(p, lane, s);
      });
    });
    at->first_row = 0;
    return steps - block->begin;
  }

  // The input's gradient, and the part that a block has in the weights' gradients.
  void finish_block(Team& team) const {
    if (p.d_input) {
      team.run([&](const Worker& worker) {
        const auto [rows, panels] = share_product(block->num_rows, w_ih, worker);
        gemm_rows(block->d, stride, w_ih, rows, panels,
                  [&](int64_t r, int64_t column, auto columns, V sum) {
                    store_first(p.d_input + block->rows[r] * p.I + column, sum, columns);
                  });
      });
    }
    const bool is_first = block->end == p.lanes[0].steps;
    if (p.cell.extras > 0) {
      team.run([&](const Worker& worker) { add_extras(is_first, worker); });
    }
    if (!p.d_w_ih && !p.d_w_hh && !p.d_b_ih && !p.d_b_hh) return;
    team.run([&](const Worker& worker) {
      for_each_tile(0, block->num_rows, kBlockRows, [&](int64_t first, int64_t count) {
        add_products(first, count, is_first && first == 0, worker);
      });
    });
  }

  void advance(Progress* at) const {
    const int64_t s = p.lanes[0].steps - 1 - at->taken++;
    at->d = block->d + at->first_row * stride + p.cell.first_recurrent * p.H;
    at->first_row += everyone(p).active_at(s);
  }

  void run_steps(const std::vector<Share>& shares, Parts parts, Progress at, int64_t end) const {
    for (; at.taken < end; advance(&at)) {
      for_each_share(shares, parts, [&](const Share& mine) { take_step(mine, at); });
      for (int phase = p.cell.phases - 2; phase >= 0; --phase) {
        for_each_share(shares, parts, [&](const Share& mine) { take_phase(mine, at, phase); });
      }
    }
  }

  // The gradients of the states that lanes begin with: initial ones, and those of resets.
  void finish(const Share& mine, Progress at) const {
    multiply(
        mine, at.d, OwnValues{}, 0, mine.num_lanes, terms(p), [] {},
        [&](int64_t i) { return &mine.lane(i); },
        [&](const Lane* lane, int64_t i, int64_t panel, const scalar_t* acc) {
          const bool is_initial = lane->before == Before::kInitial;
          scalar_t* const* const to = is_initial                       ? p.d_initial
                                      : lane->before == Before::kZeros ? p.d_reset_to
                                                                       : nullptr;
          if (!to) return;
          const int64_t row = is_initial ? lane->batch : row_of_boundary(p, *lane, -1);
          const scalar_t gate = is_initial ? gate_before(p, *lane) : scalar_t(1);
          for_each_unit_vec(w_hh, panel, [&](int64_t v, int64_t unit, auto count) {
            for (int k = 0; k < p.cell.states; ++k) {
              if (!to[k]) continue;
              V d = load(carry + (mine.index(i) * p.cell.states + k) * carry_stride + unit);
              if (k == p.cell.recurrent) d += load(acc + v * W);
              if (p.clip_grad > 0) d = clipped(d, p.clip_grad);
              store_first(to[k] + row * p.H + unit, through(gate, d), count);
            }
          });
        });
  }

 private:
  using Row = UserBackwardRow<scalar_t>;

  // Adds up a block's gradients of extras, for a share of the units.
  void add_extras(bool is_first, const Worker& worker) const {
    const Range units = share(p.H, worker.id, worker.count);
    const int64_t size = p.cell.extras * carry_stride, count = p.threads * lane_blocks();
    for (int k = 0; k < p.cell.extras; ++k) {
      scalar_t* const to = p.d_extras[k];
      if (!to || p.extras[k].row_stride != 0) continue;
      if (is_first) std::fill(to + units.begin, to + units.end, scalar_t(0));
      for (int64_t i = 0; i < count; ++i) {
        scalar_t* const from = extra_sums + i * size + k * carry_stride;
        for (int64_t u = units.begin; u < units.end; ++u) to[u] += from[u];
        std::fill(from + units.begin, from + units.end, scalar_t(0));
      }
    }
  }

  void add_products(int64_t first, int64_t count, bool is_first, const Worker& worker) const {
    const Range units = share(p.H, worker.id, worker.count);
    const UserShape& cell = p.cell;
    const Product product{block->d + first * stride,
                          stride,
                          count,
                          p.H,
                          !is_first,
                          max_depth,
                          packed,
                          scratch + worker.id * Product::scratch_size(max_depth)};
    if (p.d_w_ih || p.d_w_hh) product.pack(cell.columns, units);
    if (p.d_w_ih) {
      product.add(p.d_w_ih, p.I, 0, cell.gates, cell.input_order, units,
                  [&](int64_t r) { return p.input + block->rows[first + r] * p.I; });
    }
    if (p.d_w_hh) {
      product.add(
          p.d_w_hh, p.H, cell.first_recurrent, cell.gates, cell.recurrent_order, units,
          [&](int64_t r) { return entering_row(p, p, cell.recurrent, block->before[first + r]); });
    }
    if (p.d_b_ih) product.add_sums(p.d_b_ih, 0, cell.gates, cell.input_order, units);
    if (p.d_b_hh) {
      product.add_sums(p.d_b_hh, cell.first_recurrent, cell.gates, cell.recurrent_order, units);
    }
  }

  Row row_of(const Share& mine, int64_t i, Progress at, int phase) const {
    const int64_t s = p.lanes[0].steps - 1 - at.taken, index = mine.index(i);
    const Lane& lane = mine.lane(i);
    const int64_t row = row_at(p, lane, s);
    if (p.cell.norms > 0) norms.find_gradients(mine, i, phase, row_of_norms(p, row));
    return {row,
            user_row_before(p, lane, s),
            p.d_reset_to && is_reset_after(p, lane, s) ? row_of_boundary(p, lane, s) : -1,
            gate_after(p, lane, s),
            s + 1 == lane.steps,
            ends_sequence(lane, s) ? lane.batch : -1,
            carry + index * p.cell.states * carry_stride,
            carry_stride,
            block->d + (at.first_row + index) * stride,
            extra_sums +
                (mine.batch_part * lane_blocks() + i / kBlockRows) * p.cell.extras * carry_stride,
            norms.of(mine, i, phase)};
  }

  // fn(row, i, panel, acc) for some lanes, given what row_of says of each.
  template <typename Await, typename RowOf, typename Fn>
  void multiply(const Share& mine, const scalar_t* d, const OwnValues& own, int64_t begin,
                int64_t end, int64_t K, Await&& await, RowOf&& row_of, Fn&& fn) const {
    const scalar_t* const first_d = K > 0 && begin < end ? d + mine.first_lane * stride : d;
    for_each_row_group<decltype(row_of(0))>(
        begin, end, row_of, [&](int64_t first, int64_t last, const auto* rows) {
          step_tiles(mine.panels, w_hh, K, first_d, stride * mine.lane_step, own, first, last,
                     await, [&](int64_t i, int64_t panel, const scalar_t* acc) {
                       fn(rows[i - first], i, panel, acc);
                     });
        });
  }

  void take_step(const Share& mine, Progress at) const {
    const int64_t s = p.lanes[0].steps - 1 - at.taken;
    const int64_t entered = mine.active_at(s + 1), active = mine.active_at(s);
    const int phase = p.cell.phases - 1;
    norms.clear(mine, active);
    const auto run = [&](int64_t begin, int64_t end, int64_t K) {
      multiply(
          mine, at.d, own_values(w_hh, mine.panels, p.cell.gates), begin, end, K,
          [&] { mine.group.await(); }, [&](int64_t i) { return row_of(mine, i, at, phase); },
          [&](const Row& row, int64_t, int64_t panel, const scalar_t* acc) {
            const auto [begin, end] = units_of(w_hh, panel);
            p.run(p, row, begin, end, acc);
          });
    };
    run(0, entered, terms(p));
    if (entered < active) run(entered, active, 0);
    norms.add_up_sums(mine, phase, active);
    mine.group.arrive();
  }

  // The derivative of a phase before the last one, which takes the product.
  void take_phase(const Share& mine, Progress at, int phase) const {
    const int64_t active = mine.active_at(p.lanes[0].steps - 1 - at.taken);
    const Range own = own_values(w_hh, mine.panels, 1).made;
    mine.group.await();
    norms.clear(mine, active);
    for (int64_t i = 0; i < active; ++i) {
      p.run(p, row_of(mine, i, at, phase), own.begin, own.end, nullptr);
    }
    norms.add_up_sums(mine, phase, active);
    mine.group.arrive();
  }
};

}  // namespace
}  // namespace fastbptt
