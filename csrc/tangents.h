// The steps of a tangent pass, as every device registers them: what of it only goes step by step, one
// direction of a layer. What is before and after them, for all steps at once, is in tangents.cpp.
//
// Axes as in params.h; C: columns of d, see CellTraits. Tensors [N, ...] have a row for each step of
// each sequence in the order of the input's, and may be a part of wider rows; those [B, ...] one for each
// sequence. Where a cell has no use for a tensor it has no rows. `gate` [N], where there is one, are
// factors between a step and the one before it in time, of all that crosses there: of tangents on
// their way on, of gradients on their way back; 0 stops infinity and NaN too.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "arguments.h"

namespace fastbptt {

// What the steps of both passes take.
struct StepArguments {
  const Tensor& output;        // [N, R]
  const Tensor& c;             // [N, H]
  const Tensor& gates;         // [N, S*H]
  const Tensor& before;        // [N, H] the state that entered each step: LSTM's c, GRU's h
  const OptionalTensor& gate;  // [N]
  const Tensor& w_hh;  // [G*H, R]; backward with the weights' tangents [2*G*H, R], below them
  const OptionalTensor& w_hr;  // [R, H], or backward likewise [2*R, H]
  const OptionalTensor& batch_sizes;
  int64_t T;
  bool batch_first, reverse;
  c10::string_view cell;
};

// Tangents of the states, forward. pre [N, C*H]: those of the pre-activations as far as all that they
// depend on is known, in d's columns. projected [N, R]: likewise of the projected states. hx_t, cx_t:
// those of the initial states, None is zeros.
struct ForwardTangentArguments : StepArguments {
  const Tensor& pre;
  const OptionalTensor &projected, &hx_t, &cx_t;
};
struct ForwardTangents {
  Tensor output, c, gates, h_n, c_n;  // as the forward pass's results
};
constexpr const char* kForwardTangentsSchema =
    "rnn_jvp_steps(Tensor pre, Tensor? projected, Tensor? hx_t, Tensor? cx_t, Tensor output, "
    "Tensor c, Tensor gates, Tensor before, Tensor? gate, Tensor w_hh, Tensor? w_hr, "
    "Tensor? batch_sizes, int T, bool batch_first, bool reverse, str cell) "
    "-> (Tensor output_t, Tensor c_t, Tensor gates_t, Tensor h_n_t, Tensor c_n_t)";

// The gradients of the pre-activations and their tangents, backward. d_* as the backward pass takes
// them, and their tangents; None is zeros. output_t, c_t, gates_t, before_t: tangents of what the forward
// pass gave; without output_t there are none of anything. needs_states: d_hx and d_cx are wanted.
struct BackwardTangentArguments : StepArguments {
  const OptionalTensor &d_output, &d_output_t, &d_h_n, &d_h_n_t, &d_c_n, &d_c_n_t;
  const OptionalTensor &output_t, &c_t, &gates_t, &before_t;
  bool needs_states;

  bool has_tangents() const { return output_t.has_value(); }
};
// d [N, C*H], with a projection d_projected [N, R]: the gradient of the projected state; d_hx [B, R],
// d_cx [B, H]; and the tangent of each, no rows where there are none.
struct BackwardTangents {
  Tensor d, d_t, d_projected, d_projected_t, d_hx, d_hx_t, d_cx, d_cx_t;
};
constexpr const char* kBackwardTangentsSchema =
    "rnn_bwd_jvp_steps(Tensor? d_output, Tensor? d_output_t, Tensor? d_h_n, Tensor? d_h_n_t, "
    "Tensor? d_c_n, Tensor? d_c_n_t, Tensor output, Tensor c, Tensor gates, Tensor before, "
    "Tensor? output_t, Tensor? c_t, Tensor? gates_t, Tensor? before_t, Tensor? gate, "
    "Tensor w_hh, Tensor? w_hr, bool needs_states, Tensor? batch_sizes, int T, bool batch_first, "
    "bool reverse, str cell) -> (Tensor d, Tensor d_t, Tensor d_projected, Tensor d_projected_t, "
    "Tensor d_hx, Tensor d_hx_t, Tensor d_cx, Tensor d_cx_t)";

// What to register for a device that runs the steps by `run`.
template <ForwardTangents (*run)(const ForwardTangentArguments&)>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_jvp_steps(
    const Tensor& pre, const OptionalTensor& projected, const OptionalTensor& hx_t,
    const OptionalTensor& cx_t, const Tensor& output, const Tensor& c, const Tensor& gates,
    const Tensor& before, const OptionalTensor& gate, const Tensor& w_hh,
    const OptionalTensor& w_hr, const OptionalTensor& batch_sizes, int64_t T, bool batch_first,
    bool reverse, c10::string_view cell) {
  const ForwardTangents r =
      run({{output, c, gates, before, gate, w_hh, w_hr, batch_sizes, T, batch_first, reverse, cell},
           pre,
           projected,
           hx_t,
           cx_t});
  return {r.output, r.c, r.gates, r.h_n, r.c_n};
}

template <BackwardTangents (*run)(const BackwardTangentArguments&)>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rnn_bwd_jvp_steps(
    const OptionalTensor& d_output, const OptionalTensor& d_output_t, const OptionalTensor& d_h_n,
    const OptionalTensor& d_h_n_t, const OptionalTensor& d_c_n, const OptionalTensor& d_c_n_t,
    const Tensor& output, const Tensor& c, const Tensor& gates, const Tensor& before,
    const OptionalTensor& output_t, const OptionalTensor& c_t, const OptionalTensor& gates_t,
    const OptionalTensor& before_t, const OptionalTensor& gate, const Tensor& w_hh,
    const OptionalTensor& w_hr, bool needs_states, const OptionalTensor& batch_sizes, int64_t T,
    bool batch_first, bool reverse, c10::string_view cell) {
  const BackwardTangents r =
      run({{output, c, gates, before, gate, w_hh, w_hr, batch_sizes, T, batch_first, reverse, cell},
           d_output,
           d_output_t,
           d_h_n,
           d_h_n_t,
           d_c_n,
           d_c_n_t,
           output_t,
           c_t,
           gates_t,
           before_t,
           needs_states});
  return {r.d, r.d_t, r.d_projected, r.d_projected_t, r.d_hx, r.d_hx_t, r.d_cx, r.d_cx_t};
}

}  // namespace fastbptt
