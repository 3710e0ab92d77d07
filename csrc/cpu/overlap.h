// The sum over overlapping lanes of what the backward pass's recurrence gives for each step.
#pragma once

#include "cpu/blocks.h"

namespace fastbptt {
namespace {

// Several lanes may begin at one initial state: its gradient, to [B, columns], is the sum of what
// they have, from [num_lanes, ld]. For a share of the sequences; `sums` [B, ld] is scratch.
template <typename scalar_t, typename acc_t>
void add_initial_states(const BwdParams<scalar_t>& p, scalar_t* to, int64_t columns,
                        const acc_t* from, int64_t ld, acc_t* sums, const Worker& worker) {
  const Range mine = share(p.layout.B, worker.id, worker.count);
  for (int64_t i = mine.begin * ld; i < mine.end * ld; ++i) sums[i] = 0;
  for (int64_t i = 0; i < p.num_lanes; ++i) {
    const Lane& lane = p.lanes[i];
    if (lane.before != Before::kInitial) continue;
    if (lane.batch < mine.begin || lane.batch >= mine.end) continue;
    acc_t* row = sums + lane.batch * ld;
    for (int64_t n = 0; n < columns; ++n) row[n] += from[i * ld + n];
  }
  for (int64_t b = mine.begin; b < mine.end; ++b) {
    convert(to + b * columns, sums + b * ld, {0, columns});
  }
}

// A row for each step t of [begin, end) of each sequence, in the order of d_input. Memory beyond
// what a sequence has stays zero.
template <typename scalar_t>
struct OverlapSum {
  using acc_t = Accumulator<scalar_t>;

  Block<acc_t> all{};
  bool projected = false;
  int64_t stride, projected_stride, wide_stride;
  Layout layout;  // of the rows: that of the whole batch, cut to the steps

  static constexpr int W = kLanes<scalar_t>;

  OverlapSum() = default;
  OverlapSum(const BwdParams<scalar_t>& p, Arena* arena, int64_t stride, int64_t projected_stride,
             int64_t wide_stride)
      : projected(p.w_hr),
        stride(stride),
        projected_stride(projected_stride),
        wide_stride(wide_stride),
        layout(p.layout) {
    layout.T = p.end - p.begin;
    if (layout.batch_stride > 1) layout.batch_stride = layout.T;  // batch_first
    all.num_rows =
        layout.offsets ? layout.offsets[p.end] - layout.offsets[p.begin] : layout.T * layout.B;
    all.d = arena->take<acc_t>(all.num_rows * stride);
    all.d_projected = arena->take<acc_t>(projected ? all.num_rows * projected_stride : 0);
    all.unprojected = arena->take<acc_t>(projected ? all.num_rows * wide_stride : 0);
    all.rows = arena->take<int64_t>(all.num_rows);
    all.before = arena->take<int64_t>(all.num_rows);
    all.sum_rows = arena->take<int64_t>(all.num_rows);
  }

  int64_t row(const BwdParams<scalar_t>& p, int64_t t, int64_t b) const {
    return layout.offsets ? layout.row(t, b) - layout.offsets[p.begin] : layout.row(t - p.begin, b);
  }

  // Fills a share of the rows with zeros. A step that is in no lane has no gradient, and so needs no
  // state before it.
  void clear(const BwdParams<scalar_t>& p, const Worker& worker) const {
    const Range mine = share(all.num_rows, worker.id, worker.count);
    const auto zero = [&](acc_t* from, int64_t ld) {
      for (int64_t i = mine.begin * ld; i < mine.end * ld; i += W) store(from + i, Vec<scalar_t>{});
    };
    zero(all.d, stride);
    if (projected) {
      zero(all.d_projected, projected_stride);
      zero(all.unprojected, wide_stride);
    }
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      all.before[r] = kNoRow;
      all.sum_rows[r] = r;
    }
    if (worker.id > 0) return;
    for (int64_t t = p.begin; t < p.end; ++t) {
      const int64_t sequences = layout.offsets ? layout.batch_sizes[t] : layout.B;
      for (int64_t b = 0; b < sequences; ++b) {
        all.rows[row(p, t, b)] = p.layout.row(t, b);
      }
    }
  }

  // Adds a block, for a share of its columns: so no two threads add to one number, and the order of
  // the sum is that of the block.
  void add(const Block<acc_t>& block, const Worker& worker) const {
    const auto share_of = [&](int64_t ld) {
      const Range vecs = share(ld / W, worker.id, worker.count);
      return Range{vecs.begin * W, vecs.end * W};
    };
    const auto add_rows = [&](acc_t* to, const acc_t* from, int64_t ld, bool keep_last) {
      const Range columns = share_of(ld);
      for (int64_t r = 0; r < block.num_rows; ++r) {
        acc_t* to_row = to + block.sum_rows[r] * ld;
        const acc_t* from_row = from + r * ld;
        for (int64_t n = columns.begin; n < columns.end; n += W) {
          const Vec<scalar_t> x = load(from_row + n);
          store(to_row + n, keep_last ? x : load(to_row + n) + x);
        }
      }
    };
    add_rows(all.d, block.d, stride, false);
    if (projected) {
      add_rows(all.d_projected, block.d_projected, projected_stride, false);
      add_rows(all.unprojected, block.unprojected, wide_stride, true);
    }
    if (worker.id > 0) return;
    for (int64_t r = 0; r < block.num_rows; ++r) all.before[block.sum_rows[r]] = block.before[r];
  }

  // Calls fn(block, is_first) for the rows, in blocks that stay in the cache.
  template <typename Fn>
  void for_each_block(Fn&& fn) const {
    for_each_tile(0, all.num_rows, kBlockRows, [&](int64_t first, int64_t count) {
      Block<acc_t> part = all;
      part.num_rows = count;
      part.d += first * stride;
      part.d_projected += first * projected_stride;
      part.unprojected += first * wide_stride;
      part.rows += first;
      part.before += first;
      part.sum_rows += first;
      fn(part, first == 0);
    });
  }
};

}  // namespace
}  // namespace fastbptt
