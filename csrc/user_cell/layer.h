// A layer of a user's cell in one direction on the CPU.
#pragma once

#include <vector>

#include "user_cell/call.h"
#include "user_cell/layout.h"

namespace fastbptt {

struct UserResults {
  std::vector<Tensor> states;  // of every step, [T, B, H] each
  std::vector<Tensor> last;    // [B, H] each
  // For the backward pass, the same tensor or undefined where it is not needed: the input's part of
  // the gates, [N, G*H], and values, [N, ...].
  Tensor pre, kept;
};

// keep: for a backward pass.
UserResults run_user_layer(const UserCell& cell, const UserArguments& args, bool keep);

// Of each argument that may have a gradient.
template <typename T>
struct UserEach {
  T input, w_ih, w_hh, b_ih, b_hh;
  std::vector<T> initial, extras, reset_to;
};

struct UserGiven {
  const std::vector<OptionalTensor>& d_states;  // for each state [T, B, H], or none: zeros
  const std::vector<OptionalTensor>& d_last;    // [B, H], likewise
  // [T, B], what of a gradient passes between a step and the one before it, or none: all. At a reset
  // nothing passes.
  const OptionalTensor& kappa;
  double
      clip_grad;  // the bound of what comes to the states that enter a step, before kappa; 0: none
};

// The gradients that are wanted of the same arguments; the others are undefined. Those of extras and
// of reset_to are [T, B, H] each, or [H] of an extra that all rows have alike, to be summed by who
// gave fewer numbers.
UserEach<Tensor> user_gradients(const UserCell& cell, const UserArguments& args,
                                const UserResults& results, const UserGiven& given,
                                const UserEach<bool>& wanted);

}  // namespace fastbptt
