// The arguments of a layer of a user's cell in one direction, as kernels read them, on any device.
#pragma once

#include <string>
#include <vector>

#include "arguments.h"

namespace fastbptt {

// Axes as in params.h; a packed batch has N rows in place of [T, B].
struct UserArguments {
  const Tensor& input;                         // [T, B, I]
  const Tensor& w_ih;                          // [G*H, I]
  const OptionalTensor& w_hh;                  // [G*H, H]; none where the cell does not use it
  const OptionalTensor &b_ih, &b_hh;           // [G*H]
  const std::vector<OptionalTensor>& initial;  // for each state [B, H], or none: zeros
  const std::vector<Tensor>& extras;           // each a number, [H], [T, B, H] or [T, B, 1]
  const OptionalTensor& resets;                // bool [T, B]: the states that enter are zeros
  const OptionalTensor& batch_sizes;           // [T] on the CPU, of a packed batch
  int64_t direction;                           // 1, or -1: from the last step to the first
  const std::vector<Tensor>& reset_to;  // for each state [T, B, H], what it is at a reset; or empty
};

// They, checked, contiguous and with their sizes.
struct UserLayout {
  int64_t T, B, N, I, H;
  Tensor input, w_ih;
  OptionalTensor w_hh, b_ih, b_hh, resets, batch_sizes;
  std::vector<OptionalTensor> initial;
  std::vector<Tensor> extras;          // in input's dtype
  std::vector<int64_t> strides;        // of each extra by row and by unit
  std::vector<Tensor> reset_to;        // [H] rows
  std::vector<int64_t> reset_strides;  // of each by row and by sequence
};

// A tensor whose numbers lie in memory as they are, one after another. torch's own operators are handed no
// others, but what Python calls directly may be a view that says it is negated.
Tensor as_stored(const Tensor& tensor);

// A number among the extras may be on any device and of any dtype. What is not input's is an error,
// in names of the module's; an extra has its own.
UserLayout user_layout(int64_t gates, const std::vector<std::string>& extra_names,
                       const UserArguments& args);

}  // namespace fastbptt
