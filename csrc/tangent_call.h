// The operators of a layer's tangents: what a call is given, and what that must be.
#pragma once

#include <string>

#include "checks.h"

namespace fastbptt {
namespace {

using OptionalTensorList = c10::List<OptionalTensor>;

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
  const OptionalTensorList& weights;
};
struct ResultGradients {
  const OptionalTensor &output, &h_n, &c_n;
};
struct KeptTangents {
  const OptionalTensor &output, &c, &gates;
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
                            const std::string& suffix, const ResultGradients& grads) {
  const auto& [output, h_n, c_n] = grads;
  const int64_t with_c = shape.has_cell_state() ? shape.D : 0;
  check_like(output, "grad_output" + suffix, call.output);
  if (h_n.has_value()) {
    check_tensor<int64_t>(*h_n, "grad_h_n" + suffix, {shape.D, shape.B, shape.R}, call.input);
  }
  if (c_n.has_value()) {
    check_tensor<int64_t>(*c_n, "grad_c_n" + suffix, {with_c, shape.B, shape.H}, call.input);
  }
}

inline LayerShape check_jvp(const LayerCall& call, const LayerTangents& tangents) {
  const LayerShape shape = check_call(call);
  check_tangents(call, shape, tangents);
  return shape;
}

inline LayerShape check_bwd_jvp(const LayerCall& call, const LayerTangents& tangents,
                                const ResultGradients& grads, const ResultGradients& grads_t,
                                const KeptTangents& kept_t, const c10::List<bool>& needs) {
  const LayerShape shape = check_jvp(call, tangents);
  check_gradients(call, shape, "", grads);
  check_gradients(call, shape, "_t", grads_t);
  check_like(kept_t.output, "output_t", call.output);
  check_like(kept_t.c, "c_t", call.c);
  check_like(kept_t.gates, "gates_t", call.gates);
  TORCH_CHECK(needs.size() == 5,
              "needs must hold 5 flags (the gradient of input, and the tangents of those of input, "
              "hx, cx and weights), got ",
              needs.size());
  TORCH_CHECK((!needs[2] || call.hx.has_value()) && (!needs[3] || call.cx.has_value()),
              "needs asks for the gradient of a state that is absent");
  return shape;
}

inline LayerShape check_bwd_apart(const LayerCall& call, const ResultGradients& grads,
                                  const c10::List<bool>& needs, int64_t groups) {
  const LayerShape shape = check_call(call);
  check_gradients(call, shape, "", grads);
  TORCH_CHECK(groups > 0, "groups must be positive, got ", groups);
  bool are_even = shape.B % groups == 0;
  if (call.batch_sizes.has_value()) {
    const int64_t* size = call.batch_sizes->const_data_ptr<int64_t>();
    for (int64_t t = 0; t < shape.T; ++t) are_even = are_even && size[t] % groups == 0;
  }
  TORCH_CHECK(are_even, "each step must have as many sequences of each of ", groups,
              " groups, got a batch of ", shape.B);
  TORCH_CHECK(needs.size() == 4, "needs must hold 4 flags (input, hx, cx, weights), got ",
              needs.size());
  TORCH_CHECK((!needs[1] || call.hx.has_value()) && (!needs[2] || call.cx.has_value()),
              "needs asks for the gradient of a state that is absent");
  return shape;
}

// The operators, run by `run`.
template <std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> (*run)(const LayerCall&,
                                                                    const LayerTangents&)>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_jvp(
    const Tensor& input, const Tensor& output, const Tensor& c, const Tensor& gates,
    const OptionalTensor& hx, const OptionalTensor& cx, at::TensorList weights,
    const OptionalTensor& input_t, const OptionalTensor& hx_t, const OptionalTensor& cx_t,
    const OptionalTensorList& weights_t, bool has_biases, const OptionalTensor& batch_sizes,
    bool batch_first, c10::string_view cell, int64_t k1, const OptionalTensor& resets,
    const OptionalTensor& kappa) {
  return run({input, output, c, gates, hx, cx, weights, has_biases, batch_sizes, batch_first, cell,
              k1, resets, kappa},
             {input_t, hx_t, cx_t, weights_t});
}

// d_input, its tangent, and those of d_hx, d_cx and of each weight's gradient.
using BackwardTangentTuple = std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>>;

template <BackwardTangentTuple (*run)(const LayerCall&, const LayerTangents&,
                                      const ResultGradients& grads, const ResultGradients& grads_t,
                                      const KeptTangents&, const c10::List<bool>& needs)>
BackwardTangentTuple rnn_bwd_jvp(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
    const OptionalTensor& grad_c_n, const OptionalTensor& grad_output_t,
    const OptionalTensor& grad_h_n_t, const OptionalTensor& grad_c_n_t, const Tensor& input,
    const Tensor& output, const Tensor& c, const Tensor& gates, const OptionalTensor& hx,
    const OptionalTensor& cx, at::TensorList weights, const OptionalTensor& input_t,
    const Tensor& output_t, const Tensor& c_t, const Tensor& gates_t, const OptionalTensor& hx_t,
    const OptionalTensor& cx_t, const OptionalTensorList& weights_t, bool has_biases,
    const OptionalTensor& batch_sizes, bool batch_first, c10::string_view cell,
    c10::List<bool> needs, int64_t k1, const OptionalTensor& resets, const OptionalTensor& kappa) {
  return run({input, output, c, gates, hx, cx, weights, has_biases, batch_sizes, batch_first, cell,
              k1, resets, kappa},
             {input_t, hx_t, cx_t, weights_t}, {grad_output, grad_h_n, grad_c_n},
             {grad_output_t, grad_h_n_t, grad_c_n_t}, {output_t, c_t, gates_t}, needs);
}

// d_input, d_hx, d_cx and each weight's gradients.
using BackwardTuple = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;

template <BackwardTuple (*run)(const LayerCall&, const ResultGradients&,
                               const c10::List<bool>& needs, int64_t groups)>
BackwardTuple rnn_bwd_apart(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                            const OptionalTensor& grad_c_n, const Tensor& input,
                            const Tensor& output, const Tensor& c, const Tensor& gates,
                            const OptionalTensor& hx, const OptionalTensor& cx,
                            at::TensorList weights, bool has_biases,
                            const OptionalTensor& batch_sizes, bool batch_first,
                            c10::string_view cell, c10::List<bool> needs, int64_t groups,
                            int64_t k1, const OptionalTensor& resets, const OptionalTensor& kappa) {
  return run({input, output, c, gates, hx, cx, weights, has_biases, batch_sizes, batch_first, cell,
              k1, resets, kappa},
             {grad_output, grad_h_n, grad_c_n}, needs, groups);
}

}  // namespace
}  // namespace fastbptt
