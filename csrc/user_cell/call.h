// A call of a user's cell from Python: one direction of a layer.
#pragma once

#include <cstdint>

#include "user_cell/interface.h"

namespace fastbptt {

// Of either pass; fastbptt/_compiled.py has the same list. See UserForwardParams, UserBackwardParams.
struct UserCall {
  int64_t is_double;
  int64_t T, B, N, I, H, direction, ld_kept;
  double clip_grad;
  int64_t gates, states, kept_values, extras, recurrent, columns, first_recurrent;
  int64_t phases, slots, gradient_slots, norms;
  const int *input_order, *recurrent_order;
  const UserNorm* norm_table;
  void *forward, *backward;    // the library's functions
  const int64_t* offsets;      // [T+1], or null if uniform
  const int64_t* batch_sizes;  // [T], or null if uniform
  const bool* resets;          // [N]
  const void *input, *w_ih, *w_hh, *b_ih, *b_hh;
  const void* const* initial;
  void* const* all_states;
  void* const* last;
  const void* const* extra_data;
  const int64_t* extra_strides;  // [E, 2] by row, by unit
  const void* const* reset_to;   // null: zeros
  const int64_t* reset_strides;  // [S, 2] by row, by sequence
  void *pre, *kept;
  const void* kappa;
  const void *const *d_states, *const *d_last;
  void *const *d_initial, *const *d_extras, *const *d_reset_to;
  void *d_input, *d_w_ih, *d_w_hh, *d_b_ih, *d_b_hh;
};

// On at most so many threads.
void run_user_forward(const UserCall& call, int threads);
void run_user_backward(const UserCall& call, int threads);

}  // namespace fastbptt
