// The tangent passes' kernels: what is between the library's products, as in stepwise.cuh, by the
// cells' formulas on dual numbers. There are no windows: where a pass is cut, a gate is closed.
//
//   forward   rec = h W_hh^T (library), forward_tangent_kernel; with a projection h = W_hr h
//             (library), project_tangent_kernel
//   backward  dh = d W_hh (library), [project_back_tangent_kernel, dh = dh W_hr (library),]
//             backward_tangent_kernel; behind the first step initial_gradients_kernel
//
// What a thread carries from step to step it alone reads and writes, so one buffer does. In the
// backward pass V is a dual number, or a plain one where there are no tangents.
#pragma once

#include <type_traits>

#include "cuda/step.cuh"
#include "cuda/tangent.h"
#include "cuda/units.cuh"
#include "dual.h"

namespace fastbptt {
namespace {

// Blocks that a multiprocessor is to hold. Unless told, ptxas spills to make it hold more.
constexpr int kLeastBlocks = 8;

template <typename scalar_t>
__device__ __forceinline__ scalar_t load(const Matrix<const scalar_t>& rows, int64_t row,
                                         int64_t column) {
  return rows.data ? rows.data[row * rows.ld + column] : scalar_t(0);
}
template <typename V, typename scalar_t>
__device__ __forceinline__ V load(const DualMatrix<const scalar_t>& rows, int64_t row,
                                  int64_t column) {
  if constexpr (std::is_same_v<V, scalar_t>) {
    return load(rows.value, row, column);
  } else {
    return {load(rows.value, row, column), load(rows.tangent, row, column)};
  }
}

template <typename scalar_t>
__device__ __forceinline__ void store(const Matrix<scalar_t>& rows, int64_t row, int64_t column,
                                      scalar_t x) {
  rows.data[row * rows.ld + column] = x;
}
template <typename V, typename scalar_t>
__device__ __forceinline__ void store(const DualMatrix<scalar_t>& rows, int64_t row, int64_t column,
                                      V x) {
  if constexpr (std::is_same_v<V, scalar_t>) {
    store(rows.value, row, column, x);
  } else {
    store(rows.value, row, column, x.value);
    store(rows.tangent, row, column, x.tangent);
  }
}

template <typename scalar_t>
__device__ __forceinline__ Dual<scalar_t> through(scalar_t gate, Dual<scalar_t> x) {
  return {through(gate, x.value), through(gate, x.tangent)};
}

// The gate that the recurrence meets after step t, which may be one before the first, not the last.
template <typename scalar_t>
__device__ __forceinline__ scalar_t gate_after(const TangentSteps<scalar_t>& p, int64_t t,
                                               int64_t b) {
  return p.gate ? p.gate[p.sequences.boundary_after(t, b)] : scalar_t(1);
}

// That between the initial state and the first step: the reverse direction has no boundary there.
template <typename scalar_t>
__device__ __forceinline__ scalar_t gate_of_initial(const TangentSteps<scalar_t>& p, int64_t b) {
  return p.sequences.direction > 0 ? gate_after(p, -1, b) : scalar_t(1);
}

// --- Forward -------------------------------------------------------------------------------------

// The states that enter each sequence's first step.
template <typename scalar_t>
__global__ void __launch_bounds__(kUnitThreads, kLeastBlocks)
    initial_tangents_kernel(FwdTangents<scalar_t> p) {
  const int64_t widest = p.H > p.R ? p.H : p.R;
  for_each_unit(p.sequences.layout.B, widest, [&](int64_t b, int64_t unit) {
    const scalar_t gate = gate_of_initial(p, b);
    if (unit < p.R) store(p.h, b, unit, through(gate, load(p.hx, b, unit)));
    if (p.carried_c.data && unit < p.H) {
      store(p.carried_c, b, unit, through(gate, load(p.cx, b, unit)));
    }
  });
}

// Stores a step's state: in its row as it is, for the next step behind the gate between them, or, of
// the last step, in the row of the sequence.
template <typename scalar_t>
__device__ __forceinline__ void store_tangent(const FwdTangents<scalar_t>& p, int64_t t, int64_t b,
                                              int64_t unit, scalar_t x,
                                              const Matrix<scalar_t>& rows,
                                              const Matrix<scalar_t>& next,
                                              const Matrix<scalar_t>& last) {
  store(rows, p.sequences.layout.row(t, b), unit, x);
  if (p.sequences.ends(t, b)) {
    store(last, b, unit, x);
  } else {
    store(next, b, unit, through(gate_after(p, t, b), x));
  }
}

template <typename Cell, typename scalar_t>
__global__ void __launch_bounds__(kUnitThreads, kLeastBlocks)
    forward_tangent_kernel(FwdTangents<scalar_t> p, int64_t t, int64_t rows) {
  constexpr int G = Cell::kGates, S = Cell::kSaved, kLast = Cell::kColumns - 1;
  constexpr int kFirstGate = Cell::kInputGate[0];  // the input's columns are the gates, rotated
  for_each_unit(rows, p.H, [&](int64_t b, int64_t unit) {
    const int64_t row = p.sequences.layout.row(t, b);
    scalar_t in[G], rec[G], saved[S + 1], saved_t[S + 1], value = 0, c = 0;
    Dual<scalar_t> before{};
    FASTBPTT_UNROLL
    for (int g = 0; g < G; ++g) {
      in[(g + kFirstGate) % G] = load(p.pre, row, g * p.H + unit);
      rec[g] = load(p.rec, b, g * p.H + unit);
    }
    if constexpr (kLast >= G) rec[G - 1] += load(p.pre, row, kLast * p.H + unit);
    FASTBPTT_UNROLL
    for (int k = 0; k < S; ++k) saved[k] = load(p.gates, row, k * p.H + unit);
    if constexpr (S == 0) value = load(p.output, row, unit);
    if constexpr (Cell::kHasCarry) {
      before.value = load(p.before, row, unit);
      before.tangent = load(reading(Cell::kHasCellState ? p.carried_c : p.h), b, unit);
    }
    const scalar_t h = forward_tangent<Cell>(saved, value, before, in, rec, saved_t, &c);
    FASTBPTT_UNROLL
    for (int k = 0; k < S; ++k) store(p.gates_t, row, k * p.H + unit, saved_t[k]);
    if constexpr (Cell::kHasCellState) {
      store_tangent(p, t, b, unit, c, p.c_t, p.carried_c, p.c_n);
    }
    if (p.is_projected) {
      store(p.unprojected, b, unit, h);
    } else {
      store_tangent(p, t, b, unit, h, p.output_t, p.h, p.h_n);
    }
  });
}

// The same step's projected state.
template <typename scalar_t>
__global__ void __launch_bounds__(kUnitThreads, kLeastBlocks)
    project_tangent_kernel(FwdTangents<scalar_t> p, int64_t t, int64_t rows) {
  for_each_unit(rows, p.R, [&](int64_t b, int64_t unit) {
    const int64_t row = p.sequences.layout.row(t, b);
    const scalar_t h = load(p.from_projection, b, unit) + load(p.projected, row, unit);
    store_tangent(p, t, b, unit, h, p.output_t, p.h, p.h_n);
  });
}

// --- Backward ------------------------------------------------------------------------------------

// What comes back to step t from the one after it, of what that one left for it; of a sequence's last
// step, what is given instead.
template <typename V, typename scalar_t>
__device__ __forceinline__ V from_beyond(const BwdTangents<scalar_t>& p, int64_t t, int64_t b,
                                         int64_t unit, const DualMatrix<const scalar_t>& after,
                                         const DualMatrix<const scalar_t>& given) {
  if (p.sequences.ends(t, b)) return load<V>(given, b, unit);
  return through(gate_after(p, t, b), load<V>(after, b, unit));
}

// The gradient of the state as it leaves step t, without a carry.
template <typename V, typename scalar_t>
__device__ __forceinline__ V state_gradient(const BwdTangents<scalar_t>& p, int64_t t, int64_t b,
                                            int64_t row, int64_t unit) {
  return from_beyond<V>(p, t, b, unit, p.from_after, p.d_h_n) + load<V>(p.d_output, row, unit);
}

// The gradient of the projected state.
template <typename V, typename scalar_t>
__global__ void __launch_bounds__(kUnitThreads, kLeastBlocks)
    project_back_tangent_kernel(BwdTangents<scalar_t> p, int64_t t, int64_t rows) {
  for_each_unit(rows, p.R, [&](int64_t b, int64_t unit) {
    const int64_t row = p.sequences.layout.row(t, b);
    const V dh = state_gradient<V>(p, t, b, row, unit);
    store(p.d_projected, row, unit, dh);
    store(p.projected, b, unit, dh);
  });
}

template <typename Cell, typename V, typename scalar_t>
__global__ void __launch_bounds__(kUnitThreads, kLeastBlocks)
    backward_tangent_kernel(BwdTangents<scalar_t> p, int64_t t, int64_t rows) {
  constexpr int G = Cell::kGates, S = Cell::kSaved, kColumns = Cell::kColumns;
  for_each_unit(rows, p.H, [&](int64_t b, int64_t unit) {
    const int64_t row = p.sequences.layout.row(t, b);
    V dh = p.is_projected ? load<V>(p.from_projection, b, unit)
                          : state_gradient<V>(p, t, b, row, unit);
    V d[kColumns];
    if constexpr (S == 0) {
      Cell::backward(dh, load<V>(p.output, row, unit), d);
    } else {
      V saved[S];
      FASTBPTT_UNROLL
      for (int k = 0; k < S; ++k) saved[k] = load<V>(p.gates, row, k * p.H + unit);
      const V before = load<V>(p.before, row, unit);
      const auto carried = reading(p.carry);
      V carry = from_beyond<V>(p, t, b, unit, carried,
                               Cell::kHasCellState ? p.d_c_n : DualMatrix<const scalar_t>{});
      if constexpr (Cell::kHasCellState) {
        Cell::backward(dh, carry, saved, before, load<V>(p.c, row, unit), d, &carry);
      } else {
        dh += carry;
        Cell::backward(dh, saved, before, d, &carry);
      }
      store(p.carry, b, unit, carry);
    }
    FASTBPTT_UNROLL
    for (int i = 0; i < kColumns; ++i) store(p.d, row, i * p.H + unit, d[i]);
    FASTBPTT_UNROLL
    for (int g = 0; g < G; ++g) {
      store(p.d_recurrent, b, g * p.H + unit, d[Cell::kFirstRecurrent + g]);
    }
  });
}

// The gradients of the initial states, when every sequence's first step is done. carries_h: the carry
// is the state's.
template <typename V, typename scalar_t>
__global__ void __launch_bounds__(kUnitThreads, kLeastBlocks)
    initial_gradients_kernel(BwdTangents<scalar_t> p, bool carries_h) {
  const int64_t widest = p.H > p.R ? p.H : p.R;
  for_each_unit(p.sequences.layout.B, widest, [&](int64_t b, int64_t unit) {
    const scalar_t gate = gate_of_initial(p, b);
    const auto carry = reading(p.carry);
    if (unit < p.R) {
      V dh = through(gate, load<V>(p.from_after, b, unit));
      if (carries_h) dh += through(gate, load<V>(carry, b, unit));
      store(p.d_hx, b, unit, dh);
    }
    if (p.d_cx.value.data && unit < p.H) {
      store(p.d_cx, b, unit, through(gate, load<V>(carry, b, unit)));
    }
  });
}

}  // namespace
}  // namespace fastbptt
