// Tangents of a layer's passes, on any device: the products for all steps at once by torch, and between
// them what only goes step by step (tangents.h). With F a layer and G its backward pass, rnn_jvp is the
// derivative of F along given tangents, rnn_bwd_jvp that of G: of them follow forward mode and, since the
// gradients of <u, G> are the tangents of F and of G along u, the derivative of the backward pass.
//
//   forward   pre' = x' W_ih^T + x W_ih'^T + h W_hh'^T + b', steps
//   backward  steps, dx' = d' W_ih + d W_ih', dW' = d'^T x + d^T x' and likewise of the others
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "tangent_rows.h"
#include "tangents.h"

namespace fastbptt {
namespace {

using ForwardTuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

const auto& forward_steps() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastbptt::rnn_jvp_steps", "")
          .typed<ForwardTuple(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                              const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&,
                              const Tensor&, const OptionalTensor&, const Tensor&,
                              const OptionalTensor&, const OptionalTensor&, int64_t, bool, bool,
                              c10::string_view)>();
  return op;
}

// The tangents of pre-activations as far as what they depend on is known, [N, C*H].
Tensor known_pre_activations(Direction& direction, const Tensor& input_t) {
  const DirectionWeights &w = direction.weights, &w_t = direction.weights_t;
  const auto transposed = [](const Tensor& weight) {
    return weight.defined() ? weight.t() : weight;
  };
  Tensor pre = at::empty({direction.shape.N, direction.columns}, direction.options());
  Products in(direction.in(pre));
  in.add(input_t, transposed(direction.in_column_order(w.w_ih)));
  in.add(direction.rows.input, transposed(direction.in_column_order(w_t.w_ih)));
  in.get();
  if (direction.rec_columns > 0) {
    direction.rec(pre)
        .narrow(1, direction.in_columns - direction.rec_columns, direction.rec_columns)
        .zero_();
  }
  if (w_t.w_hh.defined()) direction.rec(pre).addmm_(direction.state_before(), w_t.w_hh.t());
  if (w_t.b_ih.defined()) direction.in(pre).add_(direction.in_column_order(w_t.b_ih));
  if (w_t.b_hh.defined()) direction.rec(pre).add_(w_t.b_hh);
  return pre;
}

ForwardTuple forward_tangents(const LayerCall& call, const LayerTangents& tangents) {
  const LayerShape shape = check_jvp(call, tangents);
  const auto& [input_t, hx_t, cx_t, weights_t] = tangents;
  const Tensor& input = call.input;
  const PlainTorch guard;
  if (shape.N == 0) {
    const int64_t with_c = shape.has_cell_state() ? shape.D : 0;
    return {at::zeros_like(call.output), at::zeros({shape.D, 0, shape.R}, input.options()),
            at::zeros({with_c, 0, shape.H}, input.options()), at::zeros_like(call.c),
            at::zeros_like(call.gates)};
  }
  const LayerRows rows(call, shape);
  const Tensor input_rows = rows.rows(input_t);
  std::vector<Tensor> output_t, h_n_t, c_n_t, c_t, gates_t;
  for (int64_t d = 0; d < shape.D; ++d) {
    Direction direction(rows, weights_t, d);
    const Tensor pre = known_pre_activations(direction, input_rows);
    Tensor projected;
    if (direction.weights_t.w_hr.defined()) {
      projected = at::mm(direction.unprojected(), direction.weights_t.w_hr.t());
    }
    const auto [out, each_c, each_gates, h_n, c_n] = forward_steps().call(
        pre, optional(projected), optional(of_direction(hx_t, d)), optional(of_direction(cx_t, d)),
        direction.output, direction.c, direction.gates, direction.before, optional(rows.gate),
        direction.weights.w_hh, optional(direction.weights.w_hr), call.batch_sizes, shape.T,
        call.batch_first, d == 1, call.cell);
    output_t.push_back(out);
    c_t.push_back(each_c);
    gates_t.push_back(each_gates);
    h_n_t.push_back(h_n);
    c_n_t.push_back(c_n);
  }
  const auto of_cell_state = [&](const std::vector<Tensor>& parts, int64_t count) {
    return shape.has_cell_state() ? stacked(parts)
                                  : at::empty({0, count, shape.H}, input.options());
  };
  return {side_by_side(output_t, call.output.sizes()), stacked(h_n_t),
          of_cell_state(c_n_t, shape.B), of_cell_state(c_t, shape.N),
          shape.S > 0 ? stacked(gates_t) : at::zeros_like(call.gates)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastbptt, m) {
  m.def(kForwardTangentsSchema);
  // The tangents of rnn_fwd's results along those given; None is zeros, and weights_t may be empty.
  // output, c, gates: as rnn_fwd gave and kept them. k1, resets, kappa: tangents are cut, or
  // multiplied, where the backward pass cuts or multiplies gradients.
  m.def(
      "rnn_jvp(Tensor input, Tensor output, Tensor c, Tensor gates, Tensor? hx, Tensor? cx, "
      "Tensor[] weights, Tensor? input_t, Tensor? hx_t, Tensor? cx_t, Tensor?[] weights_t, "
      "bool has_biases, Tensor? batch_sizes, bool batch_first, str cell, int k1=0, "
      "Tensor? resets=None, Tensor? kappa=None) "
      "-> (Tensor output_t, Tensor h_n_t, Tensor c_n_t, Tensor c_t, Tensor gates_t)");
}

TORCH_LIBRARY_IMPL(fastbptt, CompositeExplicitAutograd, m) {
  m.impl("rnn_jvp", rnn_jvp<forward_tangents>);
}

TORCH_LIBRARY_IMPL(fastbptt, Autograd, m) {
  m.impl("rnn_jvp_steps", torch::autograd::autogradNotImplementedFallback());
  m.impl("rnn_jvp", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fastbptt
