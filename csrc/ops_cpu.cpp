// The operators on the CPU.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <deque>

#include "kernel_calls.h"
#include "network_parts.h"
#include "workspace.h"

namespace fastbptt {
namespace {

// Calls fn with a number of the type that the kernels know a dtype by.
template <typename Fn>
void for_dtype(at::ScalarType dtype, Fn&& fn) {
  switch (dtype) {
    case at::kDouble: return fn(double{});
    case at::kFloat: return fn(float{});
    case at::kHalf: return fn(half_t{});
    case at::kBFloat16: return fn(bfloat16_t{});
    default: TORCH_INTERNAL_ASSERT(false, "no kernel for ", dtype);
  }
}

// The dtype that the kernels compute in for tensors of another: the same, or float32 where the
// instruction set has none for 16 bits.
at::ScalarType kernel_dtype(at::ScalarType dtype) {
  bool is_there = false;
  for_dtype(dtype, [&](auto number) { is_there = kernels_for<decltype(number)>(); });
  return is_there ? dtype : at::kFloat;
}

template <typename scalar_t>
void fill_common(LayerParams<scalar_t>* p, const LayerShape& shape, const Layout& layout,
                 const bool* resets, const std::vector<Lane>& lanes, const LayerTensors& tensors,
                 int64_t d, int threads) {
  const auto data = [](const Tensor& tensor) { return const_data<scalar_t>(tensor); };
  p->kind = shape.cell;
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

// A layer's forward pass with all that the kernels need.
struct ForwardLayer {
  LayerShape shape;
  at::ScalarType dtype;  // that the kernels compute in
  LayerTensors tensors;
  ForwardResults results;
  OwnedLayout layout;
  Cuts cuts;
  std::vector<std::vector<Lane>> lanes;  // of each direction

  explicit ForwardLayer(const ForwardArguments& args)
      : shape(check_forward(args, HalfTypes::kBoth)),
        dtype(kernel_dtype(args.input.scalar_type())),
        tensors(args),
        layout(shape, args) {
    tensors.convert(dtype);
    const auto options = tensors.input.options();
    results = make_forward_results(
        args, shape, [&](const std::vector<int64_t>& sizes) { return at::empty(sizes, options); });
    if (shape.N == 0) return;
    cuts.resets = rows_of<bool>(tensors.resets);
    for (int64_t d = 0; d < shape.D; ++d) {
      lanes.push_back(make_lanes(layout.layout, d == 0 ? 1 : -1, cuts));
    }
  }

  template <typename scalar_t>
  void append_passes(std::vector<FwdParams<scalar_t>>* passes, int threads) const {
    const bool has_c = shape.has_cell_state();
    for (int64_t d = 0; d < shape.D; ++d) {
      FwdParams<scalar_t>& p = passes->emplace_back();
      fill_common(&p, shape, layout.layout, cuts.resets, lanes[d], tensors, d, threads);
      p.output = data<scalar_t>(results.output) + d * shape.R;
      p.h_n = direction_of<scalar_t>(results.h_n, d, true);
      p.gates = direction_of<scalar_t>(results.gates, d, shape.has_gates(results.gates));
      p.c = direction_of<scalar_t>(results.c, d, has_c);
      p.c_n = direction_of<scalar_t>(results.c_n, d, has_c);
    }
  }
};

// Runs a layer, or the layers of a stack, by one call.
template <typename Layers>
void run_forward(const Layers& layers) {
  const ForwardLayer& last = layers.back();  // the others are as large but for their input
  const LayerShape& shape = last.shape;
  const double count = double(layers.size()) * double(shape.D);
  for_dtype(last.dtype, [&](auto number) {
    using scalar_t = decltype(number);
    std::vector<FwdParams<scalar_t>> passes;
    const int threads = threads_for(shape, count, double(shape.N));
    for (const ForwardLayer& layer : layers) layer.append_passes(&passes, threads);
    const auto& kernel = kernels_for<scalar_t>()->forward[int(shape.cell)];
    run_kernels(kernel, passes, order_of(kernel, passes, layers.size()),
                {"forward", shape, last.dtype, layers.size()});
  });
}

ForwardResults forward_cpu(const ForwardArguments& args) {
  const std::array<ForwardLayer, 1> layers{ForwardLayer(args)};
  if (layers[0].shape.N > 0) run_forward(layers);
  return converted(layers[0].results, args.input.scalar_type());
}

// Where the gradients that a layer's direction is given are not zero. Layers that hand gradients to
// each other by lane, or are run together, must come to the same lanes: so all of them go by the
// gradient of the stack's output, and count each final state if there are gradients of some.
Losses losses_of(const BackwardArguments& args, const BackwardTensors& tensors,
                 const LayerShape& shape, int64_t d, bool in_stack) {
  const auto rows = [](const OptionalTensor& tensor, int64_t first, int64_t ld, int64_t columns) {
    if (!tensor.has_value() || tensor->numel() == 0) return GradientRows();
    const int64_t element = tensor->element_size();
    const char* data = static_cast<const char*>(tensor->const_data_ptr()) + first * element;
    return GradientRows(data, element, ld, columns);
  };
  Losses losses;
  losses.output = rows(args.grad_by_lane ? tensors.d_network : tensors.d_output, d * shape.R,
                       shape.D * shape.R, shape.R);
  losses.h_n = rows(tensors.d_h_n, d * shape.B * shape.R, shape.R, shape.R);
  losses.c_n = rows(tensors.d_c_n, d * shape.B * shape.H, shape.H, shape.H);
  losses.all_ends = (args.grad_by_lane || args.input_by_lane || in_stack) &&
                    (args.grad_h_n.has_value() || args.grad_c_n.has_value());
  return losses;
}

// A layer's backward pass, likewise.
struct BackwardLayer {
  LayerShape shape;
  at::ScalarType dtype;
  BackwardTensors tensors;
  BackwardResults results;
  OwnedLayout layout;
  Cuts cuts;
  std::vector<std::vector<Lane>> lanes;
  int64_t lane_rows = 0;
  Span span;
  bool sums = false;  // over lanes that share steps
  bool steps_are_left_out = false;
  std::array<bool, 4> needs;
  bool grad_by_lane, input_by_lane;

  // In a stack, all layers have the lanes of the top one; a gradient comes to each of their steps
  // from the layer `above`.
  explicit BackwardLayer(const BackwardArguments& args, bool in_stack = false,
                         const BackwardLayer* above = nullptr)
      : shape(check_backward(args, HalfTypes::kBoth)),
        dtype(kernel_dtype(args.input.scalar_type())),
        tensors(args),
        layout(shape, args),
        needs{args.needs[0], args.needs[1], args.needs[2], args.needs[3]},
        grad_by_lane(args.grad_by_lane),
        input_by_lane(args.input_by_lane) {
    tensors.convert(dtype);
    if (tensors.kappa.has_value()) closed_ = tensors.kappa->eq(0);
    cuts = {args.k1,
            args.k2,
            args.last_only,
            args.first_window,
            args.num_windows,
            rows_of<bool>(tensors.resets),
            closed_.defined() ? closed_.const_data_ptr<bool>() : nullptr};
    cuts.limit_to(shape.T);
    span = span_of(shape.T, cuts);
    if (above) {
      lanes = above->lanes;
      for (Lane& lane : lanes[0]) {
        lane.loss_begin = 0;
        lane.loss_end = lane.steps;
      }
    } else {
      make_own_lanes(args, in_stack);
    }
    bool in_each_row = true;
    for (const std::vector<Lane>& each : lanes) {
      lane_rows += count_rows(each);
      in_each_row = in_each_row && count_rows(each) == shape.N;
    }
    check_grad_by_lane(args, shape, lane_rows);

    // Only where lanes share steps is there a sum over them, which the kernel begins with zeros in
    // each row of the span. Else it fills the rows that lanes come to: the others, and the initial
    // states that no lane begins with, have no gradient.
    const bool has_rows_of_all =
        span.end - span.begin == shape.T || args.input_by_lane || !args.needs[0];
    sums = cuts.overlapping() && !(has_rows_of_all && are_apart(layout.layout, 1, lanes[0]));
    const bool states_are_sums = args.resets.has_value() || sums || !in_each_row;
    steps_are_left_out = !sums && !args.input_by_lane && !in_each_row;
    const auto options = tensors.input.options();
    results = make_backward_results(
        args, d_input_sizes(args, shape, layout, span, lane_rows),
        [&](const std::vector<int64_t>& sizes) { return at::empty(sizes, options); },
        [&](const std::vector<int64_t>& sizes) {
          return states_are_sums ? at::zeros(sizes, options) : at::empty(sizes, options);
        });
    if (lane_rows == 0) {
      zero(results);
    } else if (steps_are_left_out) {
      results.d_input.zero_();
    }
  }

  // A pass for each direction in which there is anything to do.
  template <typename scalar_t>
  void append_passes(std::vector<BwdParams<scalar_t>>* passes, int threads) const {
    const bool has_c = shape.has_cell_state();
    for (int64_t d = 0; d < shape.D; ++d) {
      if (lanes[d].empty()) {
        for (int64_t i = 0; i < shape.weights_per_direction(); ++i) {
          results.d_weights[d * shape.weights_per_direction() + i].zero_();
        }
        continue;
      }
      BwdParams<scalar_t>& p = passes->emplace_back();
      fill_common(&p, shape, layout.layout, cuts.resets, lanes[d], tensors, d, threads);
      p.output = const_data<scalar_t>(tensors.output) + d * shape.R;
      p.gates = shape.has_gates(tensors.gates) ? direction_of<scalar_t>(tensors.gates, d) : nullptr;
      p.c = has_c ? direction_of<scalar_t>(tensors.c, d) : nullptr;
      const scalar_t* d_out = rows_of<scalar_t>(tensors.d_output);
      (grad_by_lane ? p.d_lanes : p.d_output) = d_out ? d_out + d * shape.R : nullptr;
      p.d_h_n = direction_of<scalar_t>(tensors.d_h_n, d);
      p.d_c_n = has_c ? direction_of<scalar_t>(tensors.d_c_n, d) : nullptr;
      p.d_input = needs[0] ? data<scalar_t>(results.d_input) : nullptr;
      p.d_input_by_lane = input_by_lane;
      p.accumulate_d_input = d > 0;
      p.kappa = rows_of<scalar_t>(tensors.kappa);
      p.mask = rows_of<scalar_t>(tensors.mask);
      p.overlapping = sums;
      p.begin = span.begin;
      p.end = span.end;
      p.d_hx = direction_of<scalar_t>(results.d_hx, d, needs[1]);
      p.d_cx = direction_of<scalar_t>(results.d_cx, d, needs[2]);
      if (needs[3]) {
        const std::vector<Tensor>& d_weights = results.d_weights;
        p.d_w_ih = data<scalar_t>(shape.w_ih(d_weights, d));
        p.d_w_hh = data<scalar_t>(shape.w_hh(d_weights, d));
        p.d_b_ih = shape.has_biases ? data<scalar_t>(shape.b_ih(d_weights, d)) : nullptr;
        p.d_b_hh = shape.has_biases ? data<scalar_t>(shape.b_hh(d_weights, d)) : nullptr;
        p.d_w_hr = shape.has_projection ? data<scalar_t>(shape.w_hr(d_weights, d)) : nullptr;
      }
    }
  }

 private:
  void make_own_lanes(const BackwardArguments& args, bool in_stack) {
    for (int64_t d = 0; d < shape.D; ++d) {
      const Losses losses = losses_of(args, tensors, shape, d, in_stack);
      lanes.push_back(make_lanes(layout.layout, d == 0 ? 1 : -1, cuts, &losses));
    }
  }

  Tensor closed_;  // where kappa is 0
};

// Likewise; the layers from the top.
template <typename Layers>
void run_backward(const Layers& layers) {
  const BackwardLayer& first = layers.front();
  const LayerShape& shape = first.shape;
  for_dtype(first.dtype, [&](auto number) {
    using scalar_t = decltype(number);
    std::vector<BwdParams<scalar_t>> passes;
    const int threads = threads_for(shape, 2 * double(layers.size()), double(first.lane_rows));
    for (const BackwardLayer& layer : layers) layer.append_passes(&passes, threads);
    const auto& kernel = kernels_for<scalar_t>()->backward[int(shape.cell)];
    const Order order =
        first.input_by_lane ? Order::kOneByOne : order_of(kernel, passes, layers.size());
    Tensor d_input_reverse;
    if (order == Order::kSideBySide && first.needs[0]) {
      d_input_reverse = at::empty_like(first.results.d_input);
      if (first.steps_are_left_out) d_input_reverse.zero_();
      passes[1].d_input = data<scalar_t>(d_input_reverse);
      passes[1].accumulate_d_input = false;
    }
    run_kernels(kernel, passes, order, {"backward", shape, first.dtype, layers.size()});
    if (d_input_reverse.defined()) first.results.d_input.add_(d_input_reverse);
  });
}

BackwardResults backward_cpu(const BackwardArguments& args) {
  const std::array<BackwardLayer, 1> layers{BackwardLayer(args)};
  if (layers[0].lane_rows > 0) run_backward(layers);
  return converted(layers[0].results, args.input.scalar_type());
}

std::atomic<int64_t> stack_bytes{4 << 20};

// Whether layers are run by one call. It holds on to what lies between them, which only short
// sequences have room for. Called before the layers' checks.
bool run_together(const Options& net, const Tensor& input, const Tensor& w_hh) {
  const int64_t columns = w_hh.dim() > 0 ? w_hh.size(-1) : 0;
  const int64_t rows = input.numel() / std::max<int64_t>(input.size(-1), 1);
  const int64_t between = net.num_layers * rows * columns * input.element_size();
  return net.num_layers > 1 && net.directions == 1 && between <= stack_limit() && rows > 0;
}

template <typename Layers>
std::vector<decltype(Layers::value_type::results)> results_of(const Layers& layers) {
  std::vector<decltype(Layers::value_type::results)> results;
  for (const auto& layer : layers) results.push_back(layer.results);
  return results;
}

}  // namespace

std::vector<ForwardResults> forward_stack_cpu(const Options& net, const Tensor& input,
                                              const Context& context, TensorList weights,
                                              bool keep_gates) {
  if (net.dropout > 0 || !run_together(net, input, weights[1])) return {};
  RECORD_FUNCTION("fastbptt::rnn_fwd", std::vector<c10::IValue>());
  std::deque<ForwardLayer> layers;
  for (int64_t i = 0; i < net.num_layers; ++i) {
    const OptionalTensor hx = of_layer(context.hx, net, i), cx = of_layer(context.cx, net, i);
    layers.emplace_back(ForwardArguments{
        {i == 0 ? input : layers[i - 1].results.output, hx, cx, of_layer(weights, net, i),
         net.has_biases, context.batch_sizes, net.batch_first, name_of(net.cell), context.resets},
        keep_gates});
    if (layers[i].dtype != input.scalar_type()) return {};  // each layer's results are rounded
  }
  run_forward(layers);
  return results_of(layers);
}

std::vector<BackwardResults> backward_stack_cpu(const Options& net, const Context& context,
                                                const TensorVector& grads, TensorList weights,
                                                TensorList kept, TensorList masks,
                                                const std::vector<c10::List<bool>>& needs) {
  if (!run_together(net, kept[0], weights[1])) return {};
  RECORD_FUNCTION("fastbptt::rnn_bwd", std::vector<c10::IValue>());
  std::deque<BackwardLayer> layers;  // from the top
  for (int64_t i = net.num_layers - 1; i >= 0; --i) {
    const BackwardLayer* above = layers.empty() ? nullptr : &layers.back();
    const Tensor* const layer = &kept[i * kKeptByLayer];
    const OptionalTensor hx = of_layer(context.hx, net, i), cx = of_layer(context.cx, net, i);
    const OptionalTensor grad_output = optional(above ? above->results.d_input : grads[0]);
    const OptionalTensor grad_h_n = of_layer(optional(grads[1]), net, i);
    const OptionalTensor grad_c_n = of_layer(optional(grads[2]), net, i);
    const OptionalTensor mask =
        i > 0 && !masks.empty() ? OptionalTensor(masks[i - 1]) : std::nullopt;
    const OptionalTensor none;
    layers.emplace_back(
        BackwardArguments{{layer[0], hx, cx, of_layer(weights, net, i), net.has_biases,
                           context.batch_sizes, net.batch_first, name_of(net.cell), context.resets},
                          grad_output,
                          grad_h_n,
                          grad_c_n,
                          layer[1],
                          layer[2],
                          layer[3],
                          needs[i],
                          net.k1,
                          net.k2,
                          net.last_only && !above,
                          context.kappa,
                          mask,
                          0,
                          0,
                          false,
                          false,
                          none},
        true, above);
    if (layers.back().lane_rows == 0 || layers.back().dtype != kept[0].scalar_type()) return {};
  }
  run_backward(layers);
  return results_of(layers);
}

void release_workspace() { workspace.release(); }

int64_t stack_limit() { return stack_bytes; }
void set_stack_limit(int64_t bytes) { stack_bytes = bytes; }

TORCH_LIBRARY_IMPL(fastbptt, CPU, m) {
  m.impl("rnn_fwd", rnn_fwd<forward_cpu>);
  m.impl("rnn_bwd", rnn_bwd<backward_cpu>);
}

}  // namespace fastbptt
