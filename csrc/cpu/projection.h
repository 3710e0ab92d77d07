// The input's part of the gates of a forward pass, pre = x W_ih^T, for many steps at once.
//
// It stands in memory that the pass is given, a row for each of the input's, or apart, for a block of
// steps at a time: a row of a block is that of a step and a lane, by step, then by lane. Where the rows
// of neighbouring steps lie side by side, both are made block by block, to be read while they are
// still in the cache.
#pragma once

#include "cpu/schedule.h"

namespace fastbptt {
namespace {

template <typename scalar_t>
struct InputProjection {
  using acc_t = Accumulator<scalar_t>;
  using operand_t = Operand<scalar_t>;

  const LayerParams<scalar_t>& p;
  Packed<scalar_t> w_ih;
  bool in_blocks;
  acc_t* pre;  // [N, ld], or of a block [its rows, ld]
  int64_t ld;
  RowGather<operand_t> inputs;

  // Of `columns` columns; `given`, [N, ld_given], is where they are to stand, or null: apart.
  InputProjection(const LayerParams<scalar_t>& params, Arena* arena, int64_t columns, acc_t* given,
                  int64_t ld_given)
      : p(params), in_blocks(!given), pre(given), ld(ld_given) {
    w_ih = Packed<scalar_t>{nullptr, p.I, columns, 1, kPanelVecs, p.w_ih};
    if (is_worth_packing(p.layout.N, p.I, true)) {
      w_ih = arena->take_packed<scalar_t>(p.I, columns, 1, kPanelVecs);
    }
    if (!in_blocks) return;
    ld = padded_stride<scalar_t>(columns);
    pre = arena->take<acc_t>(max_block_rows(p) * ld);
    inputs = RowGather<operand_t>(arena, max_block_rows(p), p.I);
  }

  void pack(const Worker& worker) const {
    if (w_ih.unpacked) return;
    pack_transposed(w_ih, p.w_ih, share(w_ih.panels(), worker.id, worker.count));
  }

  // Whether the rows of neighbouring steps lie side by side.
  bool has_rows_in_order() const {
    const bool by_time = p.layout.B == 1 || p.layout.batch_stride == 1;
    return by_time && !p.resets && (!p.layout.offsets || p.direction > 0);
  }

  // Whether `pre` may be made for some steps at a time.
  bool goes_in_pieces() const { return in_blocks || has_rows_in_order(); }

  // The last step of the block that begins with `begin`.
  int64_t block_end(int64_t begin) const {
    if (!goes_in_pieces()) return p.lanes[0].steps;
    const Share all = everyone(p);
    int64_t end = begin, rows = 0;
    while (end < p.lanes[0].steps && rows < kBlockRows) rows += all.active_at(end++);
    return end;
  }

  // That of a step's first lane, given how many rows of its block come before it.
  acc_t* row(int64_t row, int64_t block_row) const {
    return pre + (in_blocks ? block_row : row) * ld;
  }

  // `pre` of the steps [begin, end): of a block, or of all.
  void run(int64_t begin, int64_t end, Team& team) const {
    const bool is_all = begin == 0 && end == p.lanes[0].steps;
    const int64_t num_rows = is_all ? lane_rows(p) : rows_of_steps(p, begin, end);
    if constexpr (!kIsRounded<scalar_t>) {
      // A block kept apart has its rows in the order of steps.
      if (!in_blocks || (has_rows_in_order() && p.direction > 0)) {
        const int64_t first_step = p.direction > 0 ? begin : end - 1;
        const int64_t first = is_all ? 0 : row_at(p, p.lanes[0], first_step);
        acc_t* const to = in_blocks ? pre : pre + first * ld;
        return team.run([&](const Worker& worker) {
          project_rows(p.input + first * p.I, p.I, to, num_rows, worker);
        });
      }
    }
    team.run([&](const Worker& worker) { gather_input(begin, end, worker); });
    team.run([&](const Worker& worker) {
      project_rows(inputs.rows, inputs.stride, pre, num_rows, worker);
    });
  }

 private:
  // Copies a share of the inputs of a block of steps side by side.
  void gather_input(int64_t begin, int64_t end, const Worker& worker) const {
    const Share all = everyone(p);
    const Range mine = share(rows_of_steps(p, begin, end), worker.id, worker.count);
    int64_t first = 0;  // row of the step's first lane
    for (int64_t s = begin; s < end; ++s) {
      const int64_t active = all.active_at(s);
      inputs.gather({max(mine.begin, first), min(mine.end, first + active)},
                    [&](int64_t r) { return p.input + row_at(p, p.lanes[r - first], s) * p.I; });
      first += active;
    }
  }

  // A share of `pre` of a number of rows.
  void project_rows(const operand_t* from, int64_t ld_from, acc_t* to, int64_t num_rows,
                    const Worker& worker) const {
    const auto [rows, panels] = share_product(num_rows, w_ih, worker);
    gemm_into(from, ld_from, w_ih, rows, panels, to, ld);
  }
};

}  // namespace
}  // namespace fastbptt
