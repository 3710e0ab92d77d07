// The one place where operator arguments are validated, for every device. Kernels assume.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string>

#include "params.h"

namespace fastbptt {

// The sizes of one layer.
struct LayerShape {
  int64_t T, B, N, I, H, D;  // D: directions
  int64_t weights_per_direction;

  at::Tensor w_ih(at::TensorList w, int64_t d) const { return w[d * weights_per_direction]; }
  at::Tensor w_hh(at::TensorList w, int64_t d) const { return w[d * weights_per_direction + 1]; }
  at::Tensor b_ih(at::TensorList w, int64_t d) const { return w[d * weights_per_direction + 2]; }
  at::Tensor b_hh(at::TensorList w, int64_t d) const { return w[d * weights_per_direction + 3]; }
};

inline void check_tensor(const at::Tensor& tensor, const std::string& name, at::IntArrayRef sizes,
                         const at::Tensor& input) {
  TORCH_CHECK(tensor.defined(), name, " must be a tensor");
  TORCH_CHECK(tensor.sizes() == sizes, name, " must have shape ", sizes, ", got ", tensor.sizes());
  TORCH_CHECK(tensor.scalar_type() == input.scalar_type(), name, " must have input's dtype ",
              input.scalar_type(), ", got ", tensor.scalar_type());
  TORCH_CHECK(tensor.device() == input.device(), name, " must be on input's device ",
              input.device(), ", got ", tensor.device());
}

inline Cell parse_nonlinearity(c10::string_view name) {
  if (name == "tanh") return Cell::kTanh;
  if (name == "relu") return Cell::kRelu;
  TORCH_CHECK(name == "identity", "nonlinearity must be \"tanh\", \"relu\" or \"identity\", got \"",
              name, "\"");
  return Cell::kIdentity;
}

// Fills T, B, N from a uniform input [T, B, I] or [B, T, I], or a packed one [N, I] and its
// batch_sizes.
inline void check_batch_sizes(const at::Tensor& input, const std::optional<at::Tensor>& batch_sizes,
                              bool batch_first, LayerShape* shape) {
  if (!batch_sizes.has_value()) {
    TORCH_CHECK(input.dim() == 3, "input must have 3 dimensions, got ", input.dim());
    shape->T = input.size(batch_first ? 1 : 0);
    shape->B = input.size(batch_first ? 0 : 1);
    shape->N = shape->T * shape->B;
    TORCH_CHECK(shape->T > 0, "input must have at least one time step, got shape ", input.sizes());
    return;
  }
  const at::Tensor& sizes = *batch_sizes;
  TORCH_CHECK(input.dim() == 2, "a packed input must have 2 dimensions, got ", input.dim());
  TORCH_CHECK(sizes.dim() == 1 && sizes.scalar_type() == at::kLong && sizes.device().is_cpu() &&
                  sizes.is_contiguous() && sizes.numel() > 0,
              "batch_sizes must be a non-empty contiguous 1-D int64 tensor on the CPU, got shape ",
              sizes.sizes(), ", dtype ", sizes.scalar_type(), ", device ", sizes.device());
  TORCH_CHECK(!batch_first, "batch_first must be False for a packed input, got True");
  const int64_t* size = sizes.const_data_ptr<int64_t>();
  shape->T = sizes.numel();
  shape->B = size[0];
  shape->N = 0;
  for (int64_t t = 0; t < shape->T; ++t) {
    TORCH_CHECK(size[t] > 0 && (t == 0 || size[t] <= size[t - 1]),
                "batch_sizes must be positive and never increase, got ", size[t], " at step ", t);
    shape->N += size[t];
  }
  TORCH_CHECK(input.size(0) == shape->N, "a packed input must have sum(batch_sizes) = ", shape->N,
              " rows, got ", input.size(0));
}

inline LayerShape check_layer(const at::Tensor& input, const std::optional<at::Tensor>& hx,
                              at::TensorList weights, bool has_biases,
                              const std::optional<at::Tensor>& batch_sizes, bool batch_first) {
  LayerShape shape{};
  TORCH_CHECK_NOT_IMPLEMENTED(
      input.scalar_type() == at::kFloat || input.scalar_type() == at::kDouble,
      "input must have dtype float32 or float64, got ", input.scalar_type());
  check_batch_sizes(input, batch_sizes, batch_first, &shape);
  shape.weights_per_direction = has_biases ? 4 : 2;
  shape.D = int64_t(weights.size()) / shape.weights_per_direction;
  TORCH_CHECK((shape.D == 1 || shape.D == 2) &&
                  shape.D * shape.weights_per_direction == int64_t(weights.size()),
              "weights must hold ", shape.weights_per_direction,
              " tensors for each of one or two directions, got ", weights.size());
  TORCH_CHECK(weights[0].dim() == 2, "weight_ih must have 2 dimensions, got ", weights[0].dim());
  shape.I = input.size(-1);
  shape.H = weights[0].size(0);
  TORCH_CHECK(shape.H > 0, "weight_ih must have at least one row, got shape ", weights[0].sizes());
  for (int64_t d = 0; d < shape.D; ++d) {
    const std::string suffix = d == 0 ? "" : " of the reverse direction";
    check_tensor(shape.w_ih(weights, d), "weight_ih" + suffix, {shape.H, shape.I}, input);
    check_tensor(shape.w_hh(weights, d), "weight_hh" + suffix, {shape.H, shape.H}, input);
    if (!has_biases) continue;
    check_tensor(shape.b_ih(weights, d), "bias_ih" + suffix, {shape.H}, input);
    check_tensor(shape.b_hh(weights, d), "bias_hh" + suffix, {shape.H}, input);
  }
  if (hx.has_value()) check_tensor(*hx, "hx", {shape.D, shape.B, shape.H}, input);
  return shape;
}

// The shape of the layer's output, and of its gradient.
inline std::vector<int64_t> output_sizes(const at::Tensor& input, const LayerShape& shape) {
  std::vector<int64_t> sizes = input.sizes().vec();
  sizes.back() = shape.D * shape.H;
  return sizes;
}

}  // namespace fastbptt
