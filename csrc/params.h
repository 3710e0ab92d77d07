// The arguments of one direction of one layer, as the kernels see them: plain pointers, no torch.
//
// Axes: T steps, B batch, I inputs, H hidden units, R values of the recurrent state (H, or fewer
// where LSTM projects it), G gates a unit (RNN 1, GRU 3, LSTM 4), S activations kept a unit (GRU 4,
// LSTM 4). N rows: every (step, sequence) pair that exists, T*B for a uniform batch and fewer for a
// packed one. Gate g of unit u stands in column g*H + u, as in torch's weights.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace fastbptt {

// The Elman cell by its nonlinearity, and the gated cells.
enum class CellKind : int { kTanh, kRelu, kIdentity, kGru, kLstm };
constexpr int kNumCells = 5;

// Which row of an [N, ...] buffer holds step t of sequence b.
struct Layout {
  int64_t T;                   // steps of the longest sequence
  int64_t B;                   // sequences
  int64_t N;                   // rows in all
  int64_t time_stride;         // rows from t to t+1   (uniform: B, or 1 if batch_first)
  int64_t batch_stride;        // rows from b to b+1   (uniform: 1, or T if batch_first)
  const int64_t* offsets;      // [T+1] first row of step t, or null if uniform
  const int64_t* batch_sizes;  // [T] sequences that reach step t, or null if uniform

  FASTBPTT_HD int64_t row(int64_t t, int64_t b) const {
    return offsets ? offsets[t] + b : t * time_stride + b * batch_stride;
  }
};

// The row of the step before another, or -1 - b where that is the initial state of sequence b, or
// kNoRow where it is zeros.
constexpr int64_t kNoRow = INT64_MIN;

// That row of [N, ...] memory, or of [B, ...] initial states, or null where the state was zero.
// (static: compiled once per instruction set, and never merged across them)
template <typename scalar_t>
FASTBPTT_HD static inline const scalar_t* state_row(const scalar_t* memory, int64_t ld,
                                                    const scalar_t* initial, int64_t columns,
                                                    int64_t before) {
  if (before >= 0) return memory + before * ld;
  return initial && before != kNoRow ? initial + (-1 - before) * columns : nullptr;
}

// What state enters the first step of a lane: the sequence's initial one (hx), zeros after a reset,
// or, detached, that of the step before, which only a backward pass may take for known.
enum class Before : int { kInitial, kZeros, kStep };

// One stretch of one sequence that is run from its own start: in the forward pass a whole sequence or
// a part that begins with a reset, in a truncated backward pass a window of it or a part of one. Local step s stands at
// t = first + direction * s. Lanes are sorted by descending length, so the lanes that have a step s
// are always a prefix. Those of a backward pass may overlap.
struct Lane {
  int64_t first;       // t of local step 0
  int64_t batch;       // b
  int64_t steps;       // length
  Before before;       // what enters local step 0
  bool to_end;         // the last local step is the sequence's own last step: its state is h_n
  int64_t loss_begin;  // local steps [loss_begin, loss_end) have losses that count
  int64_t loss_end;
};

// What both passes of one direction need. Pointers that a cell has no use for are null.
template <typename scalar_t>
struct LayerParams {
  CellKind kind;  // of our own cells
  Layout layout;
  int64_t I, H, R;
  int direction;      // +1, or -1 for the reverse direction
  const Lane* lanes;  // [num_lanes]
  int64_t num_lanes;
  const scalar_t* input;  // [N, I]
  const bool* resets;     // [N] the state is zeros between this step and the one before, or null
  const scalar_t* hx;     // [B, R] or null: zeros
  const scalar_t* cx;     // [B, H] or null: zeros
  const scalar_t* w_ih;   // [G*H, I]
  const scalar_t* w_hh;   // [G*H, R]
  const scalar_t* b_ih;   // [G*H] or null
  const scalar_t* b_hh;   // [G*H] or null
  const scalar_t* w_hr;   // [R, H] or null: no projection
  int64_t ld_out;         // row stride of output and its gradient: R times the layer's directions
  int threads;            // the team is at most this large
  void* workspace;        // as many bytes as the kernel's workspace function asks for, 64-aligned
};

template <typename scalar_t>
struct FwdParams : LayerParams<scalar_t> {
  scalar_t* output;  // [N, R], row stride ld_out
  scalar_t* gates;   // [N, S*H] the activations kept
  scalar_t* c;       // [N, H] LSTM's cell states
  scalar_t* h_n;     // [B, R]
  scalar_t* c_n;     // [B, H]
};

// A row for each step of each lane, M in all, in the order in which the backward pass takes them: by
// local step from the last to the first, then by lane. Where lanes overlap, what one layer of a stack
// hands to the next is kept apart like this, so that no loss reaches further back in each layer.
template <typename scalar_t>
struct BwdParams : LayerParams<scalar_t> {
  const scalar_t* output;    // [N, R], row stride ld_out
  const scalar_t* gates;     // [N, S*H] or null: recomputed
  const scalar_t* c;         // [N, H]
  const scalar_t* d_output;  // [N, R], row stride ld_out, or null: zeros
  const scalar_t* d_h_n;     // [B, R] or null: zeros
  const scalar_t* d_c_n;     // [B, H] or null: zeros
  const scalar_t* d_lanes;   // [M, R] instead of d_output, or null; see below
  const scalar_t* kappa;     // [N] gate between a step and the one before it in time, or null: 1
  const scalar_t* mask;      // [N, I] factors of d_input (the dropout before this layer), or null
  bool overlapping;          // lanes may share steps; else each step is in at most one of them
  int64_t begin, end;        // the steps t that the lanes lie in
  scalar_t* d_input;         // [rows of those steps, I], or null: not wanted
  bool d_input_by_lane;      // d_input is [M, I]; see below
  bool accumulate_d_input;   // add to d_input (second direction) rather than fill it
  scalar_t* d_hx;            // [B, R] or null
  scalar_t* d_cx;            // [B, H] or null
  scalar_t* d_w_ih;          // [G*H, I] or null: no weight gradient is wanted
  scalar_t* d_w_hh;          // [G*H, R]
  scalar_t* d_b_ih;          // [G*H] or null
  scalar_t* d_b_hh;          // [G*H] or null
  scalar_t* d_w_hr;          // [R, H] or null
};

// Rows that may be a part of wider ones.
template <typename scalar_t>
struct Rows {
  const scalar_t* data;  // or null: zeros
  int64_t ld;

  const scalar_t* at(int64_t row) const { return data ? data + row * ld : nullptr; }
};

// What the steps of a tangent pass need, one direction; see tangents.h. Their lanes are the sequences, and of
// LayerParams input, resets, W_ih and the biases are not used. C columns as in cells.h.
template <typename scalar_t>
struct TangentParams : LayerParams<scalar_t> {
  Rows<scalar_t> output;   // [N, R]
  const scalar_t* c;       // [N, H]
  const scalar_t* gates;   // [N, S*H]
  const scalar_t* before;  // [N, H] the state that entered each step: LSTM's c, GRU's h
  const scalar_t* gate;    // [N] between a step and the one before it in time, or null: 1
};

// hx and cx are the tangents of the initial states.
template <typename scalar_t>
struct ForwardTangentParams : TangentParams<scalar_t> {
  const scalar_t* pre;        // [N, C*H]
  const scalar_t* projected;  // [N, R] or null: zeros
  scalar_t* output_t;         // [N, R]
  scalar_t* c_t;              // [N, H]
  scalar_t* gates_t;          // [N, S*H]
  scalar_t* h_n_t;            // [B, R]
  scalar_t* c_n_t;            // [B, H]
};

// What there is of a gradient or of what the forward pass gave, and its tangent.
template <typename scalar_t>
struct BackwardTangentParams : TangentParams<scalar_t> {
  bool has_tangents;  // else there are only values
  bool weights_too;   // w_hh is [2*G*H, R] and w_hr [2*R, H]: below each its tangent
  Rows<scalar_t> d_output, d_output_t;       // [N, R]
  const scalar_t *d_h_n, *d_h_n_t;           // [B, R] or null: zeros
  const scalar_t *d_c_n, *d_c_n_t;           // [B, H] or null: zeros
  Rows<scalar_t> output_t;                   // [N, R]
  const scalar_t *c_t, *gates_t, *before_t;  // [N, ...]
  scalar_t *d, *d_t;                         // [N, C*H]
  scalar_t *d_projected, *d_projected_t;     // [N, R]
  scalar_t *d_hx, *d_hx_t;                   // [B, R] or null: not wanted
  scalar_t *d_cx, *d_cx_t;                   // [B, H] or null: not wanted
};

}  // namespace fastbptt
