// A step of a user's cell on a GPU, as its kernels and what launches them know it. NVRTC reads this too,
// which has no headers of the standard library.
#pragma once

namespace fastbptt {

// "Before" and "after" are in the order of the forward pass. The first `active` sequences take part; a
// packed batch's are sorted by length, so that those which come from the step before are the first ones
// too, and those which go on.
struct UserStep {
  long long row;            // that of sequence 0, where rows are [T, B] or a packed batch's [N]
  long long before, after;  // likewise in the steps before and after it
  int active, from_before, to_after;
};

}  // namespace fastbptt
