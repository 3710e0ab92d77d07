// The operators as every device registers them: schemas, and the arguments gathered into structs.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

namespace fastbptt {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// One layer, its one or two directions (D). weights: w_ih, w_hh[, b_ih, b_hh][, w_hr] each.
// input [T, B, I] ([B, T, I] if batch_first, or packed [N, I] with batch_sizes [T]); output like
// input with D*R columns; hx and h_n [D, B, R], cx and c_n [D, B, H]. cell: "tanh", "relu",
// "identity", "gru" or "lstm". c [D, N, H] and gates [D, N, S*H] are for the backward pass; what a
// cell has not is empty, and so are gates that are not to be kept. resets: bool, like input
// without its features; where it is true the state that enters the step is zeros.
constexpr const char* kForwardSchema =
    "rnn_fwd(Tensor input, Tensor? hx, Tensor? cx, Tensor[] weights, bool has_biases, "
    "Tensor? batch_sizes, bool batch_first, str cell, bool keep_gates, Tensor? resets=None) "
    "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor c, Tensor gates)";

// gates: empty to have them computed again. needs: input, hx, cx, weights; a gradient that is not
// needed comes back empty.
// k1, k2, last_only: windows as in TBPTT(k1, k2), or k1 = 0 for none. kappa: like resets in
// input's dtype, factors of the gradient on its way from a step to the one before. mask: like
// input, factors of its gradient.
// Where windows overlap (k2 > k1) a call may take some of them: then the gradient of input is that
// of the steps they lie in. by_lane: the gradient of output, or of input, has a row for each step
// of each lane rather than for each step, so that a stack keeps windows apart; how many rows those
// are, and in which order, is the device's own affair. It may depend on which steps have a loss: so
// a layer that takes its gradient by lane is also given that of the stack's output, grad_network
// (None: zeros).
constexpr const char* kBackwardSchema =
    "rnn_bwd(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, "
    "Tensor output, Tensor c, Tensor gates, Tensor? hx, Tensor? cx, Tensor[] weights, "
    "bool has_biases, Tensor? batch_sizes, bool batch_first, str cell, bool[] needs, "
    "int k1=0, int k2=0, bool last_only=False, Tensor? resets=None, Tensor? kappa=None, "
    "Tensor? mask=None, int first_window=0, int num_windows=0, bool grad_by_lane=False, "
    "bool input_by_lane=False, Tensor? grad_network=None) -> (Tensor, Tensor, Tensor, Tensor[])";

struct LayerArguments {
  const Tensor& input;
  const OptionalTensor &hx, &cx;
  at::TensorList weights;
  bool has_biases;
  const OptionalTensor& batch_sizes;
  bool batch_first;
  c10::string_view cell;
  const OptionalTensor& resets;
};

struct ForwardArguments : LayerArguments {
  bool keep_gates;
};

struct BackwardArguments : LayerArguments {
  const OptionalTensor &grad_output, &grad_h_n, &grad_c_n;
  const Tensor &output, &c, &gates;
  const c10::List<bool>& needs;
  int64_t k1, k2;
  bool last_only;
  const OptionalTensor &kappa, &mask;
  int64_t first_window, num_windows;
  bool grad_by_lane, input_by_lane;
  const OptionalTensor& grad_network;
};

struct ForwardResults {
  Tensor output, h_n, c_n, c, gates;
};

struct BackwardResults {
  Tensor d_input, d_hx, d_cx;
  std::vector<Tensor> d_weights;
};

// What to register for a device that runs a layer by `run`.
template <ForwardResults (*run)(const ForwardArguments&)>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_fwd(
    const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx, at::TensorList weights,
    bool has_biases, const OptionalTensor& batch_sizes, bool batch_first, c10::string_view cell,
    bool keep_gates, const OptionalTensor& resets) {
  const ForwardResults r = run(
      {{input, hx, cx, weights, has_biases, batch_sizes, batch_first, cell, resets}, keep_gates});
  return {r.output, r.h_n, r.c_n, r.c, r.gates};
}

template <BackwardResults (*run)(const BackwardArguments&)>
std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> rnn_bwd(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
    const OptionalTensor& grad_c_n, const Tensor& input, const Tensor& output, const Tensor& c,
    const Tensor& gates, const OptionalTensor& hx, const OptionalTensor& cx, at::TensorList weights,
    bool has_biases, const OptionalTensor& batch_sizes, bool batch_first, c10::string_view cell,
    c10::List<bool> needs, int64_t k1, int64_t k2, bool last_only, const OptionalTensor& resets,
    const OptionalTensor& kappa, const OptionalTensor& mask, int64_t first_window,
    int64_t num_windows, bool grad_by_lane, bool input_by_lane,
    const OptionalTensor& grad_network) {
  const BackwardResults r =
      run({{input, hx, cx, weights, has_biases, batch_sizes, batch_first, cell, resets},
           grad_output,
           grad_h_n,
           grad_c_n,
           output,
           c,
           gates,
           needs,
           k1,
           k2,
           last_only,
           kappa,
           mask,
           first_window,
           num_windows,
           grad_by_lane,
           input_by_lane,
           grad_network});
  return {r.d_input, r.d_hx, r.d_cx, r.d_weights};
}

}  // namespace fastbptt
