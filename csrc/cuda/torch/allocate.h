// Where the operators' glue gets its outputs and workspaces from.
#pragma once

#ifdef FASTBPTT_EMULATED
#include "emulation/allocate.h"
#else

#include <ATen/ops/empty.h>

namespace fastbptt {

// Not initialised.
inline at::Tensor allocate(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::empty(sizes, options);
}

}  // namespace fastbptt

#endif
