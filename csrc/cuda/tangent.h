// Launchers of the tangent passes' kernels; see tangent.cuh.
#pragma once

#include "cuda/launch.h"
#include "cuda/params.cuh"

namespace fastbptt {

// A matrix, or null: zeros.
template <typename scalar_t>
struct Matrix {
  scalar_t* data;
  int64_t ld;  // its row stride
};

// Values and their tangents. A pass without tangents reads and writes the values alone.
template <typename scalar_t>
struct DualMatrix {
  Matrix<scalar_t> value, tangent;
};

// What was stored before.
template <typename scalar_t>
FASTBPTT_HD inline Matrix<const scalar_t> reading(const Matrix<scalar_t>& rows) {
  return {rows.data, rows.ld};
}
template <typename scalar_t>
FASTBPTT_HD inline DualMatrix<const scalar_t> reading(const DualMatrix<scalar_t>& rows) {
  return {reading(rows.value), reading(rows.tangent)};
}

// What both passes need. Pointers that a cell has no use for are null.
template <typename scalar_t>
struct TangentSteps {
  Sequences sequences;  // without resets: those are zeros of `gate`
  int64_t H, R;
  bool is_projected;
  const scalar_t* gate;  // [N] between a step and the one before it in time, or null: 1
};

template <typename scalar_t>
struct FwdTangents : TangentSteps<scalar_t> {
  using Given = Matrix<const scalar_t>;
  using Result = Matrix<scalar_t>;

  Given output, c, gates, before;  // [N, R], [N, H], [N, S*H], [N, H], values
  // The others are tangents.
  Given pre, projected;           // [N, columns*H], [N, R]
  Given hx, cx;                   // [B, R], [B, H]
  Result output_t, c_t, gates_t;  // [N, ...]
  Result h_n, c_n;                // [B, ...]
  // What stays between launches.
  Result h;               // [B, R] the state that enters the next step: the product's operand
  Result carried_c;       // [B, H]
  Given rec;              // [B, G*H] h W_hh^T
  Result unprojected;     // [B, H] the state before its projection
  Given from_projection;  // [B, R]
};

template <typename scalar_t>
struct BwdTangents : TangentSteps<scalar_t> {
  using Given = DualMatrix<const scalar_t>;
  using Result = DualMatrix<scalar_t>;

  Given output, c, gates, before;  // [N, ...]
  Given d_output, d_h_n, d_c_n;    // [N, R], [B, R], [B, H]
  Result d, d_projected;           // [N, columns*H], [N, R]
  Result d_hx, d_cx;               // [B, R], [B, H]; null: not wanted
  // What stays between launches, for each sequence until its next step.
  Result d_recurrent;     // [B, G*H] d as W_hh sees it
  Result projected;       // [B, R] d_projected
  Given from_after;       // [B, R] d_recurrent W_hh of the step after
  Given from_projection;  // [B, H] projected W_hr
  Result carry;           // [B, H]
};

// t: a step, of the first `rows` sequences. with_tangents: else values alone.
template <typename scalar_t>
struct Tangent {
  using Fwd = FwdTangents<scalar_t>;
  using Bwd = BwdTangents<scalar_t>;

  static void run_initial_states(const Fwd& p, Stream stream);
  static void run_forward_step(CellKind cell, const Fwd& p, int64_t t, int64_t rows, Stream stream);
  static void run_project_step(const Fwd& p, int64_t t, int64_t rows, Stream stream);
  static void run_project_back(const Bwd& p, bool with_tangents, int64_t t, int64_t rows,
                               Stream stream);
  static void run_backward_step(CellKind cell, const Bwd& p, bool with_tangents, int64_t t,
                                int64_t rows, Stream stream);
  static void run_initial_gradients(CellKind cell, const Bwd& p, bool with_tangents, Stream stream);
};

}  // namespace fastbptt
