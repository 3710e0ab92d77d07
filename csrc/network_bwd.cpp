// The backward pass of a network, as one operator.
//
// Where windows overlap they are taken in groups: a group goes through all layers, from the top to the
// bottom, with the gradients between layers kept apart for each window. How many groups there are
// depends on T and B, which a trace may hold as symbols, and on the workspace limit, so tracers must not
// look into it.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>

#include "lanes.h"
#include "network_parts.h"
#include "workspace.h"

namespace fastbptt {
namespace {

std::atomic<int64_t> workspace_bytes{256 << 20};

using BackwardResult = std::tuple<Tensor, Tensor, Tensor, TensorVector>;

// The operator of one layer, through the dispatcher: whatever device or fake tensor.
const auto& rnn_bwd() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastbptt::rnn_bwd", "")
          .typed<BackwardResult(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                const OptionalTensor&, const OptionalTensor&, TensorList, bool,
                                const OptionalTensor&, bool, c10::string_view, c10::List<bool>,
                                int64_t, int64_t, bool, const OptionalTensor&,
                                const OptionalTensor&, const OptionalTensor&, int64_t, int64_t,
                                bool, bool, const OptionalTensor&)>();
  return op;
}

// How many windows a group takes: so many that the steps which two groups share cost little, and that
// rows fill the kernels' tiles; but not more than the workspace limit has room for.
int64_t windows_in_group(const Options& net, const Cuts& cuts, int64_t B, int64_t input_size,
                         const Tensor& w_hh) {
  const int64_t element = w_hh.element_size(), H = w_hh.size(1);
  const int64_t sum = std::max<int64_t>(element, sizeof(float));  // of what is not rounded
  const int64_t columns = net.cell == CellKind::kGru ? 4 * H : w_hh.size(0);
  const int64_t shared_steps = cuts.k2 - cuts.k1;
  constexpr int64_t kRows = 1024, kOwnToShared = 8;
  const int64_t wanted = std::max(kRows / std::max<int64_t>(B, 1) + 1,
                                  kOwnToShared * ((shared_steps + cuts.k1 - 1) / cuts.k1));
  // Bytes: of each lane, two steps of the recurrence and what it carries; of each step, its sum over
  // the lanes and the input's gradient, each with indices beside it; and between layers, two
  // gradients for each step of each lane. On a GPU also the state before each step, and what the
  // recurrence gives for each step of each lane.
  constexpr int64_t kIndices = 3 * sizeof(int64_t);
  const int64_t lane = 2 * (columns * sum + kIndices) + 2 * H * sum;
  const bool on_gpu = w_hh.is_cuda();
  const int64_t step = columns * sum + (input_size + (on_gpu ? H : 0)) * element + kIndices;
  const int64_t between = net.num_layers > 1 ? 2 * H * element : 0;
  const int64_t lane_step = between + (on_gpu ? columns * element : 0);
  const int64_t window = B * (lane + cuts.k1 * step + cuts.k2 * lane_step) + 1;
  const int64_t room = workspace_limit() - B * shared_steps * step;
  return std::max<int64_t>(1, std::min(wanted, room / window));
}

// The groups of windows that overlap, or one group that stands for everything.
std::vector<Cuts> groups_of(const Options& net, const Cuts& cuts, int64_t T, int64_t B,
                            int64_t input_size, const Tensor& w_hh) {
  if (!cuts.overlapping()) return {cuts};
  const int64_t windows = count_windows(T, cuts.k1);
  const int64_t most = windows_in_group(net, cuts, B, input_size, w_hh);
  std::vector<Cuts> groups((windows + most - 1) / most, cuts);
  const int64_t count = int64_t(groups.size());
  for (int64_t i = 0; i < count; ++i) {
    groups[i].first_window = windows * i / count;
    groups[i].num_windows = windows * (i + 1) / count - groups[i].first_window;
  }
  return groups;
}

// The part of a gradient of input that belongs to some steps.
Tensor rows_of_steps(const Tensor& d_input, const Options& net, const OptionalTensor& batch_sizes,
                     Span span) {
  if (!batch_sizes.has_value()) {
    return d_input.narrow(net.batch_first ? 1 : 0, span.begin, span.end - span.begin);
  }
  const auto rows = [&](int64_t begin, int64_t end) {
    return batch_sizes->narrow(0, begin, end - begin).sum().item<int64_t>();
  };
  return d_input.narrow(0, rows(0, span.begin), rows(span.begin, span.end));
}

// Gradients before those of the weights: of input, hx and cx.
constexpr int64_t kOthers = 3;

// What a layer's own pass needs; one above another gives the gradient of its input to that one.
c10::List<bool> needs_of_layer(const std::vector<bool>& needs, int64_t per_layer, int64_t layer) {
  const auto first = needs.begin() + kOthers + layer * per_layer;
  const bool needs_weights = std::find(first, first + per_layer, true) != first + per_layer;
  return c10::List<bool>({needs[0] || layer > 0, needs[1], needs[2], needs_weights});
}

// Adds one of `parts` parts. The sum of several is not rounded to 16 bits before it is complete.
void add(Tensor* sum, const Tensor& part, size_t parts) {
  if (sum->defined()) {
    sum->add_(part);
  } else if (parts > 1 && part.element_size() < int64_t(sizeof(float))) {
    *sum = part.to(at::kFloat);
  } else {
    *sum = part;
  }
}

}  // namespace

TensorVector network_gradients(const Options& net, const Context& context, TensorVector grads,
                               TensorList weights, TensorList kept, TensorList masks,
                               const std::vector<bool>& needs) {
  const int64_t num_weights = int64_t(weights.size());
  LayerShape shape{};
  check_batch_sizes(kept[0], context.batch_sizes, net.batch_first, std::nullopt, &shape);

  const Tensor* layers = kept.data();
  const bool needs_input = needs[0], needs_hx = needs[1], needs_cx = needs[2];
  const int64_t per_layer = num_weights / net.num_layers, top = net.num_layers - 1;
  TensorVector result(kOthers + num_weights);
  std::vector<Tensor> d_hx(net.num_layers), d_cx(net.num_layers);
  const int64_t T = shape.T, B = shape.B;
  Cuts cuts;
  cuts.k1 = net.k1;
  cuts.k2 = net.k2;
  cuts.limit_to(T);
  const std::vector<Cuts> groups = groups_of(net, cuts, T, B, layers[0].size(-1), weights[1]);
  const auto sum_options =
      layers[0].options().dtype(at::promote_types(layers[0].scalar_type(), at::kFloat));
  if (cuts.overlapping() && grads[0].defined()) grads[0] = grads[0].contiguous();
  if (needs_input && groups.size() > 1) {
    result[0] = at::zeros(layers[0].sizes(), sum_options);
  }
  std::vector<c10::List<bool>> layer_needs;
  for (int64_t i = 0; i <= top; ++i) {
    layer_needs.push_back(needs_of_layer(needs, per_layer, i));
  }
  const auto add_layer = [&](int64_t i, const Tensor& layer_d_hx, const Tensor& layer_d_cx,
                             TensorList d_weights) {
    if (needs_hx) add(&d_hx[i], layer_d_hx, groups.size());
    if (needs_cx) add(&d_cx[i], layer_d_cx, groups.size());
    for (int64_t j = 0; j < per_layer; ++j) {
      const int64_t index = i * per_layer + j;
      if (needs[kOthers + index]) add(&result[kOthers + index], d_weights[j], groups.size());
    }
  };
  const auto run_one_by_one = [&](const Cuts& group) {
    Tensor grad = grads[0];
    for (int64_t i = top; i >= 0; --i) {
      const Tensor* layer = layers + i * kKeptByLayer;
      const Tensor &input = layer[0], &output = layer[1], &c = layer[2], &gates = layer[3];
      const Tensor mask = i > 0 && !masks.empty() ? masks[i - 1] : Tensor();
      auto [d_input, layer_d_hx, layer_d_cx, d_weights] = rnn_bwd().call(
          optional(grad), of_layer(optional(grads[1]), net, i),
          of_layer(optional(grads[2]), net, i), input, output, c, gates,
          of_layer(context.hx, net, i), of_layer(context.cx, net, i), of_layer(weights, net, i),
          net.has_biases, context.batch_sizes, net.batch_first, name_of(net.cell), layer_needs[i],
          cuts.k1, cuts.k2, net.last_only && (i == top || cuts.overlapping()), context.resets,
          context.kappa, optional(mask), group.first_window, group.num_windows,
          cuts.overlapping() && i < top, cuts.overlapping() && i > 0,
          cuts.overlapping() && i < top ? optional(grads[0]) : std::nullopt);
      // Where a group has no loss its gradients are zeros: the last group's are enough.
      const bool has_no_lanes =
          cuts.overlapping() && i > 0 && d_input.sym_size(0).maybe_as_int() == 0;
      if (has_no_lanes && &group != &groups.back()) {
        return Tensor();
      }
      grad = d_input;
      add_layer(i, layer_d_hx, layer_d_cx, d_weights);
    }
    return grad;
  };
  const auto run_together = [&]() -> std::vector<BackwardResults> {
    if (net.num_layers == 1 || cuts.overlapping()) return {};
    TensorVector others = grads;
    context.append_to(&others);
    if (!go_to_cpu({others, weights, kept, masks})) return {};
    return backward_stack_cpu(net, context, grads, weights, kept, masks, layer_needs);
  };
  for (const Cuts& group : groups) {
    Tensor grad;
    const std::vector<BackwardResults> together = run_together();
    for (size_t j = 0; j < together.size(); ++j) {
      const BackwardResults& layer = together[j];
      add_layer(top - int64_t(j), layer.d_hx, layer.d_cx, layer.d_weights);
      grad = layer.d_input;
    }
    if (together.empty()) grad = run_one_by_one(group);
    if (!needs_input || !grad.defined()) continue;
    if (groups.size() == 1) {
      result[0] = grad;
    } else {
      rows_of_steps(result[0], net, context.batch_sizes, span_of(T, group)).add_(grad);
    }
  }
  if (needs_hx) result[1] = concatenate(d_hx);
  if (needs_cx) result[2] = concatenate(d_cx);
  for (Tensor& each : result) {
    if (each.defined()) each = each.to(layers[0].scalar_type());
  }
  return result;
}

namespace {

// The options that `network_bwd` is given, once everything is there as often as they say.
Options checked_options(const NetworkBackwardArguments& args) {
  Options net{};
  net.num_layers = args.num_layers;
  net.directions = args.bidirectional ? 2 : 1;
  net.has_biases = args.has_biases;
  net.batch_first = args.batch_first;
  net.cell = parse_cell(args.cell);
  net.k1 = args.k1;
  net.k2 = args.k2;
  net.last_only = args.last_only;
  const int64_t num_weights = int64_t(args.weights.size());
  check_options(net, args.weights);
  TORCH_CHECK(int64_t(args.kept.size()) == net.num_layers * kKeptByLayer, "kept must hold ",
              kKeptByLayer, " tensors for each of ", net.num_layers, " layers, got ",
              args.kept.size());
  check_masks(net, args.masks);
  TORCH_CHECK(int64_t(args.needs.size()) == kOthers + num_weights, "needs must hold ",
              kOthers + num_weights, " flags (input, hx, cx, each weight), got ",
              args.needs.size());
  check_states(net, "hx", args.hx);
  check_states(net, "cx", args.cx);
  check_states(net, "grad_h_n", args.grad_h_n);
  check_states(net, "grad_c_n", args.grad_c_n);
  return net;
}

TensorVector gradients(const NetworkBackwardArguments& args) {
  const Options net = checked_options(args);
  TensorVector grads;
  for (const OptionalTensor* each : {&args.grad_output, &args.grad_h_n, &args.grad_c_n}) {
    grads.push_back(each->value_or(Tensor()));
  }
  TensorVector result = network_gradients(
      net, {args.hx, args.cx, args.batch_sizes, args.resets, args.kappa}, std::move(grads),
      args.weights, args.kept, args.masks, {args.needs.begin(), args.needs.end()});
  for (Tensor& each : result) {
    if (!each.defined()) each = at::empty({0}, args.kept[0].options());
  }
  return result;
}

}  // namespace

void check_network_backward(const NetworkBackwardArguments& args) {
  const Options net = checked_options(args);
  const int64_t per_layer = int64_t(args.weights.size()) / net.num_layers;
  const std::vector<bool> all_needs(args.needs.begin(), args.needs.end());
  for (int64_t i = 0; i < net.num_layers; ++i) {
    const bool is_top = i == net.num_layers - 1;
    const Tensor* kept = args.kept.data() + i * kKeptByLayer;
    const OptionalTensor grad_output = is_top ? args.grad_output : std::nullopt;
    const OptionalTensor grad_h_n = of_layer(args.grad_h_n, net, i);
    const OptionalTensor grad_c_n = of_layer(args.grad_c_n, net, i);
    const OptionalTensor hx = of_layer(args.hx, net, i), cx = of_layer(args.cx, net, i), none;
    const OptionalTensor mask = i > 0 && !args.masks.empty() ? optional(args.masks[i - 1]) : none;
    const c10::List<bool> needs = needs_of_layer(all_needs, per_layer, i);
    check_backward<c10::SymInt>({{kept[0], hx, cx, of_layer(args.weights, net, i), net.has_biases,
                                  args.batch_sizes, net.batch_first, args.cell, args.resets},
                                 grad_output,
                                 grad_h_n,
                                 grad_c_n,
                                 kept[1],
                                 kept[2],
                                 kept[3],
                                 needs,
                                 net.k1,
                                 net.k2,
                                 net.last_only && is_top,
                                 args.kappa,
                                 mask,
                                 0,
                                 0,
                                 false,
                                 false,
                                 none},
                                HalfTypes::kBoth);
  }
}

int64_t workspace_limit() { return workspace_bytes; }
void set_workspace_limit(int64_t bytes) { workspace_bytes = bytes; }

TORCH_LIBRARY_IMPL(fastbptt, CompositeExplicitAutograd, m) {
  m.impl("network_bwd", network_bwd<gradients>);
}

}  // namespace fastbptt
