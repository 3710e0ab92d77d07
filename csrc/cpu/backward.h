// The backward pass of one direction, run by every thread of a team.
//
//   step by step       lambda_t = g_t + dpre_{t+1} W_hh,  dpre_t = phi'(h_t) lambda_t
//   then, all at once  dx = dpre W_ih,  dW_ih = dpre^T x,  dW_hh = dpre^T h_{t-1},  db = sum dpre
//
// It goes in blocks of steps: the recurrence fills a block of dpre, [rows, stride], which is still
// in the cache when the products read it, and dpre is never kept whole. Rows of a block are ordered
// by step, last step first, then by lane. Two blocks take turns, since the first step of one reads
// the last step of the other.
#pragma once

#include "cpu/schedule.h"

namespace fastbptt {
namespace {

// A block has about this many rows, but always whole steps: enough that adding its part to dW costs
// little against computing it.
constexpr int64_t kBlockRows = 256;

template <typename scalar_t>
struct BwdBuffers {
  Packed<scalar_t> w_ih, w_hh;
  int64_t block_steps;
  int64_t stride;
  scalar_t* block[2];  // [block_steps * num_lanes, stride]
  int64_t* rows[2];    // [block_steps * num_lanes] the row of (t, b) for each row of the block
  int64_t* before[2];  // likewise of (t-1, b); -1 - b where that is hx
  scalar_t* panels;    // [threads][kBlockRows][kPanelVecs] vectors
  int64_t bytes;

  BwdBuffers(const BwdParams<scalar_t>& p, Arena arena, Split split) {
    w_ih = arena.take_packed<scalar_t>(p.H, p.d_input ? p.I : 0, 1, kPanelVecs);
    w_hh = arena.take_packed<scalar_t>(p.H, p.H, 1, panel_vecs_for<scalar_t>(p.H, 1, split));
    block_steps = min(p.lanes[0].steps, ceil_div(kBlockRows, p.num_lanes));
    stride = padded_stride<scalar_t>(p.H);
    const int64_t block_rows = block_steps * p.num_lanes;
    for (int i = 0; i < 2; ++i) {
      block[i] = arena.take<scalar_t>(block_rows * stride);
      rows[i] = arena.take<int64_t>(block_rows);
      before[i] = arena.take<int64_t>(block_rows);
    }
    panels = arena.take<scalar_t>(p.threads * panel_size());
    bytes = arena.used;
  }
  static constexpr int64_t panel_size() { return kBlockRows * kPanelVecs * kLanes<scalar_t>; }
};

template <typename scalar_t>
int64_t backward_workspace(const BwdParams<scalar_t>& p) {
  return BwdBuffers<scalar_t>(p, Arena{nullptr}, {1, 1}).bytes;
}

// Where a thread stands in the recurrence between two blocks.
template <typename scalar_t>
struct Progress {
  int64_t entered;           // the group's lanes that have taken their last step
  const scalar_t* previous;  // their dpre of the step just taken
};

// Runs the recurrence over the steps [begin, end), last first, for the thread's lanes and units.
template <typename Phi, typename scalar_t>
void backward_steps(const BwdParams<scalar_t>& p, const BwdBuffers<scalar_t>& buffers,
                    const Share& mine, int64_t begin, int64_t end, scalar_t* block,
                    Progress<scalar_t>* progress) {
  constexpr int W = kLanes<scalar_t>;
  const Packed<scalar_t>& w_hh = buffers.w_hh;
  const int64_t stride = buffers.stride * mine.lane_step;
  const Share all{p.lanes, 0, 1, p.num_lanes, {}, {}, false};
  int64_t active_of_all = 0;
  for (int64_t s = end - 1; s >= begin; --s) {
    scalar_t* current = block + mine.first_lane * buffers.stride;
    const auto finish_row = [&](int64_t i, int64_t panel, const scalar_t* acc) {
      const Lane& lane = mine.lane(i);
      const int64_t row = row_of(p.layout, lane.first + p.direction * s, lane.batch);
      const scalar_t* h = p.output + row * p.ld_out;
      const scalar_t* d_h = p.d_output ? p.d_output + row * p.ld_out : nullptr;
      const bool ends = s + 1 == lane.steps && lane.to_end;
      const scalar_t* d_h_n = ends && p.d_h_n ? p.d_h_n + lane.batch * p.H : nullptr;
      scalar_t* d_pre = current + i * stride;
      for_each_unit_vec(w_hh, panel, [&](int64_t v, int64_t unit, int64_t count) {
        auto lambda = load(acc + v * W);
        if (d_h) lambda += load_first(d_h + unit, count);
        if (d_h_n) lambda += load_first(d_h_n + unit, count);
        store(d_pre + unit, lambda * Phi::derivative(load_first(h + unit, count)));
      });
    };
    const int64_t active = mine.extend_active(progress->entered, s);
    step_tiles(mine.panels, w_hh, p.H, progress->previous, stride, 0, progress->entered,
               finish_row);
    step_tiles(mine.panels, w_hh, 0, progress->previous, stride, progress->entered, active,
               finish_row);
    *progress = {active, current};
    active_of_all = all.extend_active(active_of_all, s);
    block += active_of_all * buffers.stride;
    mine.group.wait();
  }
}

// What the recurrence carries beyond the first step of a sequence.
template <typename scalar_t>
void finish_d_hx(const BwdParams<scalar_t>& p, const BwdBuffers<scalar_t>& buffers,
                 const Share& mine, const scalar_t* first_step) {
  constexpr int W = kLanes<scalar_t>;
  step_tiles(mine.panels, buffers.w_hh, p.H, first_step, buffers.stride * mine.lane_step, 0,
             mine.num_lanes, [&](int64_t i, int64_t panel, const scalar_t* acc) {
               const Lane& lane = mine.lane(i);
               if (!lane.from_start) return;
               scalar_t* d_hx = p.d_hx + lane.batch * p.H;
               for_each_unit_vec(buffers.w_hh, panel, [&](int64_t v, int64_t unit, int64_t count) {
                 store_first(d_hx + unit, load(acc + v * W), count);
               });
             });
}

// Fills in which rows a block's rows belong to, for the steps [begin, end) of the block; returns
// how many there are. Each thread of a team fills every `count`-th step.
template <typename scalar_t>
int64_t fill_rows(const BwdParams<scalar_t>& p, int64_t begin, int64_t end, int64_t* rows,
                  int64_t* before, const Worker& worker) {
  int64_t first = 0, active = 0;
  for (int64_t s = end - 1; s >= begin; --s) {
    while (active < p.num_lanes && p.lanes[active].steps > s) ++active;
    if (s % worker.count == worker.id) {
      for (int64_t i = 0; i < active; ++i) {
        const Lane& lane = p.lanes[i];
        const int64_t t = lane.first + p.direction * s;
        const bool has_before = s > 0 || !lane.from_start;
        rows[first + i] = row_of(p.layout, t, lane.batch);
        before[first + i] =
            has_before ? row_of(p.layout, t - p.direction, lane.batch) : -1 - lane.batch;
      }
    }
    first += active;
  }
  return first;
}

// dw[m][n] (+)= sum over the block's rows r of d_pre[r][m] row_at(r)[n], for the gate rows m in
// `gates`; a null row is zero.
template <typename scalar_t, typename RowAt>
void add_outer_products(const scalar_t* d_pre, int64_t stride, int64_t num_rows, RowAt&& row_at,
                        int64_t columns, Range gates, bool accumulate, scalar_t* panel,
                        scalar_t* dw) {
  constexpr int W = kLanes<scalar_t>;
  const Packed<scalar_t> shape{panel, kBlockRows, columns, 1, kPanelVecs};
  alignas(64) char storage[kMaxTile];
  scalar_t* acc = reinterpret_cast<scalar_t*>(storage);
  for_each_tile(0, num_rows, kBlockRows, [&](int64_t first, int64_t depth) {
    for (int64_t q = 0; q < shape.panels(); ++q) {
      const int64_t vecs = shape.vecs_in(q);
      for (int64_t k = 0; k < depth; ++k) {
        const scalar_t* row = row_at(first + k);
        for_each_unit_vec(shape, q, [&](int64_t v, int64_t column, int64_t count) {
          store(panel + (k * vecs + v) * W,
                row ? load_first(row + column, count) : Vec<scalar_t>{});
        });
      }
      for_each_tile(gates.begin, gates.end, tile_rows(vecs), [&](int64_t m, int64_t height) {
        run_tile<scalar_t, Left::kByColumn>(height, vecs, d_pre + first * stride + m, stride,
                                            panel, depth, acc);
        for (int64_t i = 0; i < height; ++i) {
          scalar_t* to = dw + (m + i) * columns;
          for_each_unit_vec(shape, q, [&](int64_t v, int64_t column, int64_t count) {
            auto sum = load(acc + (i * vecs + v) * W);
            if (accumulate || first > 0) sum += load_first(to + column, count);
            store_first(to + column, sum, count);
          });
        }
      });
    }
  });
}

// d_bias[m] (+)= sum over the block's rows of d_pre[r][m].
template <typename scalar_t>
void add_rows(const scalar_t* d_pre, int64_t stride, int64_t num_rows, Range gates,
              bool accumulate, scalar_t* d_bias) {
  constexpr int W = kLanes<scalar_t>;
  for (int64_t m = gates.begin; m < gates.end; m += W) {
    const int64_t count = min(W, gates.end - m);
    Vec<scalar_t> sum{};
    for (int64_t r = 0; r < num_rows; ++r) sum += load(d_pre + r * stride + m);
    if (accumulate) sum += load_first(d_bias + m, count);
    store_first(d_bias + m, sum, count);
  }
}

template <typename Phi, typename scalar_t>
void backward(const BwdParams<scalar_t>& p, const Worker& worker) {
  const Split split = split_for(p, p.H, 1, worker);
  const BwdBuffers<scalar_t> buffers(p, Arena{static_cast<char*>(p.workspace)}, split);
  const Range ih = share(buffers.w_ih.panels(), worker.id, worker.count);
  const Range hh = share(buffers.w_hh.panels(), worker.id, worker.count);
  pack_direct(buffers.w_ih, p.w_ih, ih.begin, ih.end);
  pack_direct(buffers.w_hh, p.w_hh, hh.begin, hh.end);
  worker.everyone.wait();

  const Share mine = share_of(p, buffers.w_hh, split, worker);
  const Range gates = share(p.H, worker.id, worker.count);
  scalar_t* panel = buffers.panels + worker.id * buffers.panel_size();
  Progress<scalar_t> progress{0, buffers.block[0]};
  const int64_t steps = p.lanes[0].steps;
  for (int64_t end = steps, turn = 0; end > 0; end -= buffers.block_steps, turn ^= 1) {
    const int64_t begin = max(0, end - buffers.block_steps);
    scalar_t* block = buffers.block[turn];
    const int64_t* rows = buffers.rows[turn];
    const int64_t* before = buffers.before[turn];
    const int64_t num_rows =
        fill_rows(p, begin, end, buffers.rows[turn], buffers.before[turn], worker);
    if (!mine.idle) backward_steps<Phi>(p, buffers, mine, begin, end, block, &progress);
    worker.everyone.wait();

    if (p.d_input) {
      const Range part = share(num_rows, worker.id, worker.count);
      gemm_rows(block, buffers.stride, buffers.w_ih, part.begin, part.end,
                [&](int64_t r, int64_t column, int64_t count, Vec<scalar_t> sum) {
                  scalar_t* to = p.d_input + rows[r] * p.I + column;
                  if (p.accumulate_d_input) sum += load_first(to, count);
                  store_first(to, sum, count);
                });
    }
    if (!p.d_w_ih) continue;
    const bool accumulate = end < steps;
    add_outer_products(
        block, buffers.stride, num_rows, [&](int64_t r) { return p.input + rows[r] * p.I; }, p.I,
        gates, accumulate, panel, p.d_w_ih);
    add_outer_products(
        block, buffers.stride, num_rows,
        [&](int64_t r) {
          if (before[r] >= 0) return p.output + before[r] * p.ld_out;
          return p.hx ? p.hx + (-1 - before[r]) * p.H : nullptr;
        },
        p.H, gates, accumulate, panel, p.d_w_hh);
    if (p.d_b_ih) {
      add_rows(block, buffers.stride, num_rows, gates, accumulate, p.d_b_ih);
      // Both biases enter the same sum, so they share a gradient.
      for (int64_t m = gates.begin; m < gates.end; ++m) p.d_b_hh[m] = p.d_b_ih[m];
    }
  }
  if (p.d_hx && !mine.idle) finish_d_hx(p, buffers, mine, progress.previous);
}

}  // namespace
}  // namespace fastbptt
