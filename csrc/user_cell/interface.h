// The arguments of one direction of a layer of a user's cell: a function of each unit's gates and
// states, any number of both. What a library that is compiled from the cell and the passes that call
// it know of each other.
//
// Axes as in params.h, and S states of H values each, K values kept a unit, E extra arguments.
#pragma once

#include "params.h"

namespace fastbptt {

// Numbers drawn at a time; a draw of fewer begins at a multiple of it.
constexpr int64_t kDrawnNumbers = 64;

// An argument of the function beside gates and states: one number, or one for each unit, row or both.
template <typename scalar_t>
struct Extra {
  const scalar_t* data;
  int64_t row_stride, unit_stride;  // 0: the same for all; a unit stride is 0 or 1
};

// What a state is at a reset: a row for each of the batch's rows, or for each sequence, or one for
// all. The batch is uniform where sequences have theirs.
template <typename scalar_t>
struct ResetTo {
  const scalar_t* data;
  int64_t row_stride, sequence_stride;
};

// Values of a unit that a cell normalizes together over all units. They stand in slots from first_slot
// on, and are normalized when phase `phase` begins. See fastbptt/_phases.py.
struct UserNorm {
  int phase, first_slot, count;
  double eps;
};

// What a phase of a cell has of a lane beside its gates and states.
template <typename scalar_t>
struct UserPhase {
  // Of a normalization: mean and scale, and in the backward pass the means of the gradients and of
  // their products with the normalized values.
  static constexpr int kStats = 4;

  int phase;
  scalar_t* slots;  // [slots, ld_slots] what one phase hands to the next; whole vectors
  int64_t ld_slots;
  scalar_t*
      sums;  // [norms] vectors to which its values are added, or in the backward pass [norms, 2]
  const scalar_t* stats;  // [norms, kStats]
};

// What passes must know of a cell. The gradients of the gates are C columns of H: the first G are what
// W_ih gave, in the order of input_order, and those from first_recurrent on what W_hh gave, in that of
// recurrent_order. So those gates for which both are the same need one.
struct UserShape {
  int gates, states, kept, extras;
  int recurrent;  // the state that W_hh sees
  int columns, first_recurrent;
  const int *input_order, *recurrent_order;  // [G]
  int phases, slots, gradient_slots, norms;
  const UserNorm* norm_table;  // [norms]
};

// What a step needs to know of a lane, for all of its units.
template <typename scalar_t>
struct UserForwardRow {
  int64_t row;
  int64_t before;            // the row of the step before, as in entering_row
  const scalar_t* pre;       // [G*H] without b_ih
  scalar_t* h;               // what W_hh sees next; whole vectors
  bool is_reset;             // that is not the state after this step
  const scalar_t* reset_to;  // [H] but this, or null: zeros
  int64_t ends;              // the sequence that ends here, or -1
  UserPhase<scalar_t> in;
};

template <typename scalar_t>
struct UserBackwardRow {
  int64_t row;
  int64_t before;
  int64_t reset;    // the row of a reset after this step whose gradient is wanted, or -1
  scalar_t gate;    // on what came from the step after this one
  bool is_last;     // there is none in the lane
  int64_t ends;     // the sequence that ends here, or -1
  scalar_t* carry;  // [S, ld_carry] what a step hands to the one before, W_hh aside
  int64_t ld_carry;
  scalar_t* d;           // [C*H]
  scalar_t* extra_sums;  // [E, ld_carry], to which go gradients of extras that all rows have alike
  UserPhase<scalar_t> in;
};

template <typename scalar_t>
struct UserTensors {
  UserShape cell;
  const scalar_t* const* initial;     // S of [B, H], each null: zeros
  scalar_t* const* states;            // S of [N, H] after each step
  const ResetTo<scalar_t>* reset_to;  // [S], or null: zeros
  const Extra<scalar_t>* extras;      // [E]
  scalar_t* pre;  // [N, G*H] the input's part of the gates without b_ih, or null
  // [N, K*H] values for the backward pass, then [norms, 2] means and scales; or null: not wanted
  scalar_t* kept;
  int64_t ld_kept;  // its row stride: G*H where it takes the place of `pre`
};

// Where state_row has a row, kFirstReset + r stands for the state that a reset at row r gives.
constexpr int64_t kFirstReset = kNoRow + 1;

// State k, [H], as it enters a step, or null where it is zeros.
template <typename scalar_t>
static inline const scalar_t* entering_row(const LayerParams<scalar_t>& p,
                                           const UserTensors<scalar_t>& of, int k, int64_t before) {
  if (of.reset_to && before != kNoRow && before < kNoRow / 2) {
    const ResetTo<scalar_t>& to = of.reset_to[k];
    const int64_t row = before - kFirstReset;
    return to.data + row * to.row_stride + row % p.layout.B * to.sequence_stride;
  }
  return state_row<scalar_t>(of.states[k], p.H, of.initial[k], p.H, before);
}

// Of LayerParams, hx and cx, W_hr and ld_out are not used; W_hh is null where the cell has none.
template <typename scalar_t>
struct UserForwardParams : LayerParams<scalar_t>, UserTensors<scalar_t> {
  scalar_t* const* last;  // S of [B, H] after each sequence's last step
  // A phase of the cell, of a step of one lane and the units [begin, end), as many of them as there
  // are: `acc` holds what W_hh gives, a vector of each gate, then those of the next units. Only the
  // first phase reads it.
  void (*run)(const UserForwardParams& p, const UserForwardRow<scalar_t>& row, int64_t begin,
              int64_t end, const scalar_t* acc);
};

// Of BwdParams, what concerns the output, c and projections is not used either, nor losses by lane,
// masks and lanes that overlap. A weight's gradient is null where it is not wanted.
template <typename scalar_t>
struct UserBackwardParams : BwdParams<scalar_t>, UserTensors<scalar_t> {
  const scalar_t* const* d_states;  // S of [N, H], each null: zeros
  const scalar_t* const* d_last;    // S of [B, H], likewise
  scalar_t* const* d_initial;       // S of [B, H], each null: not wanted
  // E of [N, H], or [H] of those that all rows have alike; each null: not wanted
  scalar_t* const* d_extras;
  // S of [N, H], each null: not wanted, or null. What is not a reset's row is not written.
  scalar_t* const* d_reset_to;
  scalar_t clip_grad;  // the bound of what a step hands to the one before; 0: none
  // The derivative of a phase, likewise: `acc` holds what W_hh hands back, for the last phase.
  void (*run)(const UserBackwardParams& p, const UserBackwardRow<scalar_t>& row, int64_t begin,
              int64_t end, const scalar_t* acc);
};

}  // namespace fastbptt
