// The backward passes of a layer in dual numbers (see tangents.cpp), and the one whose sums over the batch
// are kept apart by group, which has the same steps without tangents.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "tangent_rows.h"
#include "tangents.h"

namespace fastbptt {
namespace {

using StepsTuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

const auto& backward_steps() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastbptt::rnn_bwd_jvp_steps", "")
          .typed<StepsTuple(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                            const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                            const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                            const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                            const OptionalTensor&, const OptionalTensor&, const Tensor&,
                            const OptionalTensor&, bool, const OptionalTensor&, int64_t, bool, bool,
                            c10::string_view)>();
  return op;
}

// The backward steps of a direction: values, and tangents where `kept_t` is there.
BackwardTangents run_backward_steps(Direction& direction, const ResultGradients& grads,
                                    const ResultGradients& grads_t, const KeptTangents* kept_t,
                                    const Tensor& before_t, bool needs_states) {
  const LayerRows& rows = direction.rows;
  const int64_t d = direction.d;
  const DirectionWeights &w = direction.weights, &w_t = direction.weights_t;
  const bool weights_too = w_t.w_hh.defined() || w_t.w_hr.defined();
  const auto with_tangent = [&](const Tensor& weight, const Tensor& tangent) {
    if (!weights_too || !weight.defined()) return weight;
    return at::cat({weight, tangent.defined() ? tangent : at::zeros_like(weight)});
  };
  const auto rows_of = [&](const OptionalTensor& tensor) {
    return optional(rows.output_rows(tensor, d));
  };
  const auto state_of = [&](const OptionalTensor& tensor) {
    return optional(of_direction(tensor, d));
  };
  OptionalTensor output_t, c_t, gates_t;
  if (kept_t) {
    output_t = rows_of(kept_t->output);
    c_t = state_of(kept_t->c);
    gates_t = state_of(kept_t->gates);
  }
  BackwardTangents r;
  std::tie(r.d, r.d_t, r.d_projected, r.d_projected_t, r.d_hx, r.d_hx_t, r.d_cx, r.d_cx_t) =
      backward_steps().call(
          rows_of(grads.output), rows_of(grads_t.output), state_of(grads.h_n),
          state_of(grads_t.h_n), state_of(grads.c_n), state_of(grads_t.c_n), direction.output,
          direction.c, direction.gates, direction.before, output_t, c_t, gates_t,
          optional(before_t), optional(rows.gate), with_tangent(w.w_hh, w_t.w_hh),
          optional(with_tangent(w.w_hr, w_t.w_hr)), needs_states, rows.call.batch_sizes,
          rows.shape.T, rows.call.batch_first, d == 1, rows.call.cell);
  return r;
}

BackwardTangentTuple gradients_and_tangents(const LayerCall& call, const LayerTangents& tangents,
                                            const ResultGradients& grads,
                                            const ResultGradients& grads_t,
                                            const KeptTangents& kept_t,
                                            const c10::List<bool>& needs) {
  const LayerShape shape = check_bwd_jvp(call, tangents, grads, grads_t, kept_t, needs);
  const auto& [input_t, hx_t, cx_t, weights_t] = tangents;
  const auto& [output_t, c_t, gates_t] = kept_t;
  const Tensor& input = call.input;
  const at::TensorList weights = call.weights;
  const PlainTorch guard;
  const auto options = input.options();
  const auto result = [&](bool needed, c10::IntArrayRef sizes) {
    return needed ? at::zeros(sizes, options) : at::empty({0}, options);
  };
  std::vector<Tensor> d_weights;
  if (shape.N == 0) {
    for (const Tensor& weight : weights) d_weights.push_back(result(needs[4], weight.sizes()));
    return {result(needs[0], input.sizes()), result(needs[1], input.sizes()),
            result(needs[2], {shape.D, 0, shape.R}), result(needs[3], {shape.D, 0, shape.H}),
            d_weights};
  }
  const LayerRows rows(call, shape);
  const Tensor input_rows = rows.rows(input_t);
  const auto empty_like_input = [&](bool needed) {
    return needed ? at::empty({shape.N, shape.I}, options) : at::empty({0}, options);
  };
  Products d_input(empty_like_input(needs[0])), d_input_t(empty_like_input(needs[1]));
  std::vector<Tensor> d_hx, d_cx;
  for (int64_t d = 0; d < shape.D; ++d) {
    Direction direction(rows, weights_t, d);
    const DirectionWeights &w = direction.weights, &w_t = direction.weights_t;
    const Tensor out_t = rows.output_rows(output_t, d);
    Tensor before_t, h_before_t;
    if (needs[4] || direction.is_gru()) {
      h_before_t = rows.tangents_before(out_t, of_direction(hx_t, d), d);
    }
    if (shape.has_cell_state()) {
      before_t = rows.tangents_before((*c_t)[d], of_direction(cx_t, d), d);
    } else if (direction.is_gru()) {
      before_t = h_before_t;
    }
    const BackwardTangents r =
        run_backward_steps(direction, grads, grads_t, &kept_t, before_t, needs[2] || needs[3]);
    const Tensor d_in = direction.in(r.d), d_in_t = direction.in(r.d_t);
    const Tensor w_ih = direction.in_column_order(w.w_ih),
                 w_ih_t = direction.in_column_order(w_t.w_ih);
    if (needs[0]) d_input.add(d_in, w_ih);
    if (needs[1]) {
      d_input_t.add(d_in_t, w_ih);
      d_input_t.add(d_in, w_ih_t);
    }
    d_hx.push_back(r.d_hx_t);
    d_cx.push_back(r.d_cx_t);
    if (!needs[4]) continue;
    const auto product = [&](const Tensor& weight, const Tensor& a, const Tensor& b_t,
                             const Tensor& a_t, const Tensor& b) {
      Products sum(at::empty_like(weight, at::MemoryFormat::Contiguous));
      sum.add(a_t.t(), b);
      sum.add(a.t(), b_t);
      return sum.get();
    };
    d_weights.push_back(
        direction.in_gate_order(product(w.w_ih, d_in, input_rows, d_in_t, rows.input)));
    d_weights.push_back(product(w.w_hh, direction.rec(r.d), h_before_t, direction.rec(r.d_t),
                                direction.state_before()));
    if (call.has_biases) {
      const Tensor sums = r.d_t.sum(0);
      d_weights.push_back(direction.in_gate_order(direction.in(sums)));
      d_weights.push_back(direction.rec(sums).clone());  // results share no memory
    }
    if (shape.has_projection) {
      d_weights.push_back(
          product(w.w_hr, r.d_projected,
                  direction.unprojected_tangent(of_direction(gates_t, d), of_direction(c_t, d)),
                  r.d_projected_t, direction.unprojected()));
    }
  }
  const auto nothing = [&] { return at::empty({0}, options); };
  for (size_t i = 0; !needs[4] && i < weights.size(); ++i) d_weights.push_back(nothing());
  return {needs[0] ? d_input.get().view(input.sizes()) : nothing(),
          needs[1] ? d_input_t.get().view(input.sizes()) : nothing(),
          needs[2] ? stacked(d_hx) : nothing(), needs[3] ? stacked(d_cx) : nothing(), d_weights};
}

// Rows [N, K] by group of sequences, [groups, N / groups, K]: sequence i is in group i % groups.
Tensor by_group(const Tensor& of_rows, const LayerRows& rows, int64_t groups) {
  const int64_t K = of_rows.size(1);
  if (rows.call.batch_first) {
    const int64_t B = rows.shape.B / groups, T = rows.shape.T;
    return of_rows.reshape({B, groups, T, K}).transpose(0, 1).reshape({groups, B * T, K});
  }
  return of_rows.reshape({-1, groups, K}).transpose(0, 1);
}

BackwardTuple gradients_apart(const LayerCall& call, const ResultGradients& grads,
                              const c10::List<bool>& needs, int64_t groups) {
  const LayerShape shape = check_bwd_apart(call, grads, needs, groups);
  const Tensor& input = call.input;
  const at::TensorList weights = call.weights;
  const PlainTorch guard;
  const auto options = input.options();
  const auto of_groups = [&](const Tensor& weight) {
    std::vector<int64_t> sizes = weight.sizes().vec();
    sizes.insert(sizes.begin(), groups);
    return sizes;
  };
  const auto nothing = [&] { return at::empty({0}, options); };
  std::vector<Tensor> d_weights;
  if (shape.N == 0) {
    for (const Tensor& weight : weights) {
      d_weights.push_back(needs[3] ? at::zeros(of_groups(weight), options) : nothing());
    }
    return {needs[0] ? at::zeros_like(input) : nothing(),
            needs[1] ? at::zeros({shape.D, 0, shape.R}, options) : nothing(),
            needs[2] ? at::zeros({shape.D, 0, shape.H}, options) : nothing(), d_weights};
  }
  const LayerRows rows(call, shape);
  Products d_input(needs[0] ? at::empty({shape.N, shape.I}, options) : nothing());
  std::vector<Tensor> d_hx, d_cx;
  const OptionalTensor none;
  const OptionalTensorList no_tangents;
  for (int64_t d = 0; d < shape.D; ++d) {
    Direction direction(rows, no_tangents, d);
    const DirectionWeights& w = direction.weights;
    const BackwardTangents r = run_backward_steps(direction, grads, {none, none, none}, nullptr,
                                                  Tensor(), needs[1] || needs[2]);
    const Tensor d_in = direction.in(r.d);
    if (needs[0]) d_input.add(d_in, direction.in_column_order(w.w_ih));
    d_hx.push_back(r.d_hx);
    d_cx.push_back(r.d_cx);
    if (!needs[3]) continue;
    const Tensor apart = by_group(r.d, rows, groups);
    const auto product = [&](const Tensor& a, const Tensor& b) {
      return at::bmm(a.transpose(1, 2), by_group(b, rows, groups));
    };
    d_weights.push_back(direction.in_gate_order(product(direction.in(apart), rows.input), 1));
    d_weights.push_back(product(direction.rec(apart), direction.state_before()));
    if (call.has_biases) {
      const Tensor sums = apart.sum(1);
      d_weights.push_back(direction.in_gate_order(direction.in(sums), 1));
      d_weights.push_back(direction.rec(sums).clone());
    }
    if (shape.has_projection) {
      d_weights.push_back(product(by_group(r.d_projected, rows, groups), direction.unprojected()));
    }
  }
  for (size_t i = 0; !needs[3] && i < weights.size(); ++i) d_weights.push_back(nothing());
  return {needs[0] ? d_input.get().view(input.sizes()) : nothing(),
          needs[1] ? stacked(d_hx) : nothing(), needs[2] ? stacked(d_cx) : nothing(), d_weights};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastbptt, m) {
  m.def(kBackwardTangentsSchema);
  // The gradient of input as rnn_bwd gives it, and the tangents of its results. output_t, c_t,
  // gates_t: as rnn_jvp gave them. needs: the gradient of input, then the tangents of those of input,
  // hx, cx and weights.
  m.def(
      "rnn_bwd_jvp(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, "
      "Tensor? grad_output_t, Tensor? grad_h_n_t, Tensor? grad_c_n_t, Tensor input, "
      "Tensor output, Tensor c, Tensor gates, Tensor? hx, Tensor? cx, Tensor[] weights, "
      "Tensor? input_t, Tensor output_t, Tensor c_t, Tensor gates_t, Tensor? hx_t, Tensor? cx_t, "
      "Tensor?[] weights_t, bool has_biases, Tensor? batch_sizes, bool batch_first, str cell, "
      "bool[] needs, int k1=0, Tensor? resets=None, Tensor? kappa=None) "
      "-> (Tensor d_input, Tensor d_input_t, Tensor d_hx_t, Tensor d_cx_t, Tensor[] d_weights_t)");
  // As rnn_bwd, with a sum for each of `groups` groups of sequences instead of one over all:
  // d_weights [groups, ...]. Sequence i belongs to group i % groups.
  m.def(
      "rnn_bwd_apart(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, "
      "Tensor output, Tensor c, Tensor gates, Tensor? hx, Tensor? cx, Tensor[] weights, "
      "bool has_biases, Tensor? batch_sizes, bool batch_first, str cell, bool[] needs, "
      "int groups, int k1=0, Tensor? resets=None, Tensor? kappa=None) "
      "-> (Tensor d_input, Tensor d_hx, Tensor d_cx, Tensor[] d_weights)");
}

TORCH_LIBRARY_IMPL(fastbptt, CompositeExplicitAutograd, m) {
  m.impl("rnn_bwd_jvp", rnn_bwd_jvp<gradients_and_tangents>);
  m.impl("rnn_bwd_apart", rnn_bwd_apart<gradients_apart>);
}

TORCH_LIBRARY_IMPL(fastbptt, Autograd, m) {
  for (const char* name : {"rnn_bwd_jvp_steps", "rnn_bwd_jvp", "rnn_bwd_apart"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace fastbptt
