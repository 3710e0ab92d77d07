// The emulation's body of csrc/cuda/torch/glue.h: the device is the CPU.
#pragma once

#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <cstring>
#include <vector>

#include "cuda/launch.h"
#include "cuda/torch/allocate.h"
#include "emulation/recording.h"

namespace fastbptt {

inline Stream current_stream(const at::Tensor&) { return emulation::current_stream; }

// A graph has the addresses of tensors, and keeps none of them alive.
inline void multiply_by_library(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  const auto at_address = [](const at::Tensor& tensor) {
    return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options());
  };
  emulation::run_or_record([out = at_address(out), a = at_address(a), b = at_address(b)] {
    at::Tensor to = out;
    at::mm_out(to, a.to(out.scalar_type()), b.to(out.scalar_type()));
  });
}

inline at::Tensor to_device(const std::vector<int64_t>& values, const at::Tensor& tensor) {
  const at::Tensor copy = allocate({int64_t(values.size())}, tensor.options().dtype(at::kLong));
  std::memcpy(copy.mutable_data_ptr(), values.data(), sizeof(int64_t) * values.size());
  return copy;
}

}  // namespace fastbptt
