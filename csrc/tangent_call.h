// A call of one of the operators of a layer's tangents: what it is given, and what that must be.
#pragma once

#include <string>

#include "checks.h"

namespace fastbptt {
namespace {

using OptionalTensors = c10::List<OptionalTensor>;

// What an operator is given of the layer itself.
struct LayerCall {
  const Tensor &input, &output, &c, &gates;
  const OptionalTensor &hx, &cx;
  at::TensorList weights;
  bool has_biases;
  const OptionalTensor& batch_sizes;
  bool batch_first;
  c10::string_view cell;
  int64_t k1;
  const OptionalTensor &resets, &kappa;
};

struct LayerTangents {
  const OptionalTensor &input, &hx, &cx;
  const OptionalTensors& weights;
};

// What a primal call must be, on any device. The kernels assume.
inline LayerShape check_call(const LayerCall& call) {
  const c10::List<bool> needs({false, false, false, false});
  const OptionalTensor none;
  const BackwardArguments args{{call.input, call.hx, call.cx, call.weights, call.has_biases,
                                call.batch_sizes, call.batch_first, call.cell, call.resets},
                               none,
                               none,
                               none,
                               call.output,
                               call.c,
                               call.gates,
                               needs,
                               call.k1,
                               call.k1,
                               false,
                               call.kappa,
                               none,
                               0,
                               0,
                               false,
                               false,
                               none};
  const LayerShape shape = check_backward(args, HalfTypes::kNone);
  TORCH_CHECK(shape.S == 0 || shape.has_gates(call.gates) || shape.N == 0,
              "gates must be kept, got none");
  return shape;
}

inline void check_like(const OptionalTensor& tensor, const std::string& name, const Tensor& like) {
  if (tensor.has_value()) check_tensor<int64_t>(*tensor, name, like.sizes(), like);
}

inline void check_tangents(const LayerCall& call, const LayerShape& shape, const LayerTangents& t) {
  const Tensor& input = call.input;
  check_like(t.input, "input_t", input);
  if (t.hx.has_value()) check_tensor<int64_t>(*t.hx, "hx_t", {shape.D, shape.B, shape.R}, input);
  if (t.cx.has_value()) {
    TORCH_CHECK(shape.has_cell_state(), "cx_t is for an LSTM only, and cell is \"", call.cell,
                "\"");
    check_tensor<int64_t>(*t.cx, "cx_t", {shape.D, shape.B, shape.H}, input);
  }
  TORCH_CHECK(t.weights.empty() || t.weights.size() == call.weights.size(),
              "weights_t must be empty or hold one for each of ", call.weights.size(),
              " weights, got ", t.weights.size());
  for (size_t i = 0; i < t.weights.size(); ++i) {
    check_like(t.weights.get(i), "weights_t[" + std::to_string(i) + "]", call.weights[i]);
  }
}

inline void check_gradients(const LayerCall& call, const LayerShape& shape,
                            const std::string& suffix, const OptionalTensor& output,
                            const OptionalTensor& h_n, const OptionalTensor& c_n) {
  const int64_t with_c = shape.has_cell_state() ? shape.D : 0;
  check_like(output, "grad_output" + suffix, call.output);
  if (h_n.has_value()) {
    check_tensor<int64_t>(*h_n, "grad_h_n" + suffix, {shape.D, shape.B, shape.R}, call.input);
  }
  if (c_n.has_value()) {
    check_tensor<int64_t>(*c_n, "grad_c_n" + suffix, {with_c, shape.B, shape.H}, call.input);
  }
}

}  // namespace
}  // namespace fastbptt
