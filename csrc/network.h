// The operator `network`, for callers that need no dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace fastbptt {

// See its schema in network.cpp.
std::tuple<at::Tensor, at::Tensor, at::Tensor> network(
    const at::Tensor& input, const std::optional<at::Tensor>& hx,
    const std::optional<at::Tensor>& cx, at::TensorList weights, bool has_biases,
    int64_t num_layers, bool bidirectional, const std::optional<at::Tensor>& batch_sizes,
    bool batch_first, c10::string_view cell, double dropout, int64_t k1, int64_t k2, bool last_only,
    bool recompute, const std::optional<at::Tensor>& resets,
    const std::optional<at::Tensor>& kappa);

}  // namespace fastbptt
