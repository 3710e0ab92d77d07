// What calls of the operators on CUDA tensors have in common.
#pragma once

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <utility>

#include "cuda/params.cuh"
#include "cuda/torch/glue.h"
#include "tensors.h"

namespace fastbptt {

// For the time of a call: its device, and no autocast, which would round what is not to be rounded.
struct CallGuard {
  c10::DeviceGuard device;
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};

  explicit CallGuard(const Tensor& input) : device(input.device()) {}
};

// Calls fn(scalar_t{}) for the type that a tensor's numbers are stored in.
template <typename Fn>
void for_dtype(const Tensor& tensor, Fn&& fn) {
  switch (tensor.scalar_type()) {
    case at::kDouble: return fn(double{});
    case at::kFloat: return fn(float{});
    case at::kHalf: return fn(half_t{});
    case at::kBFloat16: return fn(bfloat16_t{});
    default: TORCH_INTERNAL_ASSERT(false, "a dtype that checks.h refuses");
  }
}

// A batch's layout on the host, and what kernels need of it on the device.
struct DeviceLayout {
  OwnedLayout host;
  Tensor sizes;  // packed: offsets [T+1], then lengths [B]

  // input: a tensor there; args: OwnedLayout's.
  template <typename... Args>
  explicit DeviceLayout(const Tensor& input, Args&&... args) : host(std::forward<Args>(args)...) {
    if (!host.layout.batch_sizes) return;
    std::vector<int64_t> values = host.offsets;
    const std::vector<int64_t> lengths = sequence_lengths(host.layout);
    values.insert(values.end(), lengths.begin(), lengths.end());
    sizes = to_device(values, input);
  }

  Sequences sequences(int direction, const OptionalTensor& resets) const {
    Sequences result{host.layout, nullptr, direction, rows_of<bool>(resets)};
    result.layout.batch_sizes = nullptr;
    if (!sizes.defined()) return result;
    result.layout.offsets = sizes.const_data_ptr<int64_t>();
    result.lengths = result.layout.offsets + host.layout.T + 1;
    return result;
  }
};

}  // namespace fastbptt
