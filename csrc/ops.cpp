// The operators: their schemas, their CPU implementations, and the _C module that loads them.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include "checks.h"
#include "cpu/kernels.h"
#include "lanes.h"

namespace fastbptt {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A batch's layout with the storage behind its pointers.
struct OwnedLayout {
  std::vector<int64_t> offsets;
  Layout layout;

  OwnedLayout(const LayerShape& shape, const OptionalTensor& batch_sizes, bool batch_first) {
    layout = {shape.T,
              shape.B,
              shape.N,
              batch_first ? 1 : shape.B,
              batch_first ? shape.T : 1,
              nullptr,
              nullptr};
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

// Row d of a [D, B, H] tensor, or null.
template <typename scalar_t>
const scalar_t* state_of(const OptionalTensor& tensor, const LayerShape& shape, int64_t d) {
  return tensor.has_value() ? tensor->const_data_ptr<scalar_t>() + d * shape.B * shape.H : nullptr;
}

template <typename scalar_t>
void fill_common(LayerParams<scalar_t>* p, const LayerShape& shape, const Layout& layout,
                 const std::vector<Lane>& lanes, const Tensor& input, const OptionalTensor& hx,
                 at::TensorList weights, int64_t d, int threads) {
  p->layout = layout;
  p->I = shape.I;
  p->H = shape.H;
  p->direction = d == 0 ? 1 : -1;
  p->lanes = lanes.data();
  p->num_lanes = int64_t(lanes.size());
  p->input = input.const_data_ptr<scalar_t>();
  p->hx = state_of<scalar_t>(hx, shape, d);
  p->w_ih = shape.w_ih(weights, d).const_data_ptr<scalar_t>();
  p->w_hh = shape.w_hh(weights, d).const_data_ptr<scalar_t>();
  p->ld_out = shape.D * shape.H;
  p->threads = threads;
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

std::tuple<Tensor, Tensor> rnn_fwd_cpu(const Tensor& input_, const OptionalTensor& hx_,
                                       at::TensorList weights_, bool has_biases,
                                       const OptionalTensor& batch_sizes, bool batch_first,
                                       c10::string_view nonlinearity) {
  const LayerShape shape =
      check_layer(input_, hx_, weights_, has_biases, batch_sizes, batch_first);
  const Cell cell = parse_nonlinearity(nonlinearity);
  const Tensor input = input_.contiguous();
  const OptionalTensor hx = contiguous(hx_);
  const std::vector<Tensor> weights = contiguous(weights_);
  const Tensor output = at::empty(output_sizes(input, shape), input.options());
  const Tensor h_n = at::empty({shape.D, shape.B, shape.H}, input.options());
  if (shape.N == 0) return {output, h_n};

  const OwnedLayout layout(shape, batch_sizes, batch_first);
  const int threads =
      useful_threads(at::get_num_threads(), double(shape.N) * (shape.I + shape.H) * shape.H);
  AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "rnn_fwd", [&] {
    for (int64_t d = 0; d < shape.D; ++d) {
      FwdParams<scalar_t> p{};
      const std::vector<Lane> lanes = make_lanes(layout.layout, d == 0 ? 1 : -1, 0);
      fill_common(&p, shape, layout.layout, lanes, input, hx, weights, d, threads);
      p.b_ih = has_biases ? shape.b_ih(weights, d).const_data_ptr<scalar_t>() : nullptr;
      p.b_hh = has_biases ? shape.b_hh(weights, d).const_data_ptr<scalar_t>() : nullptr;
      p.output = output.mutable_data_ptr<scalar_t>() + d * shape.H;
      p.h_n = h_n.mutable_data_ptr<scalar_t>() + d * shape.B * shape.H;
      run_kernel(kernels_for<scalar_t>().forward[int(cell)], &p, input);
    }
  });
  return {output, h_n};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> rnn_bwd_cpu(
    const OptionalTensor& grad_output_, const OptionalTensor& grad_h_n_, const Tensor& input_,
    const Tensor& output_, const OptionalTensor& hx_, at::TensorList weights_, bool has_biases,
    const OptionalTensor& batch_sizes, bool batch_first, c10::string_view nonlinearity,
    int64_t chunk, c10::List<bool> needs) {
  const LayerShape shape =
      check_layer(input_, hx_, weights_, has_biases, batch_sizes, batch_first);
  const Cell cell = parse_nonlinearity(nonlinearity);
  const std::vector<int64_t> out_sizes = output_sizes(input_, shape);
  check_tensor(output_, "output", out_sizes, input_);
  if (grad_output_.has_value()) check_tensor(*grad_output_, "grad_output", out_sizes, input_);
  if (grad_h_n_.has_value()) {
    check_tensor(*grad_h_n_, "grad_h_n", {shape.D, shape.B, shape.H}, input_);
  }
  TORCH_CHECK(chunk >= 0, "chunk must be 0 (no truncation) or positive, got ", chunk);
  TORCH_CHECK(needs.size() == 3, "needs must hold 3 flags (input, hx, weights), got ",
              needs.size());
  const bool needs_input = needs[0], needs_hx = needs[1], needs_weights = needs[2];
  TORCH_CHECK(!needs_hx || hx_.has_value(), "needs asks for the gradient of hx, which is absent");

  const Tensor input = input_.contiguous(), output = output_.contiguous();
  const OptionalTensor hx = contiguous(hx_), grad_output = contiguous(grad_output_),
                       grad_h_n = contiguous(grad_h_n_);
  const std::vector<Tensor> weights = contiguous(weights_);
  const auto options = input.options();
  const Tensor d_input = needs_input ? at::empty_like(input) : at::empty({0}, options);
  const Tensor d_hx = needs_hx ? at::empty_like(*hx) : at::empty({0}, options);
  std::vector<Tensor> d_weights;
  for (const Tensor& weight : weights) {
    d_weights.push_back(needs_weights ? at::empty_like(weight) : at::empty({0}, options));
  }
  if (shape.N == 0) {
    for (const Tensor& d_weight : d_weights) d_weight.zero_();
    return {d_input, d_hx, d_weights};
  }

  const OwnedLayout layout(shape, batch_sizes, batch_first);
  const int threads =
      useful_threads(at::get_num_threads(), 2.0 * shape.N * (shape.I + shape.H) * shape.H);
  AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "rnn_bwd", [&] {
    const auto offset_by_direction = [&](const OptionalTensor& tensor, int64_t d) {
      return tensor.has_value() ? tensor->const_data_ptr<scalar_t>() + d * shape.H : nullptr;
    };
    for (int64_t d = 0; d < shape.D; ++d) {
      BwdParams<scalar_t> p{};
      const std::vector<Lane> lanes = make_lanes(layout.layout, d == 0 ? 1 : -1, chunk);
      fill_common(&p, shape, layout.layout, lanes, input, hx, weights, d, threads);
      p.output = output.const_data_ptr<scalar_t>() + d * shape.H;
      p.d_output = offset_by_direction(grad_output, d);
      p.d_h_n = state_of<scalar_t>(grad_h_n, shape, d);
      p.d_input = needs_input ? d_input.mutable_data_ptr<scalar_t>() : nullptr;
      p.accumulate_d_input = d > 0;
      p.d_hx = needs_hx ? d_hx.mutable_data_ptr<scalar_t>() + d * shape.B * shape.H : nullptr;
      if (needs_weights) {
        p.d_w_ih = shape.w_ih(d_weights, d).mutable_data_ptr<scalar_t>();
        p.d_w_hh = shape.w_hh(d_weights, d).mutable_data_ptr<scalar_t>();
        if (has_biases) {
          p.d_b_ih = shape.b_ih(d_weights, d).mutable_data_ptr<scalar_t>();
          p.d_b_hh = shape.b_hh(d_weights, d).mutable_data_ptr<scalar_t>();
        }
      }
      run_kernel(kernels_for<scalar_t>().backward[int(cell)], &p, input);
    }
  });
  return {d_input, d_hx, d_weights};
}

}  // namespace

TORCH_LIBRARY(fastbptt, m) {
  // One layer, its one or two directions. D: directions; weights: w_ih, w_hh[, b_ih, b_hh] each.
  // input [T, B, I] ([B, T, I] if batch_first, or packed [N, I] with batch_sizes [T]); hx and h_n
  // [D, B, H]; output like input with D*H columns.
  m.def(
      "rnn_fwd(Tensor input, Tensor? hx, Tensor[] weights, bool has_biases, Tensor? batch_sizes, "
      "bool batch_first, str nonlinearity) -> (Tensor output, Tensor h_n)");
  // chunk: steps after which the gradient is cut, or 0. needs: input, hx, weights; a gradient that
  // is not needed comes back empty.
  m.def(
      "rnn_bwd(Tensor? grad_output, Tensor? grad_h_n, Tensor input, Tensor output, Tensor? hx, "
      "Tensor[] weights, bool has_biases, Tensor? batch_sizes, bool batch_first, "
      "str nonlinearity, int chunk, bool[] needs) -> (Tensor, Tensor, Tensor[])");
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
}

}  // namespace fastbptt
