// The emulation's body of csrc/cuda/torch/allocate.h: full of NaN, between guard zones.
#pragma once

#include <ATen/ops/from_blob.h>
#include <c10/util/accumulate.h>

#include <sstream>

#include "emulation/runtime.h"

namespace fastbptt {

inline at::Tensor allocate(at::IntArrayRef sizes, const at::TensorOptions& options) {
  std::ostringstream what;
  what << "a tensor of shape " << sizes << ", " << options.dtype();
  const size_t bytes = size_t(c10::multiply_integers(sizes)) * options.dtype().itemsize();
  void* memory = emulation::allocate_guarded(bytes, what.str());
  return at::from_blob(memory, sizes, emulation::free_guarded, options);
}

}  // namespace fastbptt
