// The blocks of steps that a backward pass goes in, and the gates between steps.
#pragma once

#include "cpu/products.h"

namespace fastbptt {
namespace {

// What a block of rows holds, a row for each (step, lane), or in a sum over lanes for each step of
// each sequence.
template <typename acc_t>
struct Block {
  int64_t begin, end;  // steps
  int64_t num_rows;
  int64_t lane_row;    // of [M] rows that come before this block's
  acc_t* d;            // [rows, stride] columns of H as the cell orders them
  acc_t* d_projected;  // [rows, projected_stride] gradients of the projected state
  acc_t* unprojected;  // [rows, wide_stride] the state before its projection
  acc_t* gates;        // [rows, gates_stride] the activations, where they were not kept
  int64_t* rows;       // the row of (t, b)
  int64_t* before;     // the row of (t-1, b), or -1 - b where that is hx, or kNoRow
  int64_t* sum_rows;   // where lanes overlap: the row of (t, b) in their sum, and in d_input
};

// The first step of the block that ends with `end`.
template <typename scalar_t>
int64_t block_begin(const LayerParams<scalar_t>& p, int64_t end) {
  const Share all = everyone(p);
  int64_t begin = end, rows = 0;
  while (begin > 0 && rows < kBlockRows) rows += all.active_at(--begin);
  return begin;
}

// Makes a block of the steps [begin, end), after `lane_row` rows of blocks before it.
template <typename acc_t, typename scalar_t>
void start_block(const LayerParams<scalar_t>& p, Block<acc_t>* block, int64_t begin, int64_t end,
                 int64_t lane_row) {
  block->begin = begin;
  block->end = end;
  block->lane_row = lane_row;
  block->num_rows = rows_of_steps(p, begin, end);
}

// Fills in which rows the steps of a block belong to, for every `count`-th step, and calls
// fn(r, lane, s) for each.
template <typename acc_t, typename scalar_t, typename Fn>
void find_rows(const LayerParams<scalar_t>& p, const Block<acc_t>& block, const Worker& worker,
               Fn&& fn) {
  const Share all = everyone(p);
  int64_t first = 0;
  for (int64_t s = block.end - 1; s >= block.begin; --s) {
    const int64_t active = all.active_at(s);
    if (s % worker.count == worker.id) {
      for (int64_t i = 0; i < active; ++i) {
        block.rows[first + i] = row_at(p, p.lanes[i], s);
        block.before[first + i] = row_before(p, p.lanes[i], s);
        fn(first + i, p.lanes[i], s);
      }
    }
    first += active;
  }
}

// The gate on what step s + 1 of a lane hands to step s, and on what step 0 hands to the initial
// state. It belongs to the later of the two steps in time.
template <typename scalar_t>
Accumulator<scalar_t> gate_after(const BwdParams<scalar_t>& p, const Lane& lane, int64_t s) {
  if (is_reset_after(p, lane, s)) return 0;
  if (!p.kappa || s + 1 == lane.steps) return 1;
  return load_one(p.kappa + row_of_boundary(p, lane, s));
}

template <typename scalar_t>
Accumulator<scalar_t> gate_before(const BwdParams<scalar_t>& p, const Lane& lane) {
  using acc_t = Accumulator<scalar_t>;
  return p.kappa && p.direction > 0 ? load_one(p.kappa + row_at(p, lane, 0)) : acc_t(1);
}

}  // namespace
}  // namespace fastbptt
