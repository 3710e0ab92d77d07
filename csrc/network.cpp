// A whole network, every layer and direction of one module call, as one autograd node.
//
// Truncation is defined on the network, not on a layer, so the node spans the stack. Where windows
// overlap, the backward pass takes them in groups: a group goes through all layers, from the top to
// the bottom, with the gradients between layers kept apart for each window. The node calls one
// operator per layer and pass, and keeps what the backward pass cannot do without: each layer's
// input and output, the mask of the dropout between layers, and of a gated cell its activations (for
// the Elman cell the derivative follows from the output alone). It is a torch::autograd::Function
// in C++ because the same node in Python costs a short sequence a third of its time.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>

#include "checks.h"
#include "lanes.h"
#include "network.h"
#include "workspace.h"

namespace fastbptt {
namespace {

std::atomic<int64_t> workspace_bytes{256 << 20};

using at::Tensor;
using at::TensorList;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;
using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;

// The operators of one layer, through the dispatcher: whatever device, tracer or fake tensor.
const auto& rnn_fwd() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastbptt::rnn_fwd", "")
          .typed<ForwardResult(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                               TensorList, bool, const OptionalTensor&, bool, c10::string_view,
                               bool, const OptionalTensor&)>();
  return op;
}

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

// What a call is besides its tensors.
struct Options {
  int64_t num_layers, directions;
  bool has_biases, batch_first;
  CellKind cell;
  double dropout;  // probability between layers; 0 outside training
  int64_t k1, k2;  // windows of the backward pass, as in Cuts
  bool last_only;
  bool recompute;
};

// What one layer read and computed, as the backward pass will need it.
struct Layer {
  Tensor input, output, c, gates;
  Tensor mask;  // the dropout that made `input` of the previous layer's output, or undefined

  static constexpr int64_t kTensors = 5;
};

struct Result {
  Tensor output, h_n, c_n;
  std::vector<Layer> layers;
};

const char* name_of(CellKind cell) { return kCellNames[size_t(cell)]; }

OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// The tensors of a call besides input and weights.
struct Context {
  OptionalTensor hx, cx, batch_sizes, resets, kappa;

  static constexpr int64_t kTensors = 5;
  void append_to(variable_list* list) const {
    for (const OptionalTensor* each : {&hx, &cx, &batch_sizes, &resets, &kappa}) {
      list->push_back(each->value_or(Tensor()));
    }
  }
  static Context from_list(TensorList list) {
    return {optional(list[0]), optional(list[1]), optional(list[2]), optional(list[3]),
            optional(list[4])};
  }
};

// The part of a [num_layers * directions, B, R] tensor that belongs to a layer.
OptionalTensor of_layer(const OptionalTensor& states, const Options& net, int64_t index) {
  if (!states.has_value() || net.num_layers == 1) return states;
  return states->narrow(0, index * net.directions, net.directions);
}

TensorList of_layer(TensorList weights, const Options& net, int64_t index) {
  const size_t per_layer = weights.size() / net.num_layers;
  return weights.slice(index * per_layer, per_layer);
}

Tensor concatenate(const std::vector<Tensor>& states) {
  return states.size() == 1 ? states[0] : at::cat(states);
}

// The draw that torch's own modules make, so that one seed gives one mask: with time first, whatever
// the input's layout.
Tensor dropout_mask(const Tensor& like, double probability, bool batch_first) {
  if (probability == 1) return at::zeros_like(like);
  const Tensor shape = batch_first ? like.transpose(0, 1) : like;
  const Tensor mask = at::empty_like(shape, at::MemoryFormat::Contiguous);
  mask.bernoulli_(1 - probability).div_(1 - probability);
  return batch_first ? mask.transpose(0, 1) : mask;
}

Result run_layers(const Options& net, const Tensor& input, const Context& context,
                  TensorList weights, bool keep_gates) {
  Result result;
  std::vector<Tensor> h_n, c_n;
  Tensor output = input;
  for (int64_t i = 0; i < net.num_layers; ++i) {
    Layer layer;
    layer.input = output;
    if (net.dropout > 0 && i > 0) {
      layer.mask = dropout_mask(output, net.dropout, net.batch_first);
      layer.input = output * layer.mask;
    }
    Tensor layer_h_n, layer_c_n;
    std::tie(output, layer_h_n, layer_c_n, layer.c, layer.gates) =
        rnn_fwd().call(layer.input, of_layer(context.hx, net, i), of_layer(context.cx, net, i),
                       of_layer(weights, net, i), net.has_biases, context.batch_sizes,
                       net.batch_first, name_of(net.cell), keep_gates, context.resets);
    layer.output = output;
    result.layers.push_back(std::move(layer));
    h_n.push_back(layer_h_n);
    c_n.push_back(layer_c_n);
  }
  result.output = output;
  result.h_n = concatenate(h_n);
  result.c_n = concatenate(c_n);
  return result;
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

class NetworkFunction : public torch::autograd::Function<NetworkFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& hx,
                               const OptionalTensor& cx, const OptionalTensor& batch_sizes,
                               const OptionalTensor& resets, const OptionalTensor& kappa,
                               TensorList weights, const Options& net, Tensor* no_c_n) {
    const Context context{hx, cx, batch_sizes, resets, kappa};
    const at::AutoDispatchBelowAutograd guard;
    Result result = run_layers(net, input, context, weights, !net.recompute);
    variable_list saved;
    saved.reserve(Context::kTensors + weights.size() + result.layers.size() * Layer::kTensors);
    context.append_to(&saved);
    saved.insert(saved.end(), weights.begin(), weights.end());
    for (const Layer& layer : result.layers) {
      saved.insert(saved.end(), {layer.input, layer.output, layer.c, layer.gates, layer.mask});
    }
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    ctx->saved_data["options"] = std::vector<int64_t>{
        net.num_layers, net.directions, net.has_biases, net.batch_first,        int64_t(net.cell),
        net.k1,         net.k2,         net.last_only,  int64_t(weights.size())};
    if (net.cell == CellKind::kLstm) return {result.output, result.h_n, result.c_n};
    *no_c_n = result.c_n;
    return {result.output, result.h_n};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    grads.resize(3);  // no other cell than LSTM has a c_n that the node returns
    const std::vector<int64_t> kept = ctx->saved_data["options"].toIntVector();
    Options net{};
    net.num_layers = kept[0];
    net.directions = kept[1];
    net.has_biases = kept[2];
    net.batch_first = kept[3];
    net.cell = CellKind(kept[4]);
    net.k1 = kept[5];
    net.k2 = kept[6];
    net.last_only = kept[7];
    const int64_t num_weights = kept[8];

    // One gradient for each tensor argument that is there, in their order.
    const variable_list saved = ctx->get_saved_variables();
    const Context context = Context::from_list(TensorList(saved).slice(0, Context::kTensors));
    const TensorList weights = TensorList(saved).slice(Context::kTensors, num_weights);
    const Tensor* layers = &saved[Context::kTensors + num_weights];
    int64_t next = 0;
    const auto is_needed = [&](bool is_there) { return is_there && ctx->needs_input_grad(next++); };
    const bool needs_input = is_needed(true), needs_hx = is_needed(context.hx.has_value()),
               needs_cx = is_needed(context.cx.has_value());
    for (const OptionalTensor* each : {&context.batch_sizes, &context.resets, &context.kappa}) {
      is_needed(each->has_value());
    }
    std::vector<bool> needs_weight(num_weights);
    for (int64_t i = 0; i < num_weights; ++i) needs_weight[i] = is_needed(true);

    const int64_t kOthers = 1 + Context::kTensors;  // input, and the context's
    variable_list result(kOthers + num_weights + 2);
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined()) return result;
    std::vector<Tensor> d_hx(net.num_layers), d_cx(net.num_layers);
    const int64_t per_layer = num_weights / net.num_layers, top = net.num_layers - 1;

    const bool packed = context.batch_sizes.has_value();
    const int64_t T = packed ? context.batch_sizes->size(0) : layers[0].size(net.batch_first);
    const int64_t B = layers[0].numel() / std::max<int64_t>(1, T * layers[0].size(-1));
    Cuts cuts;
    cuts.k1 = net.k1;
    cuts.k2 = net.k2;
    cuts.limit_to(T);
    // To differentiate once more would go unnoticed below the operators' autograd.
    std::optional<at::AutoDispatchBelowAutograd> guard;
    if (!at::GradMode::is_enabled()) guard.emplace();
    const std::vector<Cuts> groups = groups_of(net, cuts, T, B, layers[0].size(-1), weights[1]);
    const auto sum_options =
        layers[0].options().dtype(at::promote_types(layers[0].scalar_type(), at::kFloat));
    if (cuts.overlapping() && grads[0].defined()) grads[0] = grads[0].contiguous();
    if (needs_input && groups.size() > 1) {
      result[0] = at::zeros(layers[0].sizes(), sum_options);
    }
    for (const Cuts& group : groups) {
      Tensor grad = grads[0];
      for (int64_t i = top; i >= 0; --i) {
        const Tensor* layer = layers + i * Layer::kTensors;
        const Tensor &input = layer[0], &output = layer[1], &c = layer[2], &gates = layer[3],
                     &mask = layer[4];
        const auto first = needs_weight.begin() + i * per_layer;
        const bool needs_weights = std::find(first, first + per_layer, true) != first + per_layer;
        auto [d_input, layer_d_hx, layer_d_cx, d_weights] = rnn_bwd().call(
            optional(grad), of_layer(optional(grads[1]), net, i),
            of_layer(optional(grads[2]), net, i), input, output, c, gates,
            of_layer(context.hx, net, i), of_layer(context.cx, net, i), of_layer(weights, net, i),
            net.has_biases, context.batch_sizes, net.batch_first, name_of(net.cell),
            c10::List<bool>({needs_input || i > 0, needs_hx, needs_cx, needs_weights}), cuts.k1,
            cuts.k2, net.last_only && (i == top || cuts.overlapping()), context.resets,
            context.kappa, optional(mask), group.first_window, group.num_windows,
            cuts.overlapping() && i < top, cuts.overlapping() && i > 0,
            cuts.overlapping() && i < top ? optional(grads[0]) : std::nullopt);
        // Where a group has no loss its gradients are zeros: the last group's are enough.
        const bool has_no_lanes =
            cuts.overlapping() && i > 0 && d_input.sym_size(0).maybe_as_int() == 0;
        if (has_no_lanes && &group != &groups.back()) {
          grad = Tensor();
          break;
        }
        grad = d_input;
        if (needs_hx) add(&d_hx[i], layer_d_hx, groups.size());
        if (needs_cx) add(&d_cx[i], layer_d_cx, groups.size());
        for (int64_t j = 0; j < per_layer; ++j) {
          const int64_t index = i * per_layer + j;
          if (needs_weight[index]) add(&result[kOthers + index], d_weights[j], groups.size());
        }
      }
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
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> network(
    const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx, TensorList weights,
    bool has_biases, int64_t num_layers, bool bidirectional, const OptionalTensor& batch_sizes,
    bool batch_first, c10::string_view cell, double dropout, int64_t k1, int64_t k2, bool last_only,
    bool recompute, const OptionalTensor& resets, const OptionalTensor& kappa) {
  const Options net{num_layers,
                    bidirectional ? 2 : 1,
                    has_biases,
                    batch_first,
                    parse_cell(cell),
                    dropout,
                    k1,
                    k2,
                    last_only,
                    recompute};
  TORCH_CHECK(num_layers > 0, "num_layers must be positive, got ", num_layers);
  TORCH_CHECK(int64_t(weights.size()) % (num_layers * net.directions) == 0 && !weights.empty(),
              "weights must hold as many tensors for each of ", num_layers, " layers and ",
              net.directions, " directions, got ", weights.size());
  for (const auto& [name, states] : {std::pair{"hx", &hx}, std::pair{"cx", &cx}}) {
    TORCH_CHECK(!states->has_value() ||
                    ((*states)->dim() == 3 && (*states)->size(0) == num_layers * net.directions),
                name, " must have 3 dimensions, the first of size ", num_layers * net.directions,
                ", got shape ", (*states)->sizes());
  }
  const auto any = [&](const auto& is_so) {
    return is_so(input) || is_so(hx) || is_so(cx) ||
           std::any_of(weights.begin(), weights.end(), is_so);
  };
  if (at::GradMode::is_enabled() && any([](const OptionalTensor& tensor) {
        return tensor.has_value() && tensor->requires_grad();
      })) {
    Tensor no_c_n;
    const variable_list result =
        NetworkFunction::apply(input, hx, cx, batch_sizes, resets, kappa, weights, net, &no_c_n);
    return {result[0], result[1], result.size() > 2 ? result[2] : no_c_n};
  }
  // The layers' operators refuse what has a tangent, which would be lost below their autograd.
  std::optional<at::AutoDispatchBelowAutograd> guard;
  const bool forward_mode = any([](const OptionalTensor& tensor) {
    return tensor.has_value() && tensor->_fw_grad(/*level=*/0).defined();
  });
  if (!forward_mode) guard.emplace();
  const Result result =
      run_layers(net, input, {hx, cx, batch_sizes, resets, kappa}, weights, false);
  return {result.output, result.h_n, result.c_n};
}

int64_t workspace_limit() { return workspace_bytes; }
void set_workspace_limit(int64_t bytes) { workspace_bytes = bytes; }

TORCH_LIBRARY_FRAGMENT(fastbptt, m) {
  // num_layers layers of rnn_fwd, with dropout between them; states are stacked by layer, then by
  // direction. recompute: keep no gates for the backward pass. c_n is empty unless cell is "lstm".
  // The rest as for the layer's operators.
  m.def(
      "network(Tensor input, Tensor? hx, Tensor? cx, Tensor[] weights, bool has_biases, "
      "int num_layers, bool bidirectional, Tensor? batch_sizes, bool batch_first, str cell, "
      "float dropout, int k1=0, int k2=0, bool last_only=False, bool recompute=False, "
      "Tensor? resets=None, Tensor? kappa=None) -> (Tensor output, Tensor h_n, Tensor c_n)",
      network);
}

// The layers' operators have no derivative of their own: to differentiate the backward pass again,
// or to go round `network`, is an error rather than a silent zero.
TORCH_LIBRARY_IMPL(fastbptt, Autograd, m) {
  m.impl("rnn_fwd", torch::autograd::autogradNotImplementedFallback());
  m.impl("rnn_bwd", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fastbptt
