// One step of a recurrence for one unit of one lane: what all kernels have in common. What differs is
// where the product with W_hh is computed, and how the state gets to the next step's.
//
//   place   what all units of a lane's step share
//   Inputs  what the step reads of memory: may be loaded ahead
//   Values  what it computes; its results may be stored later, by another thread
#pragma once

#include "cuda/device.cuh"
#include "cuda/params.cuh"
#include "cuda/scalar.cuh"

namespace fastbptt {
namespace {

template <typename scalar_t>
__device__ __forceinline__ Accumulator<scalar_t> load_or_zero(const scalar_t* from, int64_t i) {
  return from ? to_acc(from[i]) : Accumulator<scalar_t>(0);
}

// Whether all rows begin at a multiple of so many bytes.
template <typename scalar_t>
__device__ __forceinline__ bool are_aligned(int bytes, const scalar_t* base, int64_t stride) {
  return reinterpret_cast<uintptr_t>(base) % bytes == 0 &&
         stride * int64_t(sizeof(scalar_t)) % bytes == 0;
}

// A closed gate stops infinity and NaN too.
template <typename acc_t>
__device__ __forceinline__ acc_t through(acc_t gate, acc_t x) {
  return gate == 0 ? acc_t(0) : x * gate;
}

// --- Forward -------------------------------------------------------------------------------------

struct FwdPlace {
  int64_t row;    // of the step
  bool exists;    // in the sequence
  bool ends;      // the sequence ends with it
  bool is_reset;  // the state after it is zeros
};

__device__ __forceinline__ FwdPlace fwd_place(const Sequences& sequences, int64_t t, int64_t b) {
  const bool ends = sequences.ends(t, b);
  return {sequences.layout.row(t, b), true, ends, !ends && sequences.is_reset_after(t, b)};
}

// Whether a sequence begins with the given initial state, rather than with zeros after a reset.
__device__ __forceinline__ bool has_initial_state(const Sequences& sequences, int64_t b) {
  const int64_t first = sequences.direction > 0 ? 0 : sequences.length(b) - 1;
  return sequences.row_before(first, b) != kNoRow;
}

template <typename scalar_t>
__device__ __forceinline__ void store_output(const FwdRecurrence<scalar_t>& p,
                                             const FwdPlace& place, int64_t b, int64_t unit,
                                             Accumulator<scalar_t> h) {
  p.output[place.row * p.ld_out + unit] = from_acc<scalar_t>(h);
  if (place.ends) p.h_n[b * p.R + unit] = from_acc<scalar_t>(h);
}

template <typename Cell, typename number>
struct FwdStep {
  using scalar_t = number;
  using acc_t = Accumulator<scalar_t>;
  using Params = FwdRecurrence<scalar_t>;
  static constexpr int G = Cell::kGates, kGates = G;
  static constexpr int kInputs = G;  // pre, gate after gate
  // The states, of which the last ones are results of their own too, and what is saved.
  static constexpr int kStates = Cell::kHasCellState ? 2 : 1, kResults = kStates + Cell::kSaved;

  struct Inputs {
    scalar_t values[kInputs];
  };

  struct Values {
    acc_t h, c, saved[Cell::kSaved + 1];
  };

  struct Results {
    acc_t values[kResults];
  };

  // What is added to a gate's recurrent part, W_ih's bias too where W_hh's need not stay apart; and to
  // the last gate's input.
  static __device__ __forceinline__ acc_t recurrent_bias(const Params& p, int gate, int64_t unit) {
    const bool apart = Cell::kRecurrentBias && gate == G - 1;
    const acc_t of_input = apart ? acc_t(0) : load_or_zero(p.b_ih, gate * p.H + unit);
    return load_or_zero(p.b_hh, gate * p.H + unit) + of_input;
  }
  static __device__ __forceinline__ acc_t input_bias(const Params& p, int64_t unit) {
    return Cell::kRecurrentBias ? load_or_zero(p.b_ih, (G - 1) * p.H + unit) : acc_t(0);
  }

  // Calls fn(i, pointer) for each of the inputs; the pointer is null where the value is zero.
  template <typename Fn>
  static __device__ __forceinline__ void for_each_input(const Params& p, const FwdPlace& place,
                                                        int64_t unit, Fn&& fn) {
    const scalar_t* const pre = p.pre + place.row * p.ld_pre + unit;
    FASTBPTT_UNROLL
    for (int g = 0; g < G; ++g) fn(g, pre + g * p.H);
  }
  // Whether all that a step reads and writes can be taken so many bytes at a time.
  static __device__ __forceinline__ bool is_aligned(const Params& p, int bytes) {
    return are_aligned(bytes, p.pre, p.ld_pre) && are_aligned(bytes, p.pre, p.H) &&
           are_aligned(bytes, p.output, p.ld_out) && are_aligned(bytes, p.h_n, p.R) &&
           are_aligned(bytes, p.gates, p.H) && are_aligned(bytes, p.c, p.H) &&
           are_aligned(bytes, p.c_n, p.H);
  }

  static __device__ __forceinline__ Inputs load(const Params& p, const FwdPlace& place,
                                                int64_t unit) {
    Inputs result;
    for_each_input(p, place, unit, [&](int i, const scalar_t* from) { result.values[i] = *from; });
    return result;
  }

  // rec: h W_hh^T with its biases; before: c of LSTM, h of GRU.
  static __device__ __forceinline__ Values compute(const Inputs& inputs, acc_t input_bias,
                                                   const acc_t (&rec)[G], acc_t before) {
    acc_t in[G];
    FASTBPTT_UNROLL
    for (int g = 0; g < G; ++g) in[g] = to_acc(inputs.values[g]);
    if constexpr (Cell::kRecurrentBias) in[G - 1] += input_bias;
    Values values;
    if constexpr (Cell::kHasCellState) {
      values.h = Cell::forward(in, rec, before, values.saved, &values.c, Activations<scalar_t>{});
    } else {
      values.h = Cell::forward(in, rec, before, values.saved, Activations<scalar_t>{});
    }
    return values;
  }

  // Calls fn(i, pointer) for each of the results, and of the states that are final.
  template <typename Fn>
  static __device__ __forceinline__ void for_each_result(const Params& p, const FwdPlace& place,
                                                         int64_t b, int64_t unit, Fn&& fn) {
    fn(0, p.output + place.row * p.ld_out + unit);
    if (Cell::kHasCellState) fn(1, p.c + place.row * p.H + unit);
    if (p.gates) {
      scalar_t* const gates = p.gates + place.row * Cell::kSaved * p.H + unit;
      FASTBPTT_UNROLL
      for (int k = 0; k < Cell::kSaved; ++k) fn(kStates + k, gates + k * p.H);
    }
    if (!place.ends) return;
    fn(0, p.h_n + b * p.R + unit);
    if (Cell::kHasCellState) fn(1, p.c_n + b * p.H + unit);
  }
  // What goes on to the next step beside what W_hh sees.
  static __device__ __forceinline__ acc_t carried(const Values& values) {
    return Cell::kHasCellState ? values.c : values.h;
  }
  static __device__ __forceinline__ Results results_of(const Values& values) {
    Results results;
    results.values[0] = values.h;
    if (Cell::kHasCellState) results.values[1] = values.c;
    FASTBPTT_UNROLL
    for (int k = 0; k < Cell::kSaved; ++k) results.values[kStates + k] = values.saved[k];
    return results;
  }

  // All but the state h, which may have to be projected first.
  static __device__ __forceinline__ void store(const Params& p, const FwdPlace& place, int64_t b,
                                               int64_t unit, const Values& values) {
    if constexpr (Cell::kHasCellState) {
      p.c[place.row * p.H + unit] = from_acc<scalar_t>(values.c);
      if (place.ends) p.c_n[b * p.H + unit] = from_acc<scalar_t>(values.c);
    }
    if (!p.gates) return;
    scalar_t* const gates = p.gates + place.row * Cell::kSaved * p.H + unit;
    FASTBPTT_UNROLL
    for (int k = 0; k < Cell::kSaved; ++k) gates[k * p.H] = from_acc<scalar_t>(values.saved[k]);
  }
};

// --- Backward ------------------------------------------------------------------------------------

template <typename acc_t>
struct BwdPlace {
  int64_t b;
  int64_t row, span_row;  // of the step
  int64_t before;         // row of the state before it, as row_before
  acc_t gate;             // between it, or the initial state, and the step after it
  bool exists;            // there is a step
  bool is_initial;        // there is none: the initial state entered the one after it
  bool has_loss, ends;
};

// Where a lane is at lockstep k.
template <typename scalar_t>
__device__ __forceinline__ BwdPlace<Accumulator<scalar_t>> bwd_place(
    const BwdRecurrence<scalar_t>& p, int64_t k, int64_t lane) {
  const Sequences& sequences = p.sequences;
  const LaneStep at = p.windows.at(sequences, k, lane);
  BwdPlace<Accumulator<scalar_t>> place{};
  place.b = at.b;
  place.exists = at.exists;
  place.is_initial = at.is_initial;
  place.has_loss = at.has_loss;
  if (at.exists) {
    place.row = sequences.layout.row(at.t, at.b);
    place.span_row = p.span_row(at.t, at.b);
    place.before = sequences.row_before(at.t, at.b);
    place.ends = sequences.ends(at.t, at.b);
  }
  // Nothing comes from beyond the lane, so its gate is closed.
  if (k == 0 || !(at.exists || at.is_initial)) return place;
  if (at.is_initial && sequences.direction < 0) {
    place.gate = 1;  // no boundary is there
    return place;
  }
  const int64_t boundary = sequences.boundary_after(at.t, at.b);
  const bool is_reset = sequences.resets && sequences.resets[boundary];
  place.gate = is_reset ? 0 : p.kappa ? to_acc(p.kappa[boundary]) : 1;
  return place;
}

// The row of what the losses add to the gradient of a step's state by its output; null: zeros.
template <typename scalar_t>
__device__ __forceinline__ const scalar_t* output_gradients(
    const BwdRecurrence<scalar_t>& p, const BwdPlace<Accumulator<scalar_t>>& place, int64_t k,
    int64_t lane) {
  if (p.d_lanes) return p.d_lanes + (k * p.num_lanes() + lane) * p.R;
  return p.d_output && place.has_loss ? p.d_output + place.row * p.ld_out : nullptr;
}

// The same by h_n.
template <typename scalar_t>
__device__ __forceinline__ Accumulator<scalar_t> end_gradient(
    const BwdRecurrence<scalar_t>& p, const BwdPlace<Accumulator<scalar_t>>& place, int64_t unit) {
  return place.ends ? load_or_zero(p.d_h_n, place.b * p.R + unit) : Accumulator<scalar_t>(0);
}

template <typename scalar_t>
__device__ __forceinline__ void store_row(const StepRows<scalar_t>& to, int64_t i,
                                          Accumulator<scalar_t> value) {
  if (to.sums) {
    to.sums[i] += value;
  } else if (to.rows) {
    to.rows[i] = from_acc<scalar_t>(value);
  }
}

template <typename Cell, typename number>
struct BwdStep {
  using scalar_t = number;
  using acc_t = Accumulator<scalar_t>;
  using Params = BwdRecurrence<scalar_t>;
  using Place = BwdPlace<acc_t>;
  static constexpr int S = Cell::kSaved, kColumns = Cell::kColumns, kGates = Cell::kGates;
  // What was saved, or the output; of LSTM the cell state; of LSTM the cell state before, of GRU the
  // state before; the output's gradient.
  static constexpr int kCell = S, kBefore = Cell::kHasCellState ? S + 1 : S;
  static constexpr int kOutputGradient = S > 0 ? kBefore + 1 : 1, kInputs = kOutputGradient + 1;
  static constexpr int kResults = kColumns;
  struct Results {
    acc_t values[kResults];
  };

  struct Inputs {
    scalar_t values[kInputs];
  };

  // Calls fn(i, pointer) for each of a step's inputs; the pointer is null where the value is zero.
  template <typename Fn>
  static __device__ __forceinline__ void for_each_input(const Params& p, const Place& place,
                                                        int64_t k, int64_t lane, int64_t unit,
                                                        Fn&& fn) {
    if constexpr (S == 0) {
      fn(0, p.output + place.row * p.ld_out + unit);
    } else {
      const scalar_t* const gates =
          p.gates + (p.gates_of_span ? place.span_row : place.row) * S * p.H + unit;
      FASTBPTT_UNROLL
      for (int i = 0; i < S; ++i) fn(i, gates + i * p.H);
      const scalar_t* before;
      if constexpr (Cell::kHasCellState) {
        fn(kCell, p.c + place.row * p.H + unit);
        before = state_row(p.c, p.H, p.cx, p.H, place.before);
      } else {
        before = state_row(p.output, p.ld_out, p.hx, p.H, place.before);
      }
      fn(kBefore, before ? before + unit : nullptr);
    }
    const scalar_t* const row = p.w_hr ? nullptr : output_gradients(p, place, k, lane);
    fn(kOutputGradient, row ? row + unit : nullptr);
  }
  // Whether all that a step reads and writes can be taken so many bytes at a time.
  static __device__ __forceinline__ bool is_aligned(const Params& p, int bytes) {
    return are_aligned(bytes, p.output, p.ld_out) && are_aligned(bytes, p.gates, p.H) &&
           are_aligned(bytes, p.c, p.H) && are_aligned(bytes, p.cx, p.H) &&
           are_aligned(bytes, p.hx, p.H) && are_aligned(bytes, p.d_output, p.ld_out) &&
           are_aligned(bytes, p.d_lanes, p.R) && are_aligned(bytes, p.d.rows, p.H) &&
           are_aligned(bytes, p.d_by_lane, p.H);
  }

  static __device__ __forceinline__ Inputs load(const Params& p, const Place& place, int64_t k,
                                                int64_t lane, int64_t unit) {
    Inputs result{};
    if (!place.exists) return result;
    for_each_input(p, place, k, lane, unit, [&](int i, const scalar_t* from) {
      if (from) result.values[i] = *from;
    });
    return result;
  }

  // dh: what came through W_hh from the step after, without the gate; with a projection, the
  // gradient of the state before it, complete. carry: what else came from there, and what goes on.
  static __device__ __forceinline__ void run(const Params& p, const Place& place,
                                             const Inputs& inputs, int64_t lane, int64_t unit,
                                             acc_t dh, acc_t& carry, acc_t (&d)[kColumns]) {
    if (!p.w_hr) dh = through(place.gate, dh);
    if constexpr (Cell::kHasCarry) {
      carry = through(place.gate, carry);
      if (!Cell::kHasCellState) dh += carry;
    }
    if (place.is_initial) {
      const int64_t i = (p.states_by_lane ? lane : place.b) * p.H + unit;
      if (p.d_hx && !p.w_hr) p.d_hx[i] += dh;
      if (Cell::kHasCellState && p.d_cx) p.d_cx[i] += carry;
    }
    if (!place.exists) return;
    if (!p.w_hr) dh += to_acc(inputs.values[kOutputGradient]) + end_gradient(p, place, unit);
    if constexpr (S == 0) {
      Cell::backward(dh, to_acc(inputs.values[0]), d);
    } else {
      acc_t saved[S];
      FASTBPTT_UNROLL
      for (int i = 0; i < S; ++i) saved[i] = to_acc(inputs.values[i]);
      if constexpr (Cell::kHasCellState) {
        if (place.ends && p.d_c_n) carry = to_acc(p.d_c_n[place.b * p.H + unit]);
        Cell::backward(dh, carry, saved, to_acc(inputs.values[kBefore]),
                       to_acc(inputs.values[kCell]), d, &carry);
      } else {
        Cell::backward(dh, saved, to_acc(inputs.values[kBefore]), d, &carry);
      }
    }
  }

  // Calls fn(i, pointer) for each of d's columns, in each of the places where it goes.
  template <typename Fn>
  static __device__ __forceinline__ void for_each_result(const Params& p, const Place& place,
                                                         int64_t k, int64_t lane, int64_t unit,
                                                         Fn&& fn) {
    if (p.d.rows && place.exists) {
      scalar_t* const rows = p.d.rows + place.span_row * kColumns * p.H + unit;
      FASTBPTT_UNROLL
      for (int i = 0; i < kColumns; ++i) fn(i, rows + i * p.H);
    }
    if (p.d_by_lane && k < p.steps && lane < p.num_lanes()) {
      scalar_t* const rows = p.d_by_lane + (k * p.num_lanes() + lane) * kColumns * p.H + unit;
      FASTBPTT_UNROLL
      for (int i = 0; i < kColumns; ++i) fn(i, rows + i * p.H);
    }
  }

  static __device__ __forceinline__ Results results_of(const acc_t (&d)[kColumns]) {
    Results results;
    FASTBPTT_UNROLL
    for (int i = 0; i < kColumns; ++i) results.values[i] = d[i];
    return results;
  }

  static __device__ __forceinline__ void store(const Params& p, const Place& place, int64_t unit,
                                               const acc_t (&d)[kColumns]) {
    if (!place.exists) return;
    FASTBPTT_UNROLL
    for (int i = 0; i < kColumns; ++i) {
      store_row(p.d, (place.span_row * kColumns + i) * p.H + unit, d[i]);
    }
  }
};

}  // namespace
}  // namespace fastbptt
