// The steps of tangent passes on the CPU.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "kernel_calls.h"
#include "tangents.h"

namespace fastbptt {
namespace {

// One direction's call: its sizes, its lanes, and tensors as the kernels read them.
struct StepsCall {
  const LayerShape& shape;
  const OwnedLayout layout;
  std::vector<Lane> lanes;
  std::vector<Tensor> held;  // what pointers point to

  StepsCall(const StepArguments& args, const LayerShape& shape)
      : shape(shape),
        layout(shape.T, shape.B, shape.N, args.batch_first, args.batch_sizes),
        lanes(make_lanes(layout.layout, args.reverse ? -1 : 1, Cuts{})) {}

  template <typename scalar_t>
  const scalar_t* hold(const OptionalTensor& tensor) {
    if (!tensor.has_value() || tensor->numel() == 0) return nullptr;
    held.push_back(tensor->contiguous());
    return const_data<scalar_t>(held.back());
  }
  template <typename scalar_t>
  Rows<scalar_t> hold_rows(const OptionalTensor& tensor) {
    if (!tensor.has_value()) return {};
    held.push_back(tensor->stride(1) == 1 ? *tensor : tensor->contiguous());
    return {const_data<scalar_t>(held.back()), held.back().stride(0)};
  }

  template <typename scalar_t>
  void fill(TangentParams<scalar_t>* p, const StepArguments& args, double products) {
    p->kind = shape.cell;
    p->layout = layout.layout;
    p->H = shape.H;
    p->R = shape.R;
    p->direction = args.reverse ? -1 : 1;
    p->lanes = lanes.data();
    p->num_lanes = int64_t(lanes.size());
    p->w_hh = hold<scalar_t>(args.w_hh);
    p->w_hr = hold<scalar_t>(args.w_hr);
    p->output = hold_rows<scalar_t>(args.output);
    p->c = hold<scalar_t>(args.c);
    p->gates = hold<scalar_t>(args.gates);
    p->before = hold<scalar_t>(args.before);
    p->gate = hold<scalar_t>(args.gate);
    const double row = double(shape.R) * double(shape.G * shape.H + (p->w_hr ? shape.H : 0));
    p->threads = useful_threads(at::get_num_threads(), products * double(shape.N) * row);
  }
};

template <typename Params>
void run_steps(const Kernel<Params>& kernel, const Params& p, const char* pass,
               const StepsCall& call, at::ScalarType dtype) {
  std::vector<Params> passes{p};
  run_kernels(kernel, passes, Order::kOneByOne, {pass, call.shape, dtype, 1});
}

template <typename Fn>
void for_float_or_double(at::ScalarType dtype, Fn&& fn) {
  dtype == at::kDouble ? fn(double{}) : fn(float{});
}

ForwardTangents forward_tangents_cpu(const ForwardTangentArguments& args, const LayerShape& shape) {
  StepsCall call(args, shape);
  const auto options = args.pre.options();
  const int64_t with_c = shape.has_cell_state();
  const ForwardTangents results{
      at::empty({shape.N, shape.R}, options), at::empty({with_c * shape.N, shape.H}, options),
      at::empty({shape.N, shape.S * shape.H}, options), at::empty({shape.B, shape.R}, options),
      at::empty({with_c * shape.B, shape.H}, options)};
  if (shape.N == 0) return results;
  for_float_or_double(args.pre.scalar_type(), [&](auto number) {
    using scalar_t = decltype(number);
    ForwardTangentParams<scalar_t> p{};
    call.fill(&p, args, 1);
    p.hx = call.hold<scalar_t>(args.hx_t);
    p.cx = call.hold<scalar_t>(args.cx_t);
    p.pre = call.hold<scalar_t>(args.pre);
    p.projected = call.hold<scalar_t>(args.projected);
    p.output_t = data<scalar_t>(results.output);
    p.c_t = data<scalar_t>(results.c);
    p.gates_t = data<scalar_t>(results.gates);
    p.h_n_t = data<scalar_t>(results.h_n);
    p.c_n_t = data<scalar_t>(results.c_n);
    run_steps(tangent_kernels_for<scalar_t>()->forward[int(shape.cell)], p, "tangents", call,
              args.pre.scalar_type());
  });
  return results;
}

BackwardTangents backward_tangents_cpu(const BackwardTangentArguments& args,
                                       const LayerShape& shape) {
  StepsCall call(args, shape);
  const int64_t with_tangents = args.has_tangents();
  const bool weights_too = args.w_hh.size(0) > shape.G * shape.H;
  const auto options = args.output.options();
  const int64_t with_c = shape.has_cell_state(), width = columns_of(shape) * shape.H;
  const auto make = [&](int64_t rows, int64_t columns) {
    return std::pair(at::empty({rows, columns}, options),
                     at::empty({with_tangents * rows, columns}, options));
  };
  BackwardTangents r;
  std::tie(r.d, r.d_t) = make(shape.N, width);
  std::tie(r.d_projected, r.d_projected_t) = make(args.w_hr.has_value() * shape.N, shape.R);
  std::tie(r.d_hx, r.d_hx_t) = make(args.needs_states * shape.B, shape.R);
  std::tie(r.d_cx, r.d_cx_t) = make(args.needs_states * with_c * shape.B, shape.H);
  if (shape.N == 0) return r;
  for_float_or_double(args.output.scalar_type(), [&](auto number) {
    using scalar_t = decltype(number);
    BackwardTangentParams<scalar_t> p{};
    call.fill(&p, args, double(1 + with_tangents + weights_too));
    p.has_tangents = with_tangents;
    p.weights_too = weights_too;
    p.d_output = call.hold_rows<scalar_t>(args.d_output);
    p.d_output_t = call.hold_rows<scalar_t>(args.d_output_t);
    p.d_h_n = call.hold<scalar_t>(args.d_h_n);
    p.d_h_n_t = call.hold<scalar_t>(args.d_h_n_t);
    p.d_c_n = call.hold<scalar_t>(args.d_c_n);
    p.d_c_n_t = call.hold<scalar_t>(args.d_c_n_t);
    p.output_t = call.hold_rows<scalar_t>(args.output_t);
    p.c_t = call.hold<scalar_t>(args.c_t);
    p.gates_t = call.hold<scalar_t>(args.gates_t);
    p.before_t = call.hold<scalar_t>(args.before_t);
    p.d = data<scalar_t>(r.d);
    p.d_t = data<scalar_t>(r.d_t);
    p.d_projected = data<scalar_t>(r.d_projected);
    p.d_projected_t = data<scalar_t>(r.d_projected_t);
    if (args.needs_states) {
      p.d_hx = data<scalar_t>(r.d_hx);
      p.d_hx_t = data<scalar_t>(r.d_hx_t);
      p.d_cx = data<scalar_t>(r.d_cx);
      p.d_cx_t = data<scalar_t>(r.d_cx_t);
    }
    run_steps(tangent_kernels_for<scalar_t>()->backward[int(shape.cell)], p, "backward tangents",
              call, args.output.scalar_type());
  });
  return r;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastbptt, CPU, m) {
  m.impl("rnn_jvp_steps", rnn_jvp_steps<forward_tangents_cpu>);
  m.impl("rnn_bwd_jvp_steps", rnn_bwd_jvp_steps<backward_tangents_cpu>);
}

}  // namespace fastbptt
