// The steps of a user's cell on a device, one after another: a product with W_hh and one kernel each.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "few_rows.h"

namespace fastbptt {

// Of either pass; fastbptt/_device_layer.py has the same list.
struct UserStepsCall {
  int64_t T, B, direction;
  const int64_t* batch_sizes;  // [T], on the host, or null if uniform
  // With the arguments of CUDA's cuLaunchKernel; gives 0, or the number of an error.
  int (*launch)(void* kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream,
                void** arguments, void** extra);
  void *kernel, *finish;  // finish: after the backward pass, for all sequences; or null: not wanted
  void* stream;
  void* arguments;  // the kernels' first one; the second is a UserStep
  int64_t blocks_of_row, threads, shared_bytes;
  // The kernels of few_rows.h in their order; or null: products are the library's.
  void* products[kProductKernels];
};

// The products of a pass, all without rows where the cell has no W_hh. Of each step: in the forward pass
// before the kernel, product = rows weight, of the sequences that take part; in the backward pass after
// it, of the step's own rows.
struct UserProducts {
  at::Tensor rows;    // [B, H], or in the backward pass [N, G*H]
  at::Tensor weight;  // [H, G*H], or [G*H, H]; columns are contiguous where call.products are there
  at::Tensor product;  // [B, G*H], or [B, H]
};

// Gives what the first launch that fails gives, or 0. All is left to the device's current stream.
int run_user_steps(const UserStepsCall& call, bool goes_back,
                   const std::optional<UserProducts>& products);

}  // namespace fastbptt
