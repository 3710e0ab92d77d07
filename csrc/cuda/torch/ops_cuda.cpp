// The operators on CUDA tensors: the products for all steps at once by torch, and between them the
// recurrence.
//
//   forward   pre = x W_ih^T, recurrence
//   backward  recurrence, dx = d W_ih, dW_ih = d^T x, dW_hh = d^T h_{t-1}, db = sum of d
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>

#include "cuda/torch/calls.h"
#include "cuda/torch/run_recurrence.h"

namespace fastbptt {
namespace {

template <typename scalar_t>
RecurrenceTensors fill_common(Recurrence<scalar_t>* p, const LayerShape& shape,
                              const DeviceLayout& layout, const LayerTensors& tensors, int64_t d) {
  p->sequences = layout.sequences(d == 0 ? 1 : -1, tensors.resets);
  p->H = shape.H;
  p->R = shape.R;
  p->hx = direction_of<scalar_t>(tensors.hx, d);
  p->cx = direction_of<scalar_t>(tensors.cx, d);
  p->ld_out = shape.D * shape.R;
  RecurrenceTensors host;
  host.w_hh = shape.w_hh(tensors.weights, d);
  host.batch_sizes = layout.host.layout.batch_sizes;
  p->w_hh = const_data<scalar_t>(host.w_hh);
  if (shape.has_projection) host.w_hr = shape.w_hr(tensors.weights, d);
  p->w_hr = const_data<scalar_t>(host.w_hr);
  p->b_ih = shape.has_biases ? const_data<scalar_t>(shape.b_ih(tensors.weights, d)) : nullptr;
  p->b_hh = shape.has_biases ? const_data<scalar_t>(shape.b_hh(tensors.weights, d)) : nullptr;
  return host;
}

ForwardResults forward_cuda(const ForwardArguments& args) {
  const LayerShape shape = check_forward(args, HalfTypes::kBoth);
  const CallGuard guard(args.input);
  const LayerTensors tensors(args);
  const auto options = args.input.options();
  const ForwardResults results = make_forward_results(
      args, shape, [&](const std::vector<int64_t>& sizes) { return allocate(sizes, options); });
  if (shape.N == 0) return results;

  const DeviceLayout layout(args.input, shape, args);
  const Tensor input = tensors.input.view({shape.N, shape.I});
  const bool has_c = shape.has_cell_state(), keeps = shape.has_gates(results.gates);
  for_dtype(args.input, [&](auto zero) {
    using scalar_t = decltype(zero);
    for (int64_t d = 0; d < shape.D; ++d) {
      FwdRecurrence<scalar_t> p{};
      const RecurrenceTensors host = fill_common(&p, shape, layout, tensors, d);
      p.output = data<scalar_t>(results.output) + d * shape.R;
      p.h_n = direction_of<scalar_t>(results.h_n, d, true);
      p.gates = direction_of<scalar_t>(results.gates, d, keeps);
      p.c = direction_of<scalar_t>(results.c, d, has_c);
      p.c_n = direction_of<scalar_t>(results.c_n, d, has_c);
      // A step overwrites its part of pre by what it computes from it.
      const int64_t columns = shape.G * shape.H;
      const Tensor pre =
          shape.S == 0 ? results.output.view({shape.N, p.ld_out}).narrow(1, d * shape.R, columns)
          : keeps      ? results.gates.select(0, d).narrow(1, 0, columns)
                       : allocate({shape.N, columns}, options);
      p.pre = const_data<scalar_t>(pre);
      p.ld_pre = pre.stride(0);
      multiply(pre, input, shape.w_ih(tensors.weights, d).t());
      run_recurrence(shape.cell, p, host);
    }
  });
  return results;
}

// out = a b, or with `adds` out += a b. The library may add up one product after another, and lose about
// sqrt(n) / 5 units in the last place of n; so in float32, where nothing else loses as much, long sums
// are taken in blocks.
void sum_products(Tensor out, const Tensor& a, const Tensor& b, bool adds = false) {
  constexpr int64_t kBlock = 256, kMostBlocks = 8;
  const int64_t n = a.size(1), wished = (n + kBlock - 1) / kBlock;
  const int64_t blocks =
      a.scalar_type() == at::kFloat ? std::clamp<int64_t>(wished, 1, kMostBlocks) : 1;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = n * i / blocks, count = n * (i + 1) / blocks - first;
    const Tensor a_block = a.narrow(1, first, count), b_block = b.narrow(0, first, count);
    adds || i > 0 ? out.addmm_(a_block, b_block) : at::mm_out(out, a_block, b_block);
  }
}

// The backward pass of one direction.
template <typename scalar_t>
struct BackwardPass {
  using acc_t = Accumulator<scalar_t>;

  const BackwardArguments& args;
  const LayerShape& shape;
  const DeviceLayout& layout;
  const BackwardTensors& tensors;
  const BackwardResults& results;
  const Windows& windows;
  const Span span;
  const int64_t steps;  // of the longest lane
  const int64_t direction;

  const CellColumns columns = columns_of(shape.cell);
  const at::TensorOptions stored = args.input.options(),
                          summed = stored.dtype(accumulator_of(args.input));
  const bool overlapping = windows.k2 > windows.k1;
  const int64_t span_rows = layout.host.layout.offsets
                                ? layout.host.offsets[span.end] - layout.host.offsets[span.begin]
                                : (span.end - span.begin) * shape.B;
  const Stream stream = current_stream(args.input);

  // The span's rows of a tensor like input, [span, columns].
  Tensor of_span(const Tensor& rows) const {
    const int64_t size = rows.size(-1);
    if (layout.host.layout.offsets) {
      return rows.narrow(0, layout.host.offsets[span.begin], span_rows);
    }
    const int64_t time = args.batch_first ? 1 : 0;
    return rows.narrow(time, span.begin, span.end - span.begin).reshape({span_rows, size});
  }

  // A result with a row for each step of the span, and the tensor that holds it.
  Tensor make_rows(StepRows<scalar_t>* rows, int64_t width) const {
    const Tensor tensor = allocate({span_rows, width}, overlapping ? summed : stored);
    if (overlapping) {
      rows->sums = data<acc_t>(tensor.zero_());
    } else {
      rows->rows = data<scalar_t>(tensor);
    }
    return tensor;
  }

  Tensor make_state_gradient(const Tensor& gradient, bool needed, int64_t size, acc_t** to) const {
    if (!needed) return {};
    const bool is_wide = accumulator_of(gradient) != gradient.scalar_type();
    const Tensor sum = is_wide ? allocate({shape.B, size}, summed) : gradient.select(0, direction);
    *to = data<acc_t>(sum.zero_());
    return sum;
  }

  // W_ih with its rows as d has the columns that belong to it.
  Tensor in_column_order(const Tensor& w_ih) const {
    return columns.input_rotation ? w_ih.roll(columns.input_rotation * shape.H, 0) : w_ih;
  }
  Tensor in_gate_order(const Tensor& d_w_ih) const {
    return columns.input_rotation ? d_w_ih.roll(-columns.input_rotation * shape.H, 0) : d_w_ih;
  }

  void run() const {
    BwdRecurrence<scalar_t> p{};
    const RecurrenceTensors host = fill_common(&p, shape, layout, tensors, direction);
    const auto of_direction = [&](const OptionalTensor& tensor) {
      return direction_of<scalar_t>(tensor, direction);
    };
    p.windows = windows;
    p.steps = steps;
    p.begin = span.begin;
    p.span_first_row = layout.host.layout.offsets ? layout.host.offsets[span.begin] : 0;
    p.span_batch_stride = args.batch_first ? span.end - span.begin : 1;
    p.output = const_data<scalar_t>(tensors.output) + direction * shape.R;
    if (columns.has_cell_state) p.c = of_direction(tensors.c);
    if (tensors.d_output.has_value()) {
      const scalar_t* d_output = rows_of<scalar_t>(tensors.d_output) + direction * shape.R;
      (args.grad_by_lane ? p.d_lanes : p.d_output) = d_output;
    }
    p.d_h_n = of_direction(tensors.d_h_n);
    if (columns.has_cell_state) p.d_c_n = of_direction(tensors.d_c_n);
    p.kappa = rows_of<scalar_t>(tensors.kappa);

    const bool recomputes = shape.S > 0 && !shape.has_gates(tensors.gates);
    Tensor states_before, gates;
    if (args.needs[3] || recomputes) {
      states_before = allocate({span_rows, shape.R}, stored);
      Stepwise<scalar_t>::run_states_before(p, data<scalar_t>(states_before), span.end - span.begin,
                                            stream);
    }
    if (recomputes) {
      gates = recompute(p, states_before);
      p.gates = const_data<scalar_t>(gates);
      p.gates_of_span = true;
    } else if (shape.S > 0) {
      p.gates = of_direction(tensors.gates);
    }

    const int64_t width = columns.columns * shape.H, lanes = p.num_lanes();
    const Tensor d_sum = make_rows(&p.d, width);
    Tensor d_projected, unprojected;
    if (shape.has_projection) {
      d_projected = make_rows(&p.d_projected, shape.R);
      unprojected = allocate({span_rows, shape.H}, stored);
      p.unprojected = data<scalar_t>(overlapping ? unprojected.zero_() : unprojected);
    }
    Tensor d_by_lane;
    if (args.needs[0] && args.input_by_lane) {
      d_by_lane = allocate({steps, lanes, width}, stored);
      p.d_by_lane = data<scalar_t>(d_by_lane);
    }
    const Tensor d_hx = make_state_gradient(results.d_hx, args.needs[1], shape.R, &p.d_hx),
                 d_cx = make_state_gradient(results.d_cx, args.needs[2], shape.H, &p.d_cx);
    run_recurrence(shape.cell, p, host, span.end - span.begin);

    const Tensor d = d_sum.to(stored.dtype());
    if (args.needs[0]) input_gradient(p, args.input_by_lane ? d_by_lane : d);
    if (args.needs[3]) weight_gradients(d, d_sum, states_before, d_projected, unprojected);
    const bool is_wide = summed.dtype() != stored.dtype();
    if (is_wide && d_hx.defined()) results.d_hx.select(0, direction).copy_(d_hx);
    if (is_wide && d_cx.defined()) results.d_cx.select(0, direction).copy_(d_cx);
  }

  // The activations of the span, [span, S*H].
  Tensor recompute(const BwdRecurrence<scalar_t>& p, const Tensor& states_before) const {
    const int64_t rows = shape.G * shape.H;
    const Tensor gates = allocate({span_rows, shape.S * shape.H}, stored);
    const Tensor rec = allocate({span_rows, rows}, summed);
    multiply(gates.narrow(1, 0, rows), of_span(tensors.input),
             shape.w_ih(tensors.weights, direction).t());
    multiply(rec, states_before, shape.w_hh(tensors.weights, direction).t());
    Stepwise<scalar_t>::run_recompute(shape.cell, data<scalar_t>(gates), data<acc_t>(rec), p.b_ih,
                                      p.b_hh, span_rows, shape.H, stream);
    return gates;
  }

  // dx, from d with a row for each row of it.
  void input_gradient(const BwdRecurrence<scalar_t>& p, const Tensor& d) const {
    if (shape.I == 0) return;
    const int64_t rows = results.d_input.numel() / shape.I;
    Tensor to = results.d_input.view({rows, shape.I});
    const Tensor d_in = d.view({rows, -1}).narrow(1, 0, shape.G * shape.H);
    const Tensor w_ih = in_column_order(shape.w_ih(tensors.weights, direction));
    sum_products(to, d_in, w_ih, /*adds=*/direction > 0);
    if (!args.mask.has_value() || direction + 1 < shape.D) return;
    if (args.input_by_lane) {
      Stepwise<scalar_t>::run_mask_lanes(p, rows_of<scalar_t>(tensors.mask), data<scalar_t>(to),
                                         shape.I, stream);
    } else {
      to.mul_(of_span(*tensors.mask));
    }
  }

  // d_sum: d before it was rounded to the stored type.
  void weight_gradients(const Tensor& d, const Tensor& d_sum, const Tensor& states_before,
                        const Tensor& d_projected, const Tensor& unprojected) const {
    const std::vector<Tensor>& d_weights = results.d_weights;
    const int64_t rows = shape.G * shape.H;
    const Tensor d_in = d.narrow(1, 0, rows),
                 d_rec = d.narrow(1, columns.first_recurrent * shape.H, rows);
    Tensor d_w_ih = shape.w_ih(d_weights, direction);
    sum_products(d_w_ih, d_in.t(), of_span(tensors.input));
    if (columns.input_rotation) d_w_ih.copy_(in_gate_order(d_w_ih));
    sum_products(shape.w_hh(d_weights, direction), d_rec.t(), states_before);
    if (shape.has_biases) {
      const Tensor sums = d_sum.sum(0);
      Tensor d_b_ih = shape.b_ih(d_weights, direction), d_b_hh = shape.b_hh(d_weights, direction);
      d_b_ih.copy_(in_gate_order(sums.narrow(0, 0, rows)));
      d_b_hh.copy_(sums.narrow(0, columns.first_recurrent * shape.H, rows));
    }
    if (shape.has_projection) {
      sum_products(shape.w_hr(d_weights, direction), d_projected.to(stored.dtype()).t(),
                   unprojected);
    }
  }
};

// The windows as the kernels count them, where none are one that is whole.
Windows windows_of(const Cuts& cuts, int64_t T) {
  if (cuts.k1 == 0) return {T, T, 0, 1, false};
  const int64_t count = cuts.num_windows ? cuts.num_windows : count_windows(T, cuts.k1);
  return {cuts.k1, cuts.k2, cuts.first_window, count, cuts.last_only};
}

BackwardResults backward_cuda(const BackwardArguments& args) {
  const LayerShape shape = check_backward(args, HalfTypes::kBoth);
  Cuts cuts{args.k1, args.k2, args.last_only, args.first_window, args.num_windows};
  cuts.limit_to(shape.T);
  const Windows windows = windows_of(cuts, shape.T);
  TORCH_CHECK(windows.count < kMostLanes / std::max<int64_t>(shape.B, 1),
              "on a GPU there must be fewer than 2^31 windows in all sequences, got ",
              windows.count, " in each of ", shape.B);
  const Span span = span_of(shape.T, cuts);
  const int64_t steps = std::min(windows.k2, span.end - span.begin);
  const int64_t lane_rows = steps * windows.count * shape.B;
  check_grad_by_lane(args, shape, lane_rows);

  const CallGuard guard(args.input);
  const BackwardTensors tensors(args);
  const DeviceLayout layout(args.input, shape, args);
  const auto options = args.input.options();
  const auto empty = [&](const std::vector<int64_t>& sizes) { return allocate(sizes, options); };
  const BackwardResults results = make_backward_results(
      args, d_input_sizes(args, shape, layout.host, span, lane_rows), empty, empty);
  if (shape.N == 0) return zero(results);
  for_dtype(args.input, [&](auto zero) {
    for (int64_t d = 0; d < shape.D; ++d) {
      BackwardPass<decltype(zero)>{args, shape, layout, tensors, results, windows, span, steps, d}
          .run();
    }
  });
  return results;
}

}  // namespace

#ifdef FASTBPTT_EMULATED
TORCH_LIBRARY(fastbptt_emulated, m) {
  m.def(kForwardSchema);
  m.def(kBackwardSchema);
  m.impl("rnn_fwd", c10::DispatchKey::CPU, rnn_fwd<forward_cuda>);
  m.impl("rnn_bwd", c10::DispatchKey::CPU, rnn_bwd<backward_cuda>);
}
#else
TORCH_LIBRARY_IMPL(fastbptt, CUDA, m) {
  m.impl("rnn_fwd", rnn_fwd<forward_cuda>);
  m.impl("rnn_bwd", rnn_bwd<backward_cuda>);
}
#endif

}  // namespace fastbptt
