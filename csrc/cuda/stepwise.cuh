// The stepwise kernels: what is between the library's products, for any size and dtype.
//
//   forward   rec = h W_hh^T (library), forward_step; with a projection h = W_hr h (library),
//             project_step
//   backward  dh = d W_hh (library), [project_back, dh = dh W_hr (library),] backward_step
//
// A thread takes one unit of one row, units fastest: a warp reads and writes neighbours. There is
// nothing to share between threads, and each value is read and written once, so a step's kernel is
// bound by memory where rows are many (about (2G + 2S) H values a row), and by the launch, some
// microseconds, where they are few. The library's product, which reads W_hh again at every step,
// takes longer than either: that is what kernels which keep W_hh on the chip are for.
//
// What a thread carries from step to step it alone reads and writes, so one buffer does.
#pragma once

#include "cuda/device.cuh"
#include "cuda/scalar.cuh"
#include "cuda/stepwise.h"

namespace fastbptt {
namespace {

constexpr int kTileUnits = kWarp;  // of a block: one warp's
constexpr int kTileRows = kStepThreads / kTileUnits;

// Calls fn(row, unit) for those of [0, rows) x [0, units) that are the thread's.
template <typename Fn>
__device__ __forceinline__ void for_each_unit(int64_t rows, int64_t units, Fn&& fn) {
  const int64_t unit = int64_t(blockIdx.x) * kTileUnits + threadIdx.x % kTileUnits;
  if (unit >= units) return;
  const int64_t stride = int64_t(gridDim.y) * kTileRows;
  for (int64_t row = int64_t(blockIdx.y) * kTileRows + threadIdx.x / kTileUnits; row < rows;
       row += stride) {
    fn(row, unit);
  }
}

template <typename scalar_t>
__device__ __forceinline__ Accumulator<scalar_t> load_or_zero(const scalar_t* from, int64_t i) {
  return from ? to_acc(from[i]) : Accumulator<scalar_t>(0);
}

// A closed gate stops infinity and NaN too.
template <typename acc_t>
__device__ __forceinline__ acc_t through(acc_t gate, acc_t x) {
  return gate == 0 ? acc_t(0) : x * gate;
}

// --- Forward -------------------------------------------------------------------------------------

// The states that enter each sequence's first step.
template <typename scalar_t>
__global__ void __launch_bounds__(kStepThreads)
    initial_states_kernel(FwdRecurrence<scalar_t> p, FwdScratch<scalar_t> s) {
  const int64_t B = p.sequences.layout.B, widest = p.H > p.R ? p.H : p.R;
  for_each_unit(B, widest, [&](int64_t b, int64_t unit) {
    const Sequences& seq = p.sequences;
    const int64_t first = seq.direction > 0 ? 0 : seq.length(b) - 1;
    const bool is_given = seq.row_before(first, b) != kNoRow;
    if (unit < p.R) {
      const auto h = load_or_zero(is_given ? p.hx : nullptr, b * p.R + unit);
      s.h[b * p.R + unit] = from_acc<scalar_t>(h);
      if (s.carried_h) s.carried_h[b * p.R + unit] = h;
    }
    if (s.c && unit < p.H) {
      s.c[b * p.H + unit] = load_or_zero(is_given ? p.cx : nullptr, b * p.H + unit);
    }
  });
}

// Stores a step's state, and what of it enters the next step.
template <typename scalar_t>
__device__ __forceinline__ void store_state(const FwdRecurrence<scalar_t>& p,
                                            const FwdScratch<scalar_t>& s, int64_t row, int64_t b,
                                            int64_t unit, bool ends, bool is_reset,
                                            Accumulator<scalar_t> h) {
  const int64_t i = b * p.R + unit;
  p.output[row * p.ld_out + unit] = from_acc<scalar_t>(h);
  if (ends) p.h_n[i] = from_acc<scalar_t>(h);
  s.h[i] = from_acc<scalar_t>(is_reset ? 0 : h);
  if (s.carried_h) s.carried_h[i] = is_reset ? 0 : h;
}

// The cell at step t of the first `rows` sequences.
template <typename Cell, typename scalar_t>
__global__ void __launch_bounds__(kStepThreads)
    forward_step_kernel(FwdRecurrence<scalar_t> p, FwdScratch<scalar_t> s, int64_t t,
                        int64_t rows) {
  using acc_t = Accumulator<scalar_t>;
  constexpr int G = Cell::kGates;
  for_each_unit(rows, p.H, [&](int64_t b, int64_t unit) {
    const int64_t H = p.H, row = p.sequences.layout.row(t, b);
    const bool ends = p.sequences.ends(t, b);
    const bool is_reset = !ends && p.sequences.is_reset_after(t, b);
    acc_t in[G], rec[G], saved[Cell::kSaved + 1], h;
    FASTBPTT_UNROLL
    for (int g = 0; g < G; ++g) {
      const int64_t column = g * H + unit;
      in[g] = to_acc(p.pre[row * p.ld_pre + column]) + load_or_zero(p.b_ih, column);
      rec[g] = load_or_zero(s.rec, b * G * H + column) + load_or_zero(p.b_hh, column);
    }
    if constexpr (Cell::kHasCellState) {
      acc_t c = s.c[b * H + unit];
      h = Cell::forward(in, rec, c, saved, &c);
      p.c[row * H + unit] = from_acc<scalar_t>(c);
      if (ends) p.c_n[b * H + unit] = from_acc<scalar_t>(c);
      s.c[b * H + unit] = is_reset ? 0 : c;
    } else {
      const acc_t before = Cell::kHasCarry ? s.carried_h[b * H + unit] : acc_t(0);
      h = Cell::forward(in, rec, before, saved);
    }
    if (p.gates) {
      FASTBPTT_UNROLL
      for (int k = 0; k < Cell::kSaved; ++k) {
        p.gates[row * Cell::kSaved * H + k * H + unit] = from_acc<scalar_t>(saved[k]);
      }
    }
    if (s.unprojected) {
      s.unprojected[b * H + unit] = from_acc<scalar_t>(h);
    } else {
      store_state(p, s, row, b, unit, ends, is_reset, h);
    }
  });
}

// The same step's projected state.
template <typename scalar_t>
__global__ void __launch_bounds__(kStepThreads)
    project_step_kernel(FwdRecurrence<scalar_t> p, FwdScratch<scalar_t> s, int64_t t,
                        int64_t rows) {
  for_each_unit(rows, p.R, [&](int64_t b, int64_t unit) {
    const bool ends = p.sequences.ends(t, b);
    store_state(p, s, p.sequences.layout.row(t, b), b, unit, ends,
                !ends && p.sequences.is_reset_after(t, b), s.projected[b * p.R + unit]);
  });
}

// --- Backward ------------------------------------------------------------------------------------

// The gate between a lane's step, or its sequence's initial state, and the step after it.
template <typename scalar_t>
__device__ __forceinline__ Accumulator<scalar_t> gate_after(const BwdRecurrence<scalar_t>& p,
                                                            const LaneStep& at) {
  if (at.is_initial && p.sequences.direction < 0) return 1;  // no boundary is there
  const int64_t row = p.sequences.boundary_after(at.t, at.b);
  if (p.sequences.resets && p.sequences.resets[row]) return 0;
  return p.kappa ? to_acc(p.kappa[row]) : Accumulator<scalar_t>(1);
}

// What the losses add to the gradient of a step's state.
template <typename scalar_t>
__device__ __forceinline__ Accumulator<scalar_t> loss_gradient(const BwdRecurrence<scalar_t>& p,
                                                               const LaneStep& at, int64_t k,
                                                               int64_t lane, int64_t unit) {
  Accumulator<scalar_t> sum = 0;
  if (p.d_lanes) {
    sum = to_acc(p.d_lanes[(k * p.num_lanes() + lane) * p.R + unit]);
  } else if (p.d_output && at.has_loss) {
    sum = to_acc(p.d_output[p.sequences.layout.row(at.t, at.b) * p.ld_out + unit]);
  }
  if (p.d_h_n && p.sequences.ends(at.t, at.b)) sum += to_acc(p.d_h_n[at.b * p.R + unit]);
  return sum;
}

template <typename scalar_t>
__device__ __forceinline__ void store_row(const StepRows<scalar_t>& to, int64_t i,
                                          Accumulator<scalar_t> value) {
  if (to.sums) {
    to.sums[i] += value;
  } else {
    to.rows[i] = from_acc<scalar_t>(value);
  }
}

// The gradient of the projected state at lockstep k of the first `lanes` lanes.
template <typename scalar_t>
__global__ void __launch_bounds__(kStepThreads)
    project_back_kernel(BwdRecurrence<scalar_t> p, BwdScratch<scalar_t> s, int64_t k,
                        int64_t lanes) {
  using acc_t = Accumulator<scalar_t>;
  for_each_unit(lanes, p.R, [&](int64_t lane, int64_t unit) {
    const LaneStep at = p.windows.at(p.sequences, k, lane);
    acc_t dh = 0;
    if (k > 0 && (at.exists || at.is_initial)) {
      dh = through(gate_after(p, at), s.from_after[lane * p.R + unit]);
    }
    if (at.is_initial && p.d_hx) p.d_hx[at.b * p.R + unit] += dh;
    if (at.exists) {
      dh += loss_gradient(p, at, k, lane, unit);
      store_row(p.d_projected, p.span_row(at.t, at.b) * p.R + unit, dh);
    }
    s.d_projected[lane * p.R + unit] = from_acc<scalar_t>(at.exists ? dh : 0);
  });
}

// The cell's derivative at lockstep k of the first `lanes` lanes; behind a step there are their
// initial states.
template <typename Cell, typename scalar_t>
__global__ void __launch_bounds__(kStepThreads)
    backward_step_kernel(BwdRecurrence<scalar_t> p, BwdScratch<scalar_t> s, int64_t k,
                         int64_t lanes) {
  using acc_t = Accumulator<scalar_t>;
  for_each_unit(lanes, p.H, [&](int64_t lane, int64_t unit) {
    const int64_t H = p.H;
    const LaneStep at = p.windows.at(p.sequences, k, lane);
    acc_t d[Cell::kColumns] = {};
    if (at.exists || at.is_initial) {
      // What comes from the step after, through the gate: the gradient dh of the state, and `carry`.
      const acc_t gate = k > 0 ? gate_after(p, at) : acc_t(0);
      acc_t dh = 0, carry = 0;
      if (k > 0) {
        if (!p.w_hr) dh = through(gate, s.from_after[lane * H + unit]);
        if (Cell::kHasCarry) carry = through(gate, s.carry[lane * H + unit]);
      }
      if (Cell::kHasCarry && !Cell::kHasCellState) dh += carry;
      if (at.is_initial) {
        if (p.d_hx && !p.w_hr) p.d_hx[at.b * H + unit] += dh;
        if (Cell::kHasCellState && p.d_cx) p.d_cx[at.b * H + unit] += carry;
      } else {
        dh += p.w_hr ? s.from_projection[lane * H + unit] : loss_gradient(p, at, k, lane, unit);
        const int64_t row = p.sequences.layout.row(at.t, at.b), span_row = p.span_row(at.t, at.b);
        if constexpr (Cell::kSaved == 0) {
          Cell::backward(dh, to_acc(p.output[row * p.ld_out + unit]), d);
        } else {
          const scalar_t* gates = p.gates + (p.gates_of_span ? span_row : row) * Cell::kSaved * H;
          const int64_t before_row = p.sequences.row_before(at.t, at.b);
          acc_t saved[Cell::kSaved], to_before;
          FASTBPTT_UNROLL
          for (int i = 0; i < Cell::kSaved; ++i) saved[i] = to_acc(gates[i * H + unit]);
          if constexpr (Cell::kHasCellState) {
            if (p.d_c_n && p.sequences.ends(at.t, at.b)) carry = to_acc(p.d_c_n[at.b * H + unit]);
            const acc_t c = to_acc(p.c[row * H + unit]);
            const acc_t before = load_or_zero(state_row(p.c, H, p.cx, H, before_row), unit);
            Cell::backward(dh, carry, saved, before, c, d, &to_before);
            if (p.unprojected) {
              p.unprojected[span_row * H + unit] = from_acc<scalar_t>(saved[3] * tanh(c));
            }
          } else {
            const acc_t before =
                load_or_zero(state_row(p.output, p.ld_out, p.hx, H, before_row), unit);
            Cell::backward(dh, saved, before, d, &to_before);
          }
          s.carry[lane * H + unit] = to_before;
        }
        FASTBPTT_UNROLL
        for (int i = 0; i < Cell::kColumns; ++i) {
          store_row(p.d, (span_row * Cell::kColumns + i) * H + unit, d[i]);
        }
      }
    }
    if (!s.d) return;  // no step is left, only initial states
    FASTBPTT_UNROLL
    for (int i = 0; i < Cell::kColumns; ++i) {
      s.d[(lane * Cell::kColumns + i) * H + unit] = from_acc<scalar_t>(d[i]);
    }
  });
}

// --- Around the recurrence -----------------------------------------------------------------------

// The activations of each row over again, in place of pre: as in the forward pass, but for all
// steps at once.
template <typename Cell, typename scalar_t>
__global__ void __launch_bounds__(kStepThreads)
    recompute_kernel(scalar_t* gates, const Accumulator<scalar_t>* rec, const scalar_t* b_ih,
                     const scalar_t* b_hh, int64_t rows, int64_t H) {
  using acc_t = Accumulator<scalar_t>;
  constexpr int G = Cell::kGates;
  for_each_unit(rows, H, [&](int64_t row, int64_t unit) {
    scalar_t* const at = gates + row * Cell::kSaved * H + unit;
    acc_t in[G], recurrent[G], saved[Cell::kSaved], c;
    FASTBPTT_UNROLL
    for (int g = 0; g < G; ++g) {
      in[g] = to_acc(at[g * H]) + load_or_zero(b_ih, g * H + unit);
      recurrent[g] = rec[(row * G + g) * H + unit] + load_or_zero(b_hh, g * H + unit);
    }
    if constexpr (Cell::kHasCellState) {
      Cell::forward(in, recurrent, acc_t(0), saved, &c);
    } else {
      Cell::forward(in, recurrent, acc_t(0), saved);
    }
    FASTBPTT_UNROLL
    for (int k = 0; k < Cell::kSaved; ++k) at[k * H] = from_acc<scalar_t>(saved[k]);
  });
}

// For each step of the span the state before it, [span, R].
template <typename scalar_t>
__global__ void __launch_bounds__(kStepThreads)
    states_before_kernel(BwdRecurrence<scalar_t> p, scalar_t* states, int64_t steps) {
  const int64_t B = p.sequences.layout.B;
  for_each_unit(steps * B, p.R, [&](int64_t i, int64_t unit) {
    const int64_t t = p.begin + i / B, b = i % B;
    if (t >= p.sequences.length(b)) return;
    const scalar_t* from = state_row(p.output, p.ld_out, p.hx, p.R, p.sequences.row_before(t, b));
    states[p.span_row(t, b) * p.R + unit] = from ? from[unit] : from_acc<scalar_t>(0);
  });
}

// Multiplies by-lane rows of d_input, [steps, lanes, I], by their steps' factors, [N, I].
template <typename scalar_t>
__global__ void __launch_bounds__(kStepThreads)
    mask_lanes_kernel(BwdRecurrence<scalar_t> p, const scalar_t* mask, scalar_t* d_input,
                      int64_t I) {
  const int64_t lanes = p.num_lanes();
  for_each_unit(p.steps * lanes, I, [&](int64_t i, int64_t unit) {
    const LaneStep at = p.windows.at(p.sequences, i / lanes, i % lanes);
    if (!at.exists) return;
    scalar_t* const to = d_input + i * I + unit;
    const int64_t row = p.sequences.layout.row(at.t, at.b);
    *to = from_acc<scalar_t>(to_acc(*to) * to_acc(mask[row * I + unit]));
  });
}

}  // namespace
}  // namespace fastbptt
