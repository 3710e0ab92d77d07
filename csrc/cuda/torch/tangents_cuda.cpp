// The steps of tangent passes on CUDA tensors: the time loops, a product of the library's and a kernel
// of ours at each step.
#include "tangents.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <list>

#include "cuda/cell_columns.h"
#include "cuda/tangent.h"
#include "cuda/torch/allocate.h"
#include "cuda/torch/calls.h"
#include "cuda/torch/run_recurrence.h"

namespace fastbptt {
namespace {

// What both passes take, as kernels see it.
class Steps {
 public:
  const CellKind cell;
  const CellColumns columns;
  const int64_t T, B, N, H, R;
  const int direction;
  const bool is_projected;
  const Tensor w_hh, w_hr;  // w_hr: undefined without a projection
  const at::TensorOptions options;
  const DeviceLayout layout;
  const Stream stream;

  Steps(const StepArguments& args, const LayerShape& shape)
      : cell(shape.cell),
        columns(columns_of(cell)),
        T(shape.T),
        B(shape.B),
        N(shape.N),
        H(shape.H),
        R(shape.R),
        direction(args.reverse ? -1 : 1),
        is_projected(shape.has_projection),
        w_hh(args.w_hh.contiguous()),
        w_hr(is_projected ? args.w_hr->contiguous() : Tensor()),
        options(args.output.options()),
        layout(args.output, T, B, N, args.batch_first, args.batch_sizes),
        stream(current_stream(args.output)) {}

  template <typename scalar_t>
  void fill(TangentSteps<scalar_t>* p, const OptionalTensor& gate) {
    *p = {layout.sequences(direction, std::nullopt), H, R, is_projected, nullptr};
    if (gate.has_value()) p->gate = const_data<scalar_t>(held_.emplace_back(gate->contiguous()));
  }

  // The sequences that have step t: the first ones.
  int64_t rows_at(int64_t t) const {
    return layout.host.layout.batch_sizes ? layout.host.layout.batch_sizes[t] : B;
  }

  Tensor empty(at::IntArrayRef sizes) const { return allocate(sizes, options); }
  Tensor empty_if(bool is_there, int64_t rows, int64_t columns) const {
    return empty({is_there ? rows : 0, columns});
  }

  // A tensor for reading; what is no matrix of whole rows is copied for the time of the call.
  template <typename scalar_t>
  Matrix<const scalar_t> given(const Tensor& tensor) {
    if (!tensor.defined() || tensor.numel() == 0) return {};
    const bool has_rows = tensor.size(1) == 1 || tensor.stride(1) == 1;
    const Tensor& held = held_.emplace_back(has_rows ? tensor : tensor.contiguous());
    return {const_data<scalar_t>(held), held.stride(0)};
  }
  template <typename scalar_t>
  Matrix<const scalar_t> given(const OptionalTensor& tensor) {
    return given<scalar_t>(tensor.value_or(Tensor()));
  }
  template <typename scalar_t>
  DualMatrix<const scalar_t> given(const OptionalTensor& value, const OptionalTensor& tangent) {
    return {given<scalar_t>(value), given<scalar_t>(tangent)};
  }

 private:
  std::list<Tensor> held_;
};

// A tensor for writing.
template <typename scalar_t>
Matrix<scalar_t> to(const Tensor& tensor) {
  if (!tensor.defined() || tensor.numel() == 0) return {};
  return {data<scalar_t>(tensor), tensor.stride(0)};
}
template <typename scalar_t>
DualMatrix<scalar_t> to(const Tensor& value, const Tensor& tangent) {
  return {to<scalar_t>(value), to<scalar_t>(tangent)};
}

// --- Forward -------------------------------------------------------------------------------------

template <typename scalar_t>
void run(const ForwardTangentArguments& args, Steps& steps, const ForwardTangents& results) {
  using Kernels = Tangent<scalar_t>;
  const int64_t T = steps.T, B = steps.B, H = steps.H, R = steps.R;
  FwdTangents<scalar_t> p{};
  steps.fill(&p, args.gate);
  p.output = steps.given<scalar_t>(args.output);
  p.c = steps.given<scalar_t>(args.c);
  p.gates = steps.given<scalar_t>(args.gates);
  p.before = steps.given<scalar_t>(args.before);
  p.pre = steps.given<scalar_t>(args.pre);
  p.projected = steps.given<scalar_t>(args.projected);
  p.hx = steps.given<scalar_t>(args.hx_t);
  p.cx = steps.given<scalar_t>(args.cx_t);
  p.output_t = to<scalar_t>(results.output);
  p.c_t = to<scalar_t>(results.c);
  p.gates_t = to<scalar_t>(results.gates);
  p.h_n = to<scalar_t>(results.h_n);
  p.c_n = to<scalar_t>(results.c_n);

  const Tensor h = steps.empty({B, R}), rec = steps.empty({B, steps.columns.gates * H});
  const Tensor c = steps.empty_if(steps.columns.has_cell_state, B, H),
               unprojected = steps.empty_if(steps.is_projected, B, H),
               projected = steps.empty_if(steps.is_projected, B, R);
  p.h = to<scalar_t>(h);
  p.carried_c = to<scalar_t>(c);
  p.unprojected = to<scalar_t>(unprojected);
  p.from_projection = reading(to<scalar_t>(projected));
  const Tensor w_hh_t = steps.w_hh.t(), w_hr_t = steps.is_projected ? steps.w_hr.t() : Tensor();

  Kernels::run_initial_states(p, steps.stream);
  for (int64_t step = 0; step < T; ++step) {
    const int64_t t = steps.direction > 0 ? step : T - 1 - step, rows = steps.rows_at(t);
    if (step > 0 || args.hx_t.has_value()) {
      multiply(first_rows(rec, rows), first_rows(h, rows), w_hh_t);
      p.rec = reading(to<scalar_t>(rec));
    }
    Kernels::run_forward_step(steps.cell, p, t, rows, steps.stream);
    if (!steps.is_projected) continue;
    multiply(first_rows(projected, rows), first_rows(unprojected, rows), w_hr_t);
    Kernels::run_project_step(p, t, rows, steps.stream);
  }
}

// Calls run for the two dtypes that tangents have.
template <typename Args, typename Results>
void dispatch(const Args& args, Steps& steps, const Results& results) {
  args.output.scalar_type() == at::kDouble ? run<double>(args, steps, results)
                                           : run<float>(args, steps, results);
}

ForwardTangents forward_tangents_cuda(const ForwardTangentArguments& args,
                                      const LayerShape& shape) {
  const CallGuard guard(args.output);
  Steps steps(args, shape);
  const CellColumns& columns = steps.columns;
  const bool has_c = columns.has_cell_state;
  const ForwardTangents results{
      steps.empty({steps.N, steps.R}), steps.empty_if(has_c, steps.N, steps.H),
      steps.empty({steps.N, columns.saved * steps.H}), steps.empty({steps.B, steps.R}),
      steps.empty_if(has_c, steps.B, steps.H)};
  if (steps.N > 0) dispatch(args, steps, results);
  return results;
}

// --- Backward ------------------------------------------------------------------------------------

// What stays between launches: a row of each sequence, with its tangent, if it has one, before it. So
// [tangent, value] is one row of a product too.
struct Scratch {
  Tensor all;  // [B, parts, width], parts: 1 or 2

  template <typename scalar_t>
  DualMatrix<scalar_t> rows() const {
    if (!all.defined()) return {};
    const int64_t parts = all.size(1);
    return to<scalar_t>(all.select(1, parts - 1), parts == 2 ? all.select(1, 0) : Tensor());
  }
};

// to = from w, for the first `rows` sequences. w may have its own tangent below it: the tangent of the
// product is from' w + from w', a product of both with both.
void multiply_rows(const Scratch& to, const Scratch& from, const Tensor& w, int64_t rows) {
  const Tensor a = first_rows(from.all, rows), product = first_rows(to.all, rows);
  const int64_t parts = a.size(1), width = a.size(2);
  if (w.size(0) == width) {
    multiply(product.view({rows * parts, -1}), a.view({rows * parts, width}), w);
    return;
  }
  multiply(product.select(1, parts - 1), a.select(1, parts - 1), w.narrow(0, 0, width));
  if (parts == 2) multiply(product.select(1, 0), a.view({rows, 2 * width}), w);
}

template <typename scalar_t>
void run(const BackwardTangentArguments& args, Steps& steps, const BackwardTangents& results) {
  using Kernels = Tangent<scalar_t>;
  const int64_t T = steps.T, B = steps.B, H = steps.H, R = steps.R;
  const bool dual = args.has_tangents();
  BwdTangents<scalar_t> p{};
  steps.fill(&p, args.gate);
  p.output = steps.given<scalar_t>(args.output, args.output_t);
  p.c = steps.given<scalar_t>(args.c, args.c_t);
  p.gates = steps.given<scalar_t>(args.gates, args.gates_t);
  p.before = steps.given<scalar_t>(args.before, args.before_t);
  p.d_output = steps.given<scalar_t>(args.d_output, args.d_output_t);
  p.d_h_n = steps.given<scalar_t>(args.d_h_n, args.d_h_n_t);
  p.d_c_n = steps.given<scalar_t>(args.d_c_n, args.d_c_n_t);
  p.d = to<scalar_t>(results.d, results.d_t);
  p.d_projected = to<scalar_t>(results.d_projected, results.d_projected_t);
  p.d_hx = to<scalar_t>(results.d_hx, results.d_hx_t);
  p.d_cx = to<scalar_t>(results.d_cx, results.d_cx_t);

  const auto scratch = [&](int64_t width) -> Scratch {
    return {steps.empty({B, dual ? 2 : 1, width})};
  };
  const int64_t most_rows = B * (dual ? 2 : 1);
  const Tensor w_hh = as_operand(steps.w_hh, most_rows);
  const Tensor w_hr = steps.is_projected ? as_operand(steps.w_hr, most_rows) : Tensor();
  const Scratch d_recurrent = scratch(steps.columns.gates * H), from_after = scratch(R);
  const Scratch carry = steps.columns.has_carry ? scratch(H) : Scratch{};
  const Scratch projected = steps.is_projected ? scratch(R) : Scratch{};
  const Scratch from_projection = steps.is_projected ? scratch(H) : Scratch{};
  p.d_recurrent = d_recurrent.rows<scalar_t>();
  p.projected = projected.rows<scalar_t>();
  p.from_after = reading(from_after.rows<scalar_t>());
  p.from_projection = reading(from_projection.rows<scalar_t>());
  p.carry = carry.rows<scalar_t>();

  for (int64_t step = 0; step < T; ++step) {
    const int64_t t = steps.direction > 0 ? T - 1 - step : step, rows = steps.rows_at(t);
    if (step > 0) {  // of the sequences that have the step after it too
      const int64_t both = std::min(rows, steps.rows_at(t + steps.direction));
      multiply_rows(from_after, d_recurrent, w_hh, both);
    }
    if (steps.is_projected) {
      Kernels::run_project_back(p, dual, t, rows, steps.stream);
      multiply_rows(from_projection, projected, w_hr, rows);
    }
    Kernels::run_backward_step(steps.cell, p, dual, t, rows, steps.stream);
  }
  if (!args.needs_states) return;
  // Each sequence's own first step is the last that wrote its rows.
  multiply_rows(from_after, d_recurrent, w_hh, B);
  Kernels::run_initial_gradients(steps.cell, p, dual, steps.stream);
}

BackwardTangents backward_tangents_cuda(const BackwardTangentArguments& args,
                                        const LayerShape& shape) {
  const CallGuard guard(args.output);
  Steps steps(args, shape);
  const int64_t N = steps.N, B = steps.B, width = steps.columns.columns * steps.H;
  const bool dual = args.has_tangents(), is_projected = steps.is_projected;
  const bool with_h = args.needs_states, with_c = with_h && steps.columns.has_cell_state;
  const BackwardTangents results{
      steps.empty({N, width}),
      steps.empty_if(dual, N, width),
      steps.empty_if(is_projected, N, steps.R),
      steps.empty_if(is_projected && dual, N, steps.R),
      steps.empty_if(with_h, B, steps.R),
      steps.empty_if(with_h && dual, B, steps.R),
      steps.empty_if(with_c, B, steps.H),
      steps.empty_if(with_c && dual, B, steps.H),
  };
  if (N > 0) dispatch(args, steps, results);
  return results;
}

}  // namespace

#ifdef FASTBPTT_EMULATED
TORCH_LIBRARY_FRAGMENT(fastbptt_emulated, m) {
  m.def(kForwardTangentsSchema);
  m.def(kBackwardTangentsSchema);
  m.impl("rnn_jvp_steps", c10::DispatchKey::CPU, rnn_jvp_steps<forward_tangents_cuda>);
  m.impl("rnn_bwd_jvp_steps", c10::DispatchKey::CPU, rnn_bwd_jvp_steps<backward_tangents_cuda>);
}
#else
TORCH_LIBRARY_IMPL(fastbptt, CUDA, m) {
  m.impl("rnn_jvp_steps", rnn_jvp_steps<forward_tangents_cuda>);
  m.impl("rnn_bwd_jvp_steps", rnn_bwd_jvp_steps<backward_tangents_cuda>);
}
#endif

}  // namespace fastbptt
