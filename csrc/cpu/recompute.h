// The activations of a block of steps over again, for a backward pass that has only the states: they
// are known for all steps, so two products do what the forward pass did step by step.
#pragma once

#include "cpu/schedule.h"

namespace fastbptt {
namespace {

template <typename Cell, typename scalar_t>
struct Recomputation {
  using V = Vec<scalar_t>;
  static constexpr int W = kLanes<scalar_t>;
  static constexpr int G = Cell::kGates;

  using acc_t = Accumulator<scalar_t>;

  Packed<scalar_t> w_ih, w_hh;  // transposed, gates one after another
  RowGather<Operand<scalar_t>> inputs, states;

  Recomputation() = default;
  Recomputation(const LayerParams<scalar_t>& p, Arena* arena, int64_t rows) {
    w_ih = arena->take_packed<scalar_t>(p.I, G * p.H, 1, kPanelVecs);
    w_hh = arena->take_packed<scalar_t>(p.R, G * p.H, 1, kPanelVecs);
    inputs = RowGather<Operand<scalar_t>>(arena, rows, p.I);
    states = RowGather<Operand<scalar_t>>(arena, rows, p.R);
  }

  void pack(const LayerParams<scalar_t>& p, const Worker& worker) const {
    pack_transposed(w_ih, p.w_ih, share(w_ih.panels(), worker.id, worker.count));
    pack_transposed(w_hh, p.w_hh, share(w_hh.panels(), worker.id, worker.count));
  }

  // gates[r] for some rows, given the input row and the row of the state before it (or null).
  template <typename InputAt, typename StateAt>
  void run(const LayerParams<scalar_t>& p, Range rows, acc_t* gates, int64_t ld, InputAt&& input_at,
           StateAt&& state_at) const {
    // The last gate's recurrent part is kept apart where the cell needs it so.
    constexpr int64_t kApart = Cell::kRecurrentBias ? G - 1 : G;
    inputs.gather(rows, input_at);
    gemm_rows(inputs.rows, inputs.stride, w_ih, rows, {0, w_ih.panels()},
              [&](int64_t r, int64_t n, int64_t count, V sum) {
                if (p.b_ih) sum += load_first(p.b_ih + n, count);
                store_first(gates + r * ld + n, sum, count);
              });
    states.gather(rows, state_at);
    gemm_rows(states.rows, states.stride, w_hh, rows, {0, w_hh.panels()},
              [&](int64_t r, int64_t n, int64_t count, V sum) {
                if (p.b_hh) sum += load_first(p.b_hh + n, count);
                for (int i = 0; i < count; ++i) {
                  acc_t* to = gates + r * ld + n + i;
                  if (n + i < kApart * p.H) {
                    *to += sum[i];
                  } else {
                    to[p.H] = sum[i];
                  }
                }
              });
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      for (int64_t unit = 0; unit < p.H; unit += W) {
        const int64_t count = p.H - unit;
        acc_t* row = gates + r * ld + unit;
        V in[G], rec[G] = {}, saved[Cell::kSaved + 1];
        for (int g = 0; g < G; ++g) in[g] = load_first(row + g * p.H, count);
        if constexpr (Cell::kHasCellState) {
          V c;
          Cell::forward(in, rec, V{}, saved, &c);
        } else if constexpr (Cell::kSaved > 0) {
          rec[G - 1] = load_first(row + G * p.H, count);
          Cell::forward(in, rec, V{}, saved);
        }
        for (int k = 0; k < Cell::kSaved; ++k) store_first(row + k * p.H, saved[k], count);
      }
    }
  }
};

}  // namespace
}  // namespace fastbptt
