// A pass of a user's cell over one direction of a layer, by pointers.
#pragma once

#include <cstdint>

#include "user_cell/interface.h"

namespace fastbptt {

// A cell that is compiled, for one dtype and instruction set; fastbptt/_cpu_layer.py has the same
// list. See UserShape.
struct UserCell {
  int64_t is_double;
  int64_t gates, states, kept_values, extras, recurrent, columns, first_recurrent;
  int64_t phases, slots, gradient_slots, norms;
  int64_t keeps_pre;  // the backward pass reads `pre`, or what is kept takes its place
  int64_t fits_pre;   // what is kept takes the place of `pre`
  const int *input_order, *recurrent_order;
  const UserNorm* norm_table;
  const char* const* extra_names;  // [extras]
  const char* isa;
  void *forward, *backward;  // the library's functions
};

// Of either pass. See UserForwardParams, UserBackwardParams.
struct UserCall {
  const UserCell* cell;
  int64_t T, B, N, I, H, direction, ld_kept;
  double clip_grad;
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
