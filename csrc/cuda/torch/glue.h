// What the operators' glue needs of torch's CUDA side.
#pragma once

#ifdef FASTBPTT_EMULATED
#include "emulation/glue.h"
#else

#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/version.h>

#include <cstring>
#include <vector>

#include "cuda/launch.h"

namespace fastbptt {

// The current stream of the tensor's device.
inline Stream current_stream(const at::Tensor& tensor) {
  return c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream();
}

// out = a b. Where a and b are of 16 bits out may be in float32: what the product sums is not rounded.
inline void multiply_by_library(at::Tensor out, const at::Tensor& a, const at::Tensor& b) {
  if (out.scalar_type() == a.scalar_type()) {
    at::mm_out(out, a, b);
    return;
  }
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 8
  at::mm_out(out, a, b, at::kFloat);
#else
  out.copy_(at::mm(a, b));
#endif
}

// The values on the device of a tensor, without a wait for it.
inline at::Tensor to_device(const std::vector<int64_t>& values, const at::Tensor& tensor) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(current_stream(tensor), &status), "cudaStreamIsCapturing");
  TORCH_CHECK(status == cudaStreamCaptureStatusNone,
              "a packed input cannot be run while a CUDA graph is captured: its batch_sizes are on "
              "the CPU, and the graph would keep those of this call");
  const int64_t count = int64_t(values.size());
  const at::Tensor pinned =
      at::empty({count}, at::TensorOptions().dtype(at::kLong).pinned_memory(true));
  std::memcpy(pinned.mutable_data_ptr(), values.data(), sizeof(int64_t) * values.size());
  return pinned.to(tensor.device(), at::kLong, /*non_blocking=*/true);
}

}  // namespace fastbptt

#endif
