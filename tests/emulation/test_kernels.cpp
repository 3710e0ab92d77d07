// torch.ops.emulation_test: the test kernels.
#include "emulation/test_kernels.cuh"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "cuda/allocate.h"

namespace fastbptt::test {
namespace {

at::Tensor block_sum(const at::Tensor& x, int64_t fault) {
  const at::Tensor y = allocate({x.size(0)}, x.options());
  const Grid grid{{x.size(0)}, int(x.size(1)), 4 * x.size(1)};
  const auto go = [&](auto kernel) {
    launch(kernel, grid, Stream{}, x.const_data_ptr<float>(), y.mutable_data_ptr<float>());
  };
  switch (Fault(fault)) {
    case Fault::kNone: go(block_sum_kernel<Fault::kNone>); break;
    case Fault::kMissingBarrier: go(block_sum_kernel<Fault::kMissingBarrier>); break;
    case Fault::kDivergentBarrier: go(block_sum_kernel<Fault::kDivergentBarrier>); break;
    case Fault::kEarlyExit: go(block_sum_kernel<Fault::kEarlyExit>); break;
    case Fault::kSharedBounds: go(block_sum_kernel<Fault::kSharedBounds>); break;
    case Fault::kGlobalBounds: go(block_sum_kernel<Fault::kGlobalBounds>); break;
    default: TORCH_CHECK(false);
  }
  return y;
}

at::Tensor warp_sum(const at::Tensor& x, int64_t fault) {
  const at::Tensor y = allocate(x.sizes(), x.options());
  const Grid grid{{x.size(0)}, int(x.size(1))};
  launch(fault ? warp_sum_kernel<Fault::kDivergentShuffle> : warp_sum_kernel<Fault::kNone>, grid,
         Stream{}, x.const_data_ptr<float>(), y.mutable_data_ptr<float>());
  return y;
}

}  // namespace

TORCH_LIBRARY(emulation_test, m) {
  m.def("block_sum(Tensor x, int fault) -> Tensor", block_sum);
  m.def("warp_sum(Tensor x, int fault) -> Tensor", warp_sum);
}

}  // namespace fastbptt::test
