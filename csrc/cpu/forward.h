// The forward pass of one direction, run by every thread of a team:
//
//   pre = x W_ih^T + b for all steps at once, into the output's memory; then step by step
//   h_t = phi(pre_t + h_{t-1} W_hh^T), which overwrites pre_t.
//
// The state that a step hands to the next is kept twice: in the output, where rows lie as the
// layout says, and in a small double buffer [2][lanes][stride] that tiles read with one stride.
#pragma once

#include "cpu/schedule.h"

namespace fastbptt {
namespace {

template <typename scalar_t>
struct FwdBuffers {
  Packed<scalar_t> w_ih, w_hh;
  scalar_t* bias;      // [H], whole vectors
  scalar_t* state[2];  // [num_lanes, stride]
  int64_t stride;
  int64_t bytes;

  FwdBuffers(const FwdParams<scalar_t>& p, Arena arena, Split split) {
    stride = padded_stride<scalar_t>(p.H);
    w_ih = arena.take_packed<scalar_t>(p.I, p.H, 1, kPanelVecs);
    w_hh = arena.take_packed<scalar_t>(p.H, p.H, 1, panel_vecs_for<scalar_t>(p.H, 1, split));
    bias = arena.take<scalar_t>(stride);
    state[0] = arena.take<scalar_t>(p.num_lanes * stride);
    state[1] = arena.take<scalar_t>(p.num_lanes * stride);
    bytes = arena.used;
  }
};

template <typename scalar_t>
int64_t forward_workspace(const FwdParams<scalar_t>& p) {
  return FwdBuffers<scalar_t>(p, Arena{nullptr}, {1, 1}).bytes;
}

template <typename Phi, typename scalar_t>
void forward_steps(const FwdParams<scalar_t>& p, const FwdBuffers<scalar_t>& buffers,
                   const Share& mine) {
  constexpr int W = kLanes<scalar_t>;
  const Packed<scalar_t>& w_hh = buffers.w_hh;
  const int64_t stride = buffers.stride * mine.lane_step;
  scalar_t* state[2] = {buffers.state[0] + mine.first_lane * buffers.stride,
                        buffers.state[1] + mine.first_lane * buffers.stride};
  if (p.hx) {
    for (int64_t i = 0; i < mine.num_lanes; ++i) {
      const scalar_t* from = p.hx + mine.lane(i).batch * p.H;
      for (int64_t panel = mine.panels.begin; panel < mine.panels.end; ++panel) {
        for_each_unit_vec(w_hh, panel, [&](int64_t, int64_t unit, int64_t count) {
          store(state[0] + i * stride + unit, load_first(from + unit, count));
        });
      }
    }
    mine.group.wait();
  }
  int64_t active = mine.num_lanes;
  for (int64_t s = 0; s < mine.lane(0).steps; ++s) {
    while (mine.lane(active - 1).steps <= s) --active;
    const auto finish_row = [&](int64_t i, int64_t panel, const scalar_t* acc) {
      const Lane& lane = mine.lane(i);
      const int64_t row = row_of(p.layout, lane.first + p.direction * s, lane.batch);
      scalar_t* output = p.output + row * p.ld_out;
      scalar_t* next = state[(s + 1) % 2] + i * stride;
      scalar_t* h_n = s + 1 == lane.steps ? p.h_n + lane.batch * p.H : nullptr;
      for_each_unit_vec(w_hh, panel, [&](int64_t v, int64_t unit, int64_t count) {
        const auto h = Phi::value(load(acc + v * W) + load_first(output + unit, count));
        store(next + unit, h);
        store_first(output + unit, h, count);
        if (h_n) store_first(h_n + unit, h, count);
      });
    };
    step_tiles(mine.panels, w_hh, s > 0 || p.hx ? p.H : 0, state[s % 2], stride, 0, active,
               finish_row);
    mine.group.wait();
  }
}

template <typename Phi, typename scalar_t>
void forward(const FwdParams<scalar_t>& p, const Worker& worker) {
  const Split split = split_for(p, p.H, 1, worker);
  const FwdBuffers<scalar_t> buffers(p, Arena{static_cast<char*>(p.workspace)}, split);
  const Range ih = share(buffers.w_ih.panels(), worker.id, worker.count);
  const Range hh = share(buffers.w_hh.panels(), worker.id, worker.count);
  pack_transposed(buffers.w_ih, p.w_ih, ih.begin, ih.end);
  pack_transposed(buffers.w_hh, p.w_hh, hh.begin, hh.end);
  if (worker.id == 0) {
    for (int64_t n = 0; n < p.H; ++n) buffers.bias[n] = p.b_ih ? p.b_ih[n] + p.b_hh[n] : 0;
  }
  worker.everyone.wait();

  const Range rows = share(p.layout.N, worker.id, worker.count);
  gemm_rows(p.input, p.I, buffers.w_ih, rows.begin, rows.end,
            [&](int64_t row, int64_t unit, int64_t count, Vec<scalar_t> sum) {
              store_first(p.output + row * p.ld_out + unit, sum + load(buffers.bias + unit), count);
            });
  worker.everyone.wait();

  const Share mine = share_of(p, buffers.w_hh, split, worker);
  if (!mine.idle) forward_steps<Phi>(p, buffers, mine);
}

}  // namespace
}  // namespace fastbptt
