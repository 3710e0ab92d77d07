// The emulation's body of csrc/cuda/torch/glue.h: the device is the CPU.
#pragma once

#include <ATen/ops/mm.h>

#include <cstring>
#include <vector>

#include "cuda/launch.h"
#include "cuda/torch/allocate.h"

namespace fastbptt {

inline Stream current_stream(const at::Tensor&) { return {}; }

inline void multiply_widening(at::Tensor out, const at::Tensor& a, const at::Tensor& b) {
  at::mm_out(out, a.to(at::kFloat), b.to(at::kFloat));
}

inline at::Tensor to_device(const std::vector<int64_t>& values, const at::Tensor& tensor) {
  const at::Tensor copy = allocate({int64_t(values.size())}, tensor.options().dtype(at::kLong));
  std::memcpy(copy.mutable_data_ptr(), values.data(), sizeof(int64_t) * values.size());
  return copy;
}

}  // namespace fastbptt
