// The operators: their schemas, their CPU implementations, and the _C module that loads them.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include "checks.h"
#include "cpu/kernels.h"
#include "lanes.h"
#include "workspace.h"

namespace fastbptt {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A batch's layout with the storage behind its pointers.
struct OwnedLayout {
  std::vector<int64_t> offsets;
  Layout layout;

  OwnedLayout(const LayerShape& shape, const OptionalTensor& batch_sizes, bool batch_first) {
    layout = {shape.T, shape.B, shape.N, batch_first ? 1 : shape.B, batch_first ? shape.T : 1,
              nullptr, nullptr};
    if (!batch_sizes.has_value()) return;
    layout.batch_sizes = batch_sizes->const_data_ptr<int64_t>();
    offsets.resize(shape.T + 1);
    for (int64_t t = 0; t < shape.T; ++t) offsets[t + 1] = offsets[t] + layout.batch_sizes[t];
    layout.offsets = offsets.data();
  }
};

OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(tensor->contiguous()) : tensor;
}

std::vector<Tensor> contiguous(at::TensorList tensors) {
  std::vector<Tensor> result;
  result.reserve(tensors.size());
  for (const Tensor& tensor : tensors) result.push_back(tensor.contiguous());
  return result;
}

// Direction d of a [D, ...] tensor, or null where there is none.
template <typename scalar_t>
const scalar_t* direction_of(const OptionalTensor& tensor, int64_t d) {
  return tensor.has_value() ? tensor->const_data_ptr<scalar_t>() + d * tensor->stride(0) : nullptr;
}

template <typename scalar_t>
scalar_t* direction_of(const Tensor& tensor, int64_t d, bool wanted) {
  return wanted ? tensor.mutable_data_ptr<scalar_t>() + d * tensor.stride(0) : nullptr;
}

template <typename value_t>
const value_t* rows_of(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<value_t>() : nullptr;
}

// The arguments of a layer, contiguous.
struct LayerTensors {
  Tensor input;
  OptionalTensor hx, cx;
  std::vector<Tensor> weights;

  LayerTensors(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
               at::TensorList weights)
      : input(input.contiguous()),
        hx(contiguous(hx)),
        cx(contiguous(cx)),
        weights(contiguous(weights)) {}
};

template <typename scalar_t>
void fill_common(LayerParams<scalar_t>* p, const LayerShape& shape, const Layout& layout,
                 const bool* resets, const std::vector<Lane>& lanes, const LayerTensors& tensors,
                 int64_t d, int threads) {
  const auto data = [](const Tensor& tensor) { return tensor.const_data_ptr<scalar_t>(); };
  p->layout = layout;
  p->I = shape.I;
  p->H = shape.H;
  p->R = shape.R;
  p->direction = d == 0 ? 1 : -1;
  p->lanes = lanes.data();
  p->num_lanes = int64_t(lanes.size());
  p->input = data(tensors.input);
  p->resets = resets;
  p->hx = direction_of<scalar_t>(tensors.hx, d);
  p->cx = direction_of<scalar_t>(tensors.cx, d);
  p->w_ih = data(shape.w_ih(tensors.weights, d));
  p->w_hh = data(shape.w_hh(tensors.weights, d));
  p->b_ih = shape.has_biases ? data(shape.b_ih(tensors.weights, d)) : nullptr;
  p->b_hh = shape.has_biases ? data(shape.b_hh(tensors.weights, d)) : nullptr;
  p->w_hr = shape.has_projection ? data(shape.w_hr(tensors.weights, d)) : nullptr;
  p->ld_out = shape.D * shape.R;
  p->threads = threads;
}

int threads_for(const LayerShape& shape, double passes, double rows) {
  const double row = double(shape.I + shape.R) * shape.G * shape.H +
                     (shape.has_projection ? double(shape.R) * shape.H : 0);
  return useful_threads(at::get_num_threads(), passes * rows * row);
}

// Allocates the workspace where torch's profilers see it, and runs the kernel on its team.
template <typename Params>
void run_kernel(const Kernel<Params>& kernel, Params* p, const Tensor& input) {
  const Tensor space = at::empty({kernel.workspace(*p)}, input.options().dtype(at::kByte));
  p->workspace = space.mutable_data_ptr();
  struct Call {
    const Kernel<Params>& kernel;
    const Params& p;
  } const call{kernel, *p};
  run_team(
      p->threads,
      [](const void* context, const Worker& worker) {
        const Call& call = *static_cast<const Call*>(context);
        call.kernel.run(call.p, worker);
      },
      &call);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_fwd_cpu(
    const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx, at::TensorList weights,
    bool has_biases, const OptionalTensor& batch_sizes, bool batch_first, c10::string_view cell,
    bool keep_gates, const OptionalTensor& resets) {
  const LayerShape shape =
      check_layer(input, hx, cx, weights, has_biases, batch_sizes, batch_first, cell);
  check_rows(resets, "resets", at::kBool, input);
  const LayerTensors tensors(input, hx, cx, weights);
  const auto options = input.options();
  const Tensor output = at::empty(output_sizes(input, shape), options);
  const Tensor h_n = at::empty({shape.D, shape.B, shape.R}, options);
  const bool has_c = shape.has_cell_state();
  const Tensor c_n = at::empty({has_c ? shape.D : 0, shape.B, shape.H}, options);
  const Tensor c = at::empty({has_c ? shape.D : 0, shape.N, shape.H}, options);
  const bool keeps = keep_gates && shape.S > 0;
  const Tensor gates = at::empty({keeps ? shape.D : 0, shape.N, shape.S * shape.H}, options);
  if (shape.N == 0) return {output, h_n, c_n, c, gates};

  const OwnedLayout layout(shape, batch_sizes, batch_first);
  const OptionalTensor reset_rows = contiguous(resets);
  Cuts cuts;
  cuts.resets = rows_of<bool>(reset_rows);
  AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "rnn_fwd", [&] {
    for (int64_t d = 0; d < shape.D; ++d) {
      FwdParams<scalar_t> p{};
      const std::vector<Lane> lanes = make_lanes(layout.layout, d == 0 ? 1 : -1, cuts);
      fill_common(&p, shape, layout.layout, cuts.resets, lanes, tensors, d,
                  threads_for(shape, 1, double(shape.N)));
      p.output = output.mutable_data_ptr<scalar_t>() + d * shape.R;
      p.h_n = direction_of<scalar_t>(h_n, d, true);
      p.gates = direction_of<scalar_t>(gates, d, keeps);
      p.c = direction_of<scalar_t>(c, d, has_c);
      p.c_n = direction_of<scalar_t>(c_n, d, has_c);
      run_kernel(kernels_for<scalar_t>().forward[int(shape.cell)], &p, input);
    }
  });
  return {output, h_n, c_n, c, gates};
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> rnn_bwd_cpu(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
    const OptionalTensor& grad_c_n, const Tensor& input, const Tensor& output, const Tensor& c,
    const Tensor& gates, const OptionalTensor& hx, const OptionalTensor& cx, at::TensorList weights,
    bool has_biases, const OptionalTensor& batch_sizes, bool batch_first, c10::string_view cell,
    c10::List<bool> needs, int64_t k1, int64_t k2, bool last_only, const OptionalTensor& resets,
    const OptionalTensor& kappa, const OptionalTensor& mask, int64_t first_window,
    int64_t num_windows, bool grad_by_lane, bool input_by_lane) {
  const LayerShape shape =
      check_layer(input, hx, cx, weights, has_biases, batch_sizes, batch_first, cell);
  const bool has_c = shape.has_cell_state();
  const std::vector<int64_t> out_sizes = output_sizes(input, shape);
  check_tensor(output, "output", out_sizes, input);
  check_tensor(c, "c", {has_c ? shape.D : 0, shape.N, shape.H}, input);
  const bool kept =
      shape.S > 0 && gates.dim() > 0 && gates.size(0) > 0;  // else they are computed again
  check_tensor(gates, "gates", {kept ? shape.D : 0, shape.N, shape.S * shape.H}, input);
  if (grad_h_n.has_value()) {
    check_tensor(*grad_h_n, "grad_h_n", {shape.D, shape.B, shape.R}, input);
  }
  if (grad_c_n.has_value()) {
    check_tensor(*grad_c_n, "grad_c_n", {has_c ? shape.D : 0, shape.B, shape.H}, input);
  }
  check_windows(shape, k1, k2, last_only, first_window, num_windows);
  check_rows(resets, "resets", at::kBool, input);
  check_rows(kappa, "kappa", input.scalar_type(), input);
  if (mask.has_value()) check_tensor(*mask, "mask", input.sizes(), input);
  TORCH_CHECK(k2 > k1 || !(grad_by_lane || input_by_lane),
              "grad_by_lane and input_by_lane are for overlapping windows, k2 > k1");
  TORCH_CHECK(needs.size() == 4, "needs must hold 4 flags (input, hx, cx, weights), got ",
              needs.size());
  const bool needs_input = needs[0], needs_hx = needs[1], needs_cx = needs[2],
             needs_weights = needs[3];
  TORCH_CHECK(!needs_hx || hx.has_value(), "needs asks for the gradient of hx, which is absent");
  TORCH_CHECK(!needs_cx || cx.has_value(), "needs asks for the gradient of cx, which is absent");

  const LayerTensors tensors(input, hx, cx, weights);
  const Tensor out = output.contiguous(), cells = c.contiguous(), activations = gates.contiguous();
  const OptionalTensor d_output = contiguous(grad_output), d_h_n = contiguous(grad_h_n),
                       d_c_n = contiguous(grad_c_n), reset_rows = contiguous(resets),
                       kappa_rows = contiguous(kappa), factors = contiguous(mask),
                       closed = kappa.has_value() ? OptionalTensor(kappa_rows->eq(0)) : kappa;
  const OwnedLayout layout(shape, batch_sizes, batch_first);
  Cuts cuts{k1,
            k2,
            last_only,
            first_window,
            num_windows,
            rows_of<bool>(reset_rows),
            rows_of<bool>(closed)};
  cuts.limit_to(shape.T);
  const Span span = span_of(shape.T, cuts);
  std::vector<Lane> lanes = make_lanes(layout.layout, 1, cuts);
  const int64_t lane_rows = count_rows(lanes);
  if (grad_output.has_value()) {
    check_tensor(*grad_output, "grad_output",
                 grad_by_lane ? std::vector<int64_t>{lane_rows, shape.R} : out_sizes, input);
  }

  std::vector<int64_t> input_sizes = input.sizes().vec();
  if (input_by_lane) {
    input_sizes = {lane_rows, shape.I};
  } else if (batch_sizes.has_value()) {
    input_sizes[0] = layout.offsets[span.end] - layout.offsets[span.begin];
  } else {
    input_sizes[batch_first ? 1 : 0] = span.end - span.begin;
  }
  const auto options = input.options();
  // An initial state that a reset replaces has no gradient; where windows overlap it is a sum.
  const auto state_gradient = [&](const OptionalTensor& state, bool needed) {
    if (!needed) return at::empty({0}, options);
    return resets.has_value() || cuts.overlapping() ? at::zeros(state->sizes(), options)
                                                    : at::empty(state->sizes(), options);
  };
  const Tensor d_input = at::empty(needs_input ? input_sizes : std::vector<int64_t>{0}, options);
  const Tensor d_hx = state_gradient(hx, needs_hx), d_cx = state_gradient(cx, needs_cx);
  std::vector<Tensor> d_weights;
  for (const Tensor& weight : weights) {
    d_weights.push_back(needs_weights ? at::empty(weight.sizes(), options)
                                      : at::empty({0}, options));
  }
  if (lanes.empty()) {
    for (const Tensor& d_weight : d_weights) d_weight.zero_();
    d_input.zero_();
    return {d_input, d_hx, d_cx, d_weights};
  }

  AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "rnn_bwd", [&] {
    for (int64_t d = 0; d < shape.D; ++d) {
      BwdParams<scalar_t> p{};
      if (d > 0) lanes = make_lanes(layout.layout, -1, cuts);
      fill_common(&p, shape, layout.layout, cuts.resets, lanes, tensors, d,
                  threads_for(shape, 2, double(lane_rows)));
      p.output = out.const_data_ptr<scalar_t>() + d * shape.R;
      p.gates = kept ? direction_of<scalar_t>(activations, d) : nullptr;
      p.c = has_c ? direction_of<scalar_t>(cells, d) : nullptr;
      const scalar_t* d_out = rows_of<scalar_t>(d_output);
      (grad_by_lane ? p.d_lanes : p.d_output) = d_out ? d_out + d * shape.R : nullptr;
      p.d_h_n = direction_of<scalar_t>(d_h_n, d);
      p.d_c_n = has_c ? direction_of<scalar_t>(d_c_n, d) : nullptr;
      p.d_input = needs_input ? d_input.mutable_data_ptr<scalar_t>() : nullptr;
      p.d_input_by_lane = input_by_lane;
      p.accumulate_d_input = d > 0;
      p.kappa = rows_of<scalar_t>(kappa_rows);
      p.mask = rows_of<scalar_t>(factors);
      p.overlapping = cuts.overlapping();
      p.begin = span.begin;
      p.end = span.end;
      p.d_hx = direction_of<scalar_t>(d_hx, d, needs_hx);
      p.d_cx = direction_of<scalar_t>(d_cx, d, needs_cx);
      if (needs_weights) {
        const auto data = [](const Tensor& tensor) { return tensor.mutable_data_ptr<scalar_t>(); };
        p.d_w_ih = data(shape.w_ih(d_weights, d));
        p.d_w_hh = data(shape.w_hh(d_weights, d));
        p.d_b_ih = has_biases ? data(shape.b_ih(d_weights, d)) : nullptr;
        p.d_b_hh = has_biases ? data(shape.b_hh(d_weights, d)) : nullptr;
        p.d_w_hr = shape.has_projection ? data(shape.w_hr(d_weights, d)) : nullptr;
      }
      run_kernel(kernels_for<scalar_t>().backward[int(shape.cell)], &p, input);
    }
  });
  return {d_input, d_hx, d_cx, d_weights};
}

}  // namespace

TORCH_LIBRARY(fastbptt, m) {
  // One layer, its one or two directions (D). weights: w_ih, w_hh[, b_ih, b_hh][, w_hr] each.
  // input [T, B, I] ([B, T, I] if batch_first, or packed [N, I] with batch_sizes [T]); output like
  // input with D*R columns; hx and h_n [D, B, R], cx and c_n [D, B, H]. cell: "tanh", "relu",
  // "identity", "gru" or "lstm". c [D, N, H] and gates [D, N, S*H] are for the backward pass; what a
  // cell has not is empty, and so are gates that are not to be kept. resets: bool, like input
  // without its features; where it is true the state that enters the step is zeros.
  m.def(
      "rnn_fwd(Tensor input, Tensor? hx, Tensor? cx, Tensor[] weights, bool has_biases, "
      "Tensor? batch_sizes, bool batch_first, str cell, bool keep_gates, Tensor? resets=None) "
      "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor c, Tensor gates)");
  // gates: empty to have them computed again. needs: input, hx, cx, weights; a gradient that is not
  // needed comes back empty.
  // k1, k2, last_only: windows as in TBPTT(k1, k2), or k1 = 0 for none. kappa: like resets in
  // input's dtype, factors of the gradient on its way from a step to the one before. mask: like
  // input, factors of its gradient.
  // Where windows overlap (k2 > k1) a call may take some of them: then the gradient of input is that
  // of the steps they lie in. by_lane: the gradient of output, or of input, has a row for each step
  // of each lane (see params.h) rather than for each step, so that a stack keeps windows apart.
  m.def(
      "rnn_bwd(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, "
      "Tensor output, Tensor c, Tensor gates, Tensor? hx, Tensor? cx, Tensor[] weights, "
      "bool has_biases, Tensor? batch_sizes, bool batch_first, str cell, bool[] needs, "
      "int k1=0, int k2=0, bool last_only=False, Tensor? resets=None, Tensor? kappa=None, "
      "Tensor? mask=None, int first_window=0, int num_windows=0, bool grad_by_lane=False, "
      "bool input_by_lane=False) -> (Tensor, Tensor, Tensor, Tensor[])");
}

TORCH_LIBRARY_IMPL(fastbptt, CPU, m) {
  m.impl("rnn_fwd", rnn_fwd_cpu);
  m.impl("rnn_bwd", rnn_bwd_cpu);
}

PYBIND11_MODULE(_C, m) {
  select_isa_from_environment();
  m.def(
      "cpu_isa", [] { return std::string(kernels().isa); },
      "The instruction set whose kernels run on this CPU.");
  m.def("cpu_isas", runnable_isas, "The instruction sets that this CPU can run, best first.");
  m.def(
      "set_cpu_isa", [](const std::string& isa) { select_isa(isa, "set_cpu_isa's argument"); },
      pybind11::arg("isa"), "Runs the kernels of this instruction set from now on.");
  m.def("workspace_limit", workspace_limit, "Bytes that stacked windows may take.");
  m.def("set_workspace_limit", set_workspace_limit, pybind11::arg("bytes"),
        "Sets the bytes that stacked windows may take.");
}

}  // namespace fastbptt
