// A whole network, every layer and direction of one module call, as one autograd node.
//
// Truncation is defined on the network, not on a layer, so the node spans the stack. It calls one
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

namespace fastbptt {
namespace {

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
                               bool)>();
  return op;
}

const auto& rnn_bwd() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastbptt::rnn_bwd", "")
          .typed<BackwardResult(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                const OptionalTensor&, const OptionalTensor&, TensorList, bool,
                                const OptionalTensor&, bool, c10::string_view, int64_t,
                                c10::List<bool>)>();
  return op;
}

// What a call is besides its tensors.
struct Options {
  int64_t num_layers, directions;
  bool has_biases, batch_first;
  std::string cell;
  double dropout;  // probability between layers; 0 outside training
  int64_t chunk;
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

OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

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

// The draw that torch's own modules make, so that one seed gives one mask.
Tensor dropout_mask(const Tensor& like, double probability) {
  if (probability == 1) return at::zeros_like(like);
  return at::empty_like(like).bernoulli_(1 - probability).div_(1 - probability);
}

Result run_layers(const Options& net, const Tensor& input, const OptionalTensor& hx,
                  const OptionalTensor& cx, const OptionalTensor& batch_sizes, TensorList weights,
                  bool keep_gates) {
  Result result;
  std::vector<Tensor> h_n, c_n;
  Tensor output = input;
  for (int64_t i = 0; i < net.num_layers; ++i) {
    Layer layer;
    layer.input = output;
    if (net.dropout > 0 && i > 0) {
      layer.mask = dropout_mask(output, net.dropout);
      layer.input = output * layer.mask;
    }
    Tensor layer_h_n, layer_c_n;
    std::tie(output, layer_h_n, layer_c_n, layer.c, layer.gates) = rnn_fwd().call(
        layer.input, of_layer(hx, net, i), of_layer(cx, net, i), of_layer(weights, net, i),
        net.has_biases, batch_sizes, net.batch_first, net.cell, keep_gates);
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

class NetworkFunction : public torch::autograd::Function<NetworkFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& hx,
                               const OptionalTensor& cx, const OptionalTensor& batch_sizes,
                               TensorList weights, const Options& net) {
    Result result = run_layers(net, input, hx, cx, batch_sizes, weights, !net.recompute);
    variable_list saved{hx.value_or(Tensor()), cx.value_or(Tensor()),
                        batch_sizes.value_or(Tensor())};
    saved.insert(saved.end(), weights.begin(), weights.end());
    for (const Layer& layer : result.layers) {
      saved.insert(saved.end(), {layer.input, layer.output, layer.c, layer.gates, layer.mask});
    }
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    ctx->saved_data["cell"] = net.cell;
    ctx->saved_data["options"] =
        std::vector<int64_t>{net.num_layers,  net.directions, net.has_biases,
                             net.batch_first, net.chunk,      int64_t(weights.size())};
    return {result.output, result.h_n, result.c_n};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const std::vector<int64_t> kept = ctx->saved_data["options"].toIntVector();
    Options net{};
    net.num_layers = kept[0];
    net.directions = kept[1];
    net.has_biases = kept[2];
    net.batch_first = kept[3];
    net.chunk = kept[4];
    net.cell = ctx->saved_data["cell"].toStringRef();
    const int64_t num_weights = kept[5];

    // One gradient for each tensor argument that is there, in their order.
    variable_list saved = ctx->get_saved_variables();
    const OptionalTensor hx = optional(saved[0]), cx = optional(saved[1]),
                         batch_sizes = optional(saved[2]);
    const TensorList weights = TensorList(saved).slice(3, num_weights);
    int64_t next = 0;
    const auto is_needed = [&](bool is_there) { return is_there && ctx->needs_input_grad(next++); };
    const bool needs_input = is_needed(true), needs_hx = is_needed(hx.has_value()),
               needs_cx = is_needed(cx.has_value());
    is_needed(batch_sizes.has_value());
    std::vector<bool> needs_weight(num_weights);
    for (int64_t i = 0; i < num_weights; ++i) needs_weight[i] = is_needed(true);

    const int64_t kOthers = 4;  // input, hx, cx, batch_sizes
    variable_list result(kOthers + num_weights + 1);
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined()) return result;
    std::vector<Tensor> d_hx(net.num_layers), d_cx(net.num_layers);
    const int64_t per_layer = num_weights / net.num_layers;
    Tensor grad = grads[0];
    for (int64_t i = net.num_layers - 1; i >= 0; --i) {
      const Tensor* layer = &saved[3 + num_weights + i * Layer::kTensors];
      const Tensor &input = layer[0], &output = layer[1], &c = layer[2], &gates = layer[3],
                   &mask = layer[4];
      const auto first = needs_weight.begin() + i * per_layer;
      const bool needs_weights = std::find(first, first + per_layer, true) != first + per_layer;
      Tensor d_input;
      std::vector<Tensor> d_weights;
      std::tie(d_input, d_hx[i], d_cx[i], d_weights) = rnn_bwd().call(
          optional(grad), of_layer(optional(grads[1]), net, i),
          of_layer(optional(grads[2]), net, i), input, output, c, gates, of_layer(hx, net, i),
          of_layer(cx, net, i), of_layer(weights, net, i), net.has_biases, batch_sizes,
          net.batch_first, net.cell, net.chunk,
          c10::List<bool>({needs_input || i > 0, needs_hx, needs_cx, needs_weights}));
      grad = mask.defined() ? d_input * mask : d_input;
      for (int64_t j = 0; j < per_layer; ++j) {
        const int64_t index = i * per_layer + j;
        if (needs_weight[index]) result[kOthers + index] = d_weights[j];
      }
    }
    if (needs_input) result[0] = grad;
    if (needs_hx) result[1] = concatenate(d_hx);
    if (needs_cx) result[2] = concatenate(d_cx);
    return result;
  }
};

std::tuple<Tensor, Tensor, Tensor> network(const Tensor& input, const OptionalTensor& hx,
                                           const OptionalTensor& cx, TensorList weights,
                                           bool has_biases, int64_t num_layers, bool bidirectional,
                                           const OptionalTensor& batch_sizes, bool batch_first,
                                           c10::string_view cell, double dropout, int64_t chunk,
                                           bool recompute) {
  const Options net{
      num_layers, bidirectional ? 2 : 1, has_biases, batch_first, std::string(cell), dropout, chunk,
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
  const auto wants_grad = [](const OptionalTensor& tensor) {
    return tensor.has_value() && tensor->requires_grad();
  };
  if (at::GradMode::is_enabled() && (wants_grad(input) || wants_grad(hx) || wants_grad(cx) ||
                                     std::any_of(weights.begin(), weights.end(), wants_grad))) {
    const variable_list result = NetworkFunction::apply(input, hx, cx, batch_sizes, weights, net);
    return {result[0], result[1], result[2]};
  }
  const Result result = run_layers(net, input, hx, cx, batch_sizes, weights, false);
  return {result.output, result.h_n, result.c_n};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastbptt, m) {
  // num_layers layers of rnn_fwd, with dropout between them; states are stacked by layer, then by
  // direction. recompute: keep no gates for the backward pass. c_n is empty unless cell is "lstm".
  m.def(
      "network(Tensor input, Tensor? hx, Tensor? cx, Tensor[] weights, bool has_biases, "
      "int num_layers, bool bidirectional, Tensor? batch_sizes, bool batch_first, str cell, "
      "float dropout, int chunk, bool recompute) -> (Tensor output, Tensor h_n, Tensor c_n)",
      network);
}

// The layers' operators have no derivative of their own: to differentiate the backward pass again,
// or to go round `network`, is an error rather than a silent zero.
TORCH_LIBRARY_IMPL(fastbptt, Autograd, m) {
  m.impl("rnn_fwd", torch::autograd::autogradNotImplementedFallback());
  m.impl("rnn_bwd", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fastbptt
