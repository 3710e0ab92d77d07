// A whole network, every layer and direction of one module call, as one autograd node.
//
// Truncation is defined on the network, not on a layer, so the node spans the stack. The forward pass
// is an operator per layer, the backward pass one operator (network_bwd.cpp); the CPU runs short stacks
// as a whole. The node keeps what the backward pass cannot do without: each layer's input and output,
// the mask of the dropout between layers, and of a gated cell its activations (for the Elman cell the
// derivative follows from the output alone). It is a torch::autograd::Function in C++ because the same node in Python costs a short
// sequence a third of its time.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <type_traits>

#include "network.h"
#include "network_parts.h"

namespace fastbptt {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The operators, through the dispatcher: whatever device, tracer or fake tensor.
const auto& rnn_fwd() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastbptt::rnn_fwd", "")
          .typed<ForwardResult(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                               TensorList, bool, const OptionalTensor&, bool, c10::string_view,
                               bool, const OptionalTensor&)>();
  return op;
}

const auto& network_bwd() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastbptt::network_bwd", "")
          .typed<std::vector<Tensor>(const OptionalTensor&, const OptionalTensor&,
                                     const OptionalTensor&, const OptionalTensor&,
                                     const OptionalTensor&, const OptionalTensor&,
                                     const OptionalTensor&, const OptionalTensor&, TensorList,
                                     TensorList, TensorList, bool, int64_t, bool, bool,
                                     c10::string_view, int64_t, int64_t, bool, c10::List<bool>)>();
  return op;
}

// What one layer read and computed, as the backward pass will need it.
struct Layer {
  Tensor input, output, c, gates;
  Tensor mask;  // the dropout that made `input` of the previous layer's output, or undefined
};

struct Result {
  Tensor output, h_n, c_n;
  std::vector<Layer> layers;
};

// The draw that torch's own modules make, so that one seed gives one mask: with time first, whatever
// the input's layout.
Tensor dropout_mask(const Tensor& like, double probability, bool batch_first) {
  if (probability == 1) return at::zeros_like(like);
  const Tensor shape = batch_first ? like.transpose(0, 1) : like;
  const Tensor mask = at::empty_like(shape, at::MemoryFormat::Contiguous);
  mask.bernoulli_(1 - probability).div_(1 - probability);
  return batch_first ? mask.transpose(0, 1) : mask;
}

// All layers by one call, where the CPU has one for them.
std::optional<Result> run_stack(const Options& net, const Tensor& input, const Context& context,
                                TensorList weights, bool keep_gates) {
  TensorVector others{input};
  context.append_to(&others);
  if (!go_to_cpu({others, weights})) return {};
  const std::vector<ForwardResults> layers =
      forward_stack_cpu(net, input, context, weights, keep_gates);
  if (layers.empty()) return {};
  Result result;
  std::vector<Tensor> h_n, c_n;
  for (const ForwardResults& each : layers) {
    const Tensor& below = result.layers.empty() ? input : result.layers.back().output;
    result.layers.push_back({below, each.output, each.c, each.gates, Tensor()});
    h_n.push_back(each.h_n);
    c_n.push_back(each.c_n);
  }
  result.output = layers.back().output;
  result.h_n = concatenate(h_n);
  result.c_n = concatenate(c_n);
  return result;
}

Result run_layers(const Options& net, const Tensor& input, const Context& context,
                  TensorList weights, bool keep_gates) {
  if (net.num_layers > 1) {
    std::optional<Result> together = run_stack(net, input, context, weights, keep_gates);
    if (together) return *together;
  }
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
    OptionalTensor hx = of_layer(context.hx, net, i);
    if (!hx && i > 0 && !h_n[0].sym_size(1).maybe_as_int()) {
      // A trace does not know how many sequences a packed input has: say that it is as many again.
      hx = at::zeros_symint(h_n[0].sym_sizes(), h_n[0].options());
    }
    Tensor layer_h_n, layer_c_n;
    std::tie(output, layer_h_n, layer_c_n, layer.c, layer.gates) = rnn_fwd().call(
        layer.input, hx, of_layer(context.cx, net, i), of_layer(weights, net, i), net.has_biases,
        context.batch_sizes, net.batch_first, name_of(net.cell), keep_gates, context.resets);
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

}  // namespace

// Not in the unnamed namespace: graphs show the name.
class NetworkBackward : public torch::autograd::Function<NetworkBackward> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& hx,
                               const OptionalTensor& cx, const OptionalTensor& batch_sizes,
                               const OptionalTensor& resets, const OptionalTensor& kappa,
                               TensorList weights, const Options& net, Tensor* no_c_n) {
    const Context context{hx, cx, batch_sizes, resets, kappa};
    const at::AutoDispatchBelowAutograd guard;
    Result result = run_layers(net, input, context, weights, !net.recompute);
    variable_list saved;
    saved.reserve(Context::kTensors + weights.size() + result.layers.size() * (kKeptByLayer + 1));
    context.append_to(&saved);
    saved.insert(saved.end(), weights.begin(), weights.end());
    for (const Layer& layer : result.layers) {
      saved.insert(saved.end(), {layer.input, layer.output, layer.c, layer.gates});
    }
    for (const Layer& layer : result.layers) {
      if (layer.mask.defined()) saved.push_back(layer.mask);
    }
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    ctx->saved_data["options"] = as_list(net);
    ctx->saved_data["num_weights"] = int64_t(weights.size());
    if (net.cell == CellKind::kLstm) return {result.output, result.h_n, result.c_n};
    *no_c_n = result.c_n;
    return {result.output, result.h_n};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    grads.resize(3);  // no other cell than LSTM has a c_n that the node returns
    const Options net = options_from(ctx->saved_data["options"].toIntVector());
    const int64_t num_weights = ctx->saved_data["num_weights"].toInt();

    const variable_list saved = ctx->get_saved_variables();
    const TensorList all(saved);
    const Context context = Context::from_list(all.slice(0, Context::kTensors));
    const TensorList weights = all.slice(Context::kTensors, num_weights);
    const TensorList kept =
        all.slice(Context::kTensors + num_weights, net.num_layers * kKeptByLayer);
    const TensorList masks = all.slice(Context::kTensors + num_weights + kept.size());

    // One for each tensor argument that is there, in their order.
    int64_t next = 0;
    const auto is_needed = [&](bool is_there) { return is_there && ctx->needs_input_grad(next++); };
    std::vector<bool> needs;
    needs.reserve(3 + num_weights);
    for (const bool is_there : {true, context.hx.has_value(), context.cx.has_value()}) {
      needs.push_back(is_needed(is_there));
    }
    for (const OptionalTensor* each : {&context.batch_sizes, &context.resets, &context.kappa}) {
      is_needed(each->has_value());
    }
    for (int64_t i = 0; i < num_weights; ++i) needs.push_back(is_needed(true));

    const int64_t kOthers = 1 + Context::kTensors;  // input, and the context's
    variable_list result(kOthers + num_weights + 2);
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined()) return result;
    const TensorVector gradients =
        gradients_of(net, context, std::move(grads), weights, kept, masks, needs);
    for (int64_t i = 0; i < 3; ++i) {
      if (needs[i]) result[i] = gradients[i];
    }
    for (int64_t i = 0; i < num_weights; ++i) {
      if (needs[3 + i]) result[kOthers + i] = gradients[3 + i];
    }
    return result;
  }

 private:
  // What is differentiated once more goes by a node, or by the operator, which has all derivatives.
  static TensorVector gradients_of(const Options& net, const Context& context, TensorVector grads,
                                   TensorList weights, TensorList kept, TensorList masks,
                                   const std::vector<bool>& needs) {
    std::optional<at::AutoDispatchBelowAutograd> guard;
    if (!at::GradMode::is_enabled() && !has_forward_gradient(grads)) {
      guard.emplace();
      if (is_device(first_key(kept[0].key_set()))) {
        return network_gradients(net, context, std::move(grads), weights, kept, masks, needs);
      }
    } else if (!has_forward_gradient(grads) && go_to_device({grads, kept, weights})) {
      return differentiable_gradients(net, context, grads, weights, kept, masks, needs);
    }
    return network_bwd().call(optional(grads[0]), optional(grads[1]), optional(grads[2]),
                              context.hx, context.cx, context.batch_sizes, context.resets,
                              context.kappa, weights, kept, masks, net.has_biases, net.num_layers,
                              net.directions == 2, net.batch_first, name_of(net.cell), net.k1,
                              net.k2, net.last_only, list_of(needs));
  }
};

namespace {

// A node as this version of torch counts references to it.
template <typename NodeType>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, NodeType>) {
    return c10::make_intrusive<NodeType>();
  } else {
    return std::shared_ptr<NodeType>(new NodeType(), [](NodeType* node) { deleteNode(node); });
  }
}

// A node for each final state in front of the network's: where nothing uses a state, as is common, its
// node never runs, and its hooks are not called with nothing. The output goes without: a node costs
// every backward pass through it about 3 us.
struct StateBackward : public torch::autograd::Node {
  static void put_before(const Tensor& result) {
    auto node = make_node<StateBackward>();
    node->set_next_edges({torch::autograd::impl::gradient_edge(result)});
    node->add_input_metadata(result);
    torch::autograd::impl::set_gradient_edge(result, {std::move(node), 0});
  }
  variable_list apply(variable_list&& grads) override { return std::move(grads); }
  std::string name() const override { return "FastbpttStateBackward"; }
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override {}
  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables&) override {
    return grads;
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
  check_options(net, weights);
  check_states(net, "hx", hx);
  check_states(net, "cx", cx);
  // The layers' forward pass has no use for this one, and does not look at it.
  check_input_dims(input, batch_sizes);
  check_rows<c10::SymInt>(kappa, "kappa", input.scalar_type(), input);
  const auto any = [&](const auto& is_so) {
    return is_so(input) || is_so(hx) || is_so(cx) ||
           std::any_of(weights.begin(), weights.end(), is_so);
  };
  if (at::GradMode::is_enabled() && any([](const OptionalTensor& tensor) {
        return tensor.has_value() && tensor->requires_grad();
      })) {
    Tensor no_c_n;
    const variable_list result =
        NetworkBackward::apply(input, hx, cx, batch_sizes, resets, kappa, weights, net, &no_c_n);
    for (size_t i = 1; i < result.size(); ++i) StateBackward::put_before(result[i]);
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

namespace {

// Below autograd: what of it has a derivative is for the caller to say.
std::tuple<Tensor, Tensor, Tensor, TensorVector, TensorVector, TensorVector, TensorVector>
network_fwd(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
            TensorList weights, bool has_biases, int64_t num_layers, bool bidirectional,
            const OptionalTensor& batch_sizes, bool batch_first, c10::string_view cell,
            double dropout, const OptionalTensor& resets) {
  Options net{};
  net.num_layers = num_layers;
  net.directions = bidirectional ? 2 : 1;
  net.has_biases = has_biases;
  net.batch_first = batch_first;
  net.cell = parse_cell(cell);
  net.dropout = dropout;
  check_options(net, weights);
  check_states(net, "hx", hx);
  check_states(net, "cx", cx);
  check_input_dims(input, batch_sizes);
  const at::AutoDispatchBelowAutograd guard;
  Result result = run_layers(net, input, {hx, cx, batch_sizes, resets, {}}, weights, true);
  TensorVector outputs, c, gates, masks;
  for (Layer& layer : result.layers) {
    outputs.push_back(std::move(layer.output));
    c.push_back(std::move(layer.c));
    gates.push_back(std::move(layer.gates));
    if (layer.mask.defined()) masks.push_back(std::move(layer.mask));
  }
  outputs.pop_back();  // it is the network's
  return {result.output, result.h_n, result.c_n, outputs, c, gates, masks};
}

}  // namespace

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
  // The forward pass of `network` and what the backward pass takes of it: the outputs of the layers
  // below the top, c and gates of each, the masks of the dropout before each but the first, or none.
  m.def(
      "network_fwd(Tensor input, Tensor? hx, Tensor? cx, Tensor[] weights, bool has_biases, "
      "int num_layers, bool bidirectional, Tensor? batch_sizes, bool batch_first, str cell, "
      "float dropout, Tensor? resets=None) -> (Tensor output, Tensor h_n, Tensor c_n, "
      "Tensor[] outputs, Tensor[] c, Tensor[] gates, Tensor[] masks)",
      network_fwd);
  // The backward pass of `network`. kept: input, output, c and gates of each layer. masks: of the
  // dropout before each layer but the first, or none. needs: input, hx, cx, then each weight; the
  // results are gradients in that order, empty where not needed.
  m.def(
      "network_bwd(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? hx, "
      "Tensor? cx, Tensor? batch_sizes, Tensor? resets, Tensor? kappa, Tensor[] weights, "
      "Tensor[] kept, Tensor[] masks, bool has_biases, int num_layers, bool bidirectional, "
      "bool batch_first, str cell, int k1, int k2, bool last_only, bool[] needs) -> Tensor[]");
}

// The layers' operators have no derivative of their own: to go round `network` is an error rather than
// a silent zero. That of `network_bwd` is in Python.
TORCH_LIBRARY_IMPL(fastbptt, Autograd, m) {
  m.impl("rnn_fwd", torch::autograd::autogradNotImplementedFallback());
  m.impl("rnn_bwd", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fastbptt
