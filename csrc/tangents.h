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
#include <utility>

#include "checks.h"

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

// The sizes of a call; what both passes take is checked. Backward, W_hh and W_hr may have their
// tangents below them.
inline LayerShape check_steps(const StepArguments& args, bool is_backward) {
  LayerShape shape{};
  const Tensor& output = args.output;
  set_cell(args.cell, &shape);
  const at::ScalarType dtype = output.scalar_type();
  TORCH_CHECK_NOT_IMPLEMENTED(dtype == at::kFloat || dtype == at::kDouble,
                              "output must have dtype float32 or float64, got ", dtype);
  TORCH_CHECK(output.dim() == 2 && output.size(1) > 0,
              "output must have 2 dimensions and columns, got shape ", output.sizes());
  shape.T = args.T;
  shape.N = output.size(0);
  shape.R = output.size(1);
  TORCH_CHECK(shape.T > 0, "T must be positive, got ", shape.T);
  if (args.batch_sizes.has_value()) {
    LayerShape packed{};
    check_batch_sizes(output, args.batch_sizes, args.batch_first, std::nullopt, &packed);
    TORCH_CHECK(packed.T == shape.T, "T must be ", packed.T, " as in batch_sizes, got ", shape.T);
    shape.B = packed.B;
  } else {
    TORCH_CHECK(shape.N % shape.T == 0, "output must have as many rows for each of ", shape.T,
                " steps, got ", shape.N);
    shape.B = shape.N / shape.T;
  }
  const bool is_lstm = shape.has_cell_state();
  TORCH_CHECK(!is_lstm || (args.c.dim() == 2 && args.c.size(1) > 0),
              "c must have 2 dimensions and columns, got shape ", args.c.sizes());
  shape.H = is_lstm ? args.c.size(1) : shape.R;
  shape.has_projection = args.w_hr.has_value();
  TORCH_CHECK(!shape.has_projection || is_lstm, "w_hr is for an LSTM only, and cell is \"",
              args.cell, "\"");
  TORCH_CHECK(shape.has_projection || shape.H == shape.R, "c must have ", shape.R,
              " columns without w_hr, got ", shape.H);
  TORCH_CHECK(args.w_hh.dim() == 2, "w_hh must have 2 dimensions, got ", args.w_hh.dim());
  const int64_t rows = shape.G * shape.H;
  const int64_t copies = is_backward && args.w_hh.size(0) != rows ? 2 : 1;
  check_tensor<int64_t>(args.w_hh, "w_hh", {copies * rows, shape.R}, output);
  if (shape.has_projection) {
    check_tensor<int64_t>(*args.w_hr, "w_hr", {copies * shape.R, shape.H}, output);
  }
  if (is_lstm) check_tensor<int64_t>(args.c, "c", {shape.N, shape.H}, output);
  if (shape.S > 0) {
    check_tensor<int64_t>(args.gates, "gates", {shape.N, shape.S * shape.H}, output);
    check_tensor<int64_t>(args.before, "before", {shape.N, shape.H}, output);
  }
  if (args.gate.has_value()) check_tensor<int64_t>(*args.gate, "gate", {shape.N}, output);
  return shape;
}

inline void check_optional(const OptionalTensor& tensor, const char* name, c10::IntArrayRef sizes,
                           const Tensor& like) {
  if (tensor.has_value()) check_tensor<int64_t>(*tensor, name, sizes, like);
}

// Columns of d, in units: see CellTraits.
inline int64_t columns_of(const LayerShape& shape) {
  return shape.cell == CellKind::kGru ? 4 : shape.G;
}

inline LayerShape check_steps(const ForwardTangentArguments& args) {
  const LayerShape shape = check_steps(args, false);
  const Tensor& output = args.output;
  check_tensor<int64_t>(args.pre, "pre", {shape.N, columns_of(shape) * shape.H}, output);
  TORCH_CHECK(shape.has_projection || !args.projected.has_value(),
              "projected goes with w_hr, got it without");
  check_optional(args.projected, "projected", {shape.N, shape.R}, output);
  check_optional(args.hx_t, "hx_t", {shape.B, shape.R}, output);
  check_optional(args.cx_t, "cx_t", {shape.B, shape.H}, output);
  return shape;
}

inline LayerShape check_steps(const BackwardTangentArguments& args) {
  const LayerShape shape = check_steps(args, true);
  const Tensor& output = args.output;
  check_optional(args.d_output, "d_output", {shape.N, shape.R}, output);
  check_optional(args.d_output_t, "d_output_t", {shape.N, shape.R}, output);
  check_optional(args.output_t, "output_t", {shape.N, shape.R}, output);
  check_optional(args.d_h_n, "d_h_n", {shape.B, shape.R}, output);
  check_optional(args.d_h_n_t, "d_h_n_t", {shape.B, shape.R}, output);
  if (shape.has_cell_state()) {
    check_optional(args.d_c_n, "d_c_n", {shape.B, shape.H}, output);
    check_optional(args.d_c_n_t, "d_c_n_t", {shape.B, shape.H}, output);
    check_optional(args.c_t, "c_t", {shape.N, shape.H}, output);
  }
  if (shape.S > 0) {
    check_optional(args.gates_t, "gates_t", {shape.N, shape.S * shape.H}, output);
    check_optional(args.before_t, "before_t", {shape.N, shape.H}, output);
  }
  return shape;
}

// What to register for a device that runs the steps by `run`.
template <ForwardTangents (*run)(const ForwardTangentArguments&, const LayerShape&)>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_jvp_steps(
    const Tensor& pre, const OptionalTensor& projected, const OptionalTensor& hx_t,
    const OptionalTensor& cx_t, const Tensor& output, const Tensor& c, const Tensor& gates,
    const Tensor& before, const OptionalTensor& gate, const Tensor& w_hh,
    const OptionalTensor& w_hr, const OptionalTensor& batch_sizes, int64_t T, bool batch_first,
    bool reverse, c10::string_view cell) {
  const ForwardTangentArguments args{
      {output, c, gates, before, gate, w_hh, w_hr, batch_sizes, T, batch_first, reverse, cell},
      pre,
      projected,
      hx_t,
      cx_t};
  const ForwardTangents r = run(args, check_steps(args));
  return {r.output, r.c, r.gates, r.h_n, r.c_n};
}

template <BackwardTangents (*run)(const BackwardTangentArguments&, const LayerShape&)>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rnn_bwd_jvp_steps(
    const OptionalTensor& d_output, const OptionalTensor& d_output_t, const OptionalTensor& d_h_n,
    const OptionalTensor& d_h_n_t, const OptionalTensor& d_c_n, const OptionalTensor& d_c_n_t,
    const Tensor& output, const Tensor& c, const Tensor& gates, const Tensor& before,
    const OptionalTensor& output_t, const OptionalTensor& c_t, const OptionalTensor& gates_t,
    const OptionalTensor& before_t, const OptionalTensor& gate, const Tensor& w_hh,
    const OptionalTensor& w_hr, bool needs_states, const OptionalTensor& batch_sizes, int64_t T,
    bool batch_first, bool reverse, c10::string_view cell) {
  const BackwardTangentArguments args{
      {output, c, gates, before, gate, w_hh, w_hr, batch_sizes, T, batch_first, reverse, cell},
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
      needs_states};
  const BackwardTangents r = run(args, check_steps(args));
  return {r.d, r.d_t, r.d_projected, r.d_projected_t, r.d_hx, r.d_hx_t, r.d_cx, r.d_cx_t};
}

}  // namespace fastbptt
