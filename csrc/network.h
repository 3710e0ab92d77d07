// The operator `network`, for callers that need no dispatcher, and the checks of its backward pass.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace fastbptt {

// See its schema in network.cpp.
std::tuple<at::Tensor, at::Tensor, at::Tensor> network(
    const at::Tensor& input, const std::optional<at::Tensor>& hx,
    const std::optional<at::Tensor>& cx, at::TensorList weights, bool has_biases,
    int64_t num_layers, bool bidirectional, const std::optional<at::Tensor>& batch_sizes,
    bool batch_first, c10::string_view cell, double dropout, int64_t k1, int64_t k2, bool last_only,
    bool recompute, const std::optional<at::Tensor>& resets,
    const std::optional<at::Tensor>& kappa);

// The arguments of `network_bwd`; see its schema.
struct NetworkBackwardArguments {
  const std::optional<at::Tensor>&grad_output, &grad_h_n, &grad_c_n;
  const std::optional<at::Tensor>&hx, &cx, &batch_sizes, &resets, &kappa;
  at::TensorList weights, kept, masks;
  bool has_biases;
  int64_t num_layers;
  bool bidirectional, batch_first;
  c10::string_view cell;
  int64_t k1, k2;
  bool last_only;
  const c10::List<bool>& needs;
};

// The operator, run by `run`.
template <std::vector<at::Tensor> (*run)(const NetworkBackwardArguments&)>
std::vector<at::Tensor> network_bwd(
    const std::optional<at::Tensor>& grad_output, const std::optional<at::Tensor>& grad_h_n,
    const std::optional<at::Tensor>& grad_c_n, const std::optional<at::Tensor>& hx,
    const std::optional<at::Tensor>& cx, const std::optional<at::Tensor>& batch_sizes,
    const std::optional<at::Tensor>& resets, const std::optional<at::Tensor>& kappa,
    at::TensorList weights, at::TensorList kept, at::TensorList masks, bool has_biases,
    int64_t num_layers, bool bidirectional, bool batch_first, c10::string_view cell, int64_t k1,
    int64_t k2, bool last_only, c10::List<bool> needs) {
  return run({grad_output, grad_h_n, grad_c_n, hx,    cx,         batch_sizes, resets,
              kappa,       weights,  kept,     masks, has_biases, num_layers,  bidirectional,
              batch_first, cell,     k1,       k2,    last_only,  needs});
}

// All that the operator checks, its layers' own checks too: for tensors without data.
void check_network_backward(const NetworkBackwardArguments& args);

}  // namespace fastbptt
