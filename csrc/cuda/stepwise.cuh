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

#include "cuda/step.cuh"
#include "cuda/stepwise.h"
#include "cuda/units.cuh"

namespace fastbptt {
namespace {

// One thread's; see StepNumber.
__global__ void count_steps_kernel(int64_t* further, int64_t by) {
  *further = by == 0 ? 0 : *further + by;
}

// --- Forward -------------------------------------------------------------------------------------

// The states that enter each sequence's first step.
template <typename scalar_t>
__global__ void __launch_bounds__(kUnitThreads)
    initial_states_kernel(FwdRecurrence<scalar_t> p, FwdScratch<scalar_t> s) {
  const int64_t B = p.sequences.layout.B, widest = p.H > p.R ? p.H : p.R;
  for_each_unit(B, widest, [&](int64_t b, int64_t unit) {
    const bool is_given = has_initial_state(p.sequences, b);
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

// The recurrence's steps are counted from its first, which in the reverse direction is the last in time.
__device__ __forceinline__ int64_t time_of(const Sequences& sequences, StepNumber step) {
  return sequences.direction > 0 ? step.get() : sequences.layout.T - 1 - step.get();
}

// Stores a step's state, and what of it enters the next step.
template <typename scalar_t>
__device__ __forceinline__ void store_state(const FwdRecurrence<scalar_t>& p,
                                            const FwdScratch<scalar_t>& s, const FwdPlace& place,
                                            int64_t b, int64_t unit, Accumulator<scalar_t> h) {
  const int64_t i = b * p.R + unit;
  store_output(p, place, b, unit, h);
  s.h[i] = from_acc<scalar_t>(place.is_reset ? 0 : h);
  if (s.carried_h) s.carried_h[i] = place.is_reset ? 0 : h;
}

// The cell at a step of the first `rows` sequences.
template <typename Cell, typename scalar_t>
__global__ void __launch_bounds__(kUnitThreads)
    forward_step_kernel(FwdRecurrence<scalar_t> p, FwdScratch<scalar_t> s, StepNumber step,
                        int64_t rows) {
  using Step = FwdStep<Cell, scalar_t>;
  using acc_t = Accumulator<scalar_t>;
  constexpr int G = Cell::kGates;
  const int64_t t = time_of(p.sequences, step);
  for_each_unit(rows, p.H, [&](int64_t b, int64_t unit) {
    const FwdPlace place = fwd_place(p.sequences, t, b);
    const int64_t i = b * p.H + unit;
    acc_t rec[G], before = 0;
    FASTBPTT_UNROLL
    for (int g = 0; g < G; ++g) {
      rec[g] = load_or_zero(s.rec, (b * G + g) * p.H + unit) + Step::recurrent_bias(p, g, unit);
    }
    if constexpr (Cell::kHasCarry) before = Cell::kHasCellState ? s.c[i] : s.carried_h[i];
    const auto inputs = Step::load(p, place, unit);
    const auto values = Step::compute(inputs, Step::input_bias(p, unit), rec, before);
    Step::store(p, place, b, unit, values);
    if constexpr (Cell::kHasCellState) s.c[i] = place.is_reset ? 0 : values.c;
    if (s.unprojected) {
      s.unprojected[i] = from_acc<scalar_t>(values.h);
    } else {
      store_state(p, s, place, b, unit, values.h);
    }
  });
}

// The same step's projected state.
template <typename scalar_t>
__global__ void __launch_bounds__(kUnitThreads)
    project_step_kernel(FwdRecurrence<scalar_t> p, FwdScratch<scalar_t> s, StepNumber step,
                        int64_t rows) {
  const int64_t t = time_of(p.sequences, step);
  for_each_unit(rows, p.R, [&](int64_t b, int64_t unit) {
    store_state(p, s, fwd_place(p.sequences, t, b), b, unit, s.projected[b * p.R + unit]);
  });
}

// --- Backward ------------------------------------------------------------------------------------

// The gradient of the projected state at a lockstep of the first `lanes` lanes.
template <typename scalar_t>
__global__ void __launch_bounds__(kUnitThreads)
    project_back_kernel(BwdRecurrence<scalar_t> p, BwdScratch<scalar_t> s, StepNumber step,
                        int64_t lanes) {
  const int64_t k = step.get();
  for_each_unit(lanes, p.R, [&](int64_t lane, int64_t unit) {
    const auto place = bwd_place(p, k, lane);
    Accumulator<scalar_t> dh = through(place.gate, s.from_after[lane * p.R + unit]);
    if (place.is_initial && p.d_hx) p.d_hx[place.b * p.R + unit] += dh;
    if (place.exists) {
      const scalar_t* const d_output = output_gradients(p, place, k, lane);
      dh += (d_output ? to_acc(d_output[unit]) : 0) + end_gradient(p, place, unit);
      store_row(p.d_projected, place.span_row * p.R + unit, dh);
    }
    s.d_projected[lane * p.R + unit] = from_acc<scalar_t>(place.exists ? dh : 0);
  });
}

// The cell's derivative at a lockstep of the first `lanes` lanes; behind a step there are their
// initial states.
template <typename Cell, typename scalar_t>
__global__ void __launch_bounds__(kUnitThreads)
    backward_step_kernel(BwdRecurrence<scalar_t> p, BwdScratch<scalar_t> s, StepNumber step,
                         int64_t lanes) {
  using Step = BwdStep<Cell, scalar_t>;
  using acc_t = Accumulator<scalar_t>;
  const int64_t k = step.get();
  for_each_unit(lanes, p.H, [&](int64_t lane, int64_t unit) {
    const auto place = bwd_place(p, k, lane);
    const int64_t i = lane * p.H + unit;
    const auto inputs = Step::load(p, place, k, lane, unit);
    acc_t d[Cell::kColumns] = {}, carry = 0;
    if (Cell::kHasCarry && k > 0) carry = s.carry[i];
    Step::run(p, place, inputs, lane, unit, p.w_hr ? s.from_projection[i] : s.from_after[i], carry,
              d);
    if (Cell::kHasCarry && place.exists) s.carry[i] = carry;
    Step::store(p, place, unit, d);
    if constexpr (Cell::kHasCellState) {
      if (p.unprojected && place.exists) {
        const acc_t h = to_acc(inputs.values[3]) * tanh(to_acc(inputs.values[Step::kCell]));
        p.unprojected[place.span_row * p.H + unit] = from_acc<scalar_t>(h);
      }
    }
    if (!s.d) return;  // no step is left, only initial states
    FASTBPTT_UNROLL
    for (int c = 0; c < Cell::kColumns; ++c) {
      const int64_t to = (lane * Cell::kColumns + c) * p.H + unit;
      const scalar_t value = from_acc<scalar_t>(d[c]);
      s.d[to] = value;
      if (p.d_by_lane) p.d_by_lane[k * p.num_lanes() * Cell::kColumns * p.H + to] = value;
    }
  });
}

// --- Around the recurrence -----------------------------------------------------------------------

// The activations of each row over again, in place of pre: as in the forward pass, but for all
// steps at once.
template <typename Cell, typename scalar_t>
__global__ void __launch_bounds__(kUnitThreads)
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
__global__ void __launch_bounds__(kUnitThreads)
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
__global__ void __launch_bounds__(kUnitThreads)
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
