// Second derivatives of a network. With G its backward pass, the gradients of <u, G> are the tangents,
// along u, of the network's results and of G: network_second gives both, layer by layer. The node of a
// backward pass that is differentiated once more calls it; what it does not know (windows that overlap or
// have one loss, 16 bits, transforms, third derivatives) goes to the operator network_bwd_bwd, which is
// in Python.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "network_parts.h"

namespace fastbptt {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensors = c10::List<OptionalTensor>;

const auto& rnn_jvp() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastbptt::rnn_jvp", "")
          .typed<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
              const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
              const OptionalTensor&, TensorList, const OptionalTensor&, const OptionalTensor&,
              const OptionalTensor&, const OptionalTensors&, bool, const OptionalTensor&, bool,
              c10::string_view, int64_t, const OptionalTensor&, const OptionalTensor&)>();
  return op;
}

const auto& rnn_bwd_jvp() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastbptt::rnn_bwd_jvp", "")
          .typed<std::tuple<Tensor, Tensor, Tensor, Tensor, TensorVector>(
              const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
              const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
              const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
              const OptionalTensor&, TensorList, const OptionalTensor&, const Tensor&,
              const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
              const OptionalTensors&, bool, const OptionalTensor&, bool, c10::string_view,
              c10::List<bool>, int64_t, const OptionalTensor&, const OptionalTensor&)>();
  return op;
}

const auto& network_bwd_bwd() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastbptt::network_bwd_bwd", "")
          .typed<TensorVector(const OptionalTensors&, const OptionalTensors&, const OptionalTensor&,
                              const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                              const OptionalTensor&, TensorList, TensorList, TensorList, bool,
                              int64_t, bool, bool, c10::string_view, int64_t, int64_t, bool,
                              c10::List<bool>, c10::List<bool>)>();
  return op;
}

OptionalTensors optional_list(TensorList tensors) {
  OptionalTensors list;
  for (const Tensor& tensor : tensors) list.push_back(optional(tensor));
  return list;
}
TensorVector vector_of(const OptionalTensors& tensors) {
  TensorVector result;
  for (const OptionalTensor& tensor : tensors) result.push_back(tensor.value_or(Tensor()));
  return result;
}

constexpr int64_t kResults = 3, kStates = 3;  // output, h_n, c_n; primals before the weights

// What comes up to layer i, or goes down from it, behind the dropout before it.
Tensor masked(const Tensor& tensor, TensorList masks, int64_t i) {
  return tensor.defined() && i > 0 && !masks.empty() ? tensor * masks[i - 1] : tensor;
}

// The tangents of output, h_n and c_n along those of input, hx, cx and the weights, then, where `needs` asks
// for them, those of the gradients of input, hx, cx and the weights, given grads of the results and their
// tangents. Windows lie side by side. Undefined: none, or zeros.
TensorVector second(const Options& net, const Context& context, TensorList grads,
                    TensorList grads_t, TensorList tangents, TensorList weights, TensorList kept,
                    TensorList masks, const std::vector<bool>& needs) {
  const int64_t L = net.num_layers;
  const TensorList weights_t = tangents.slice(kStates);
  const OptionalTensor hx_t = optional(tangents[1]), cx_t = optional(tangents[2]);
  struct LayerTangents {
    Tensor input, output, c, gates;
  };
  std::vector<LayerTangents> layers_t;
  TensorVector h_n, c_n;
  Tensor x = tangents[0];
  for (int64_t i = 0; i < L; ++i) {
    const Tensor* const layer = &kept[i * kKeptByLayer];
    const Tensor below = masked(x, masks, i);
    auto [output, layer_h_n, layer_c_n, c, gates] = rnn_jvp().call(
        layer[0], layer[1], layer[2], layer[3], of_layer(context.hx, net, i),
        of_layer(context.cx, net, i), of_layer(weights, net, i), optional(below),
        of_layer(hx_t, net, i), of_layer(cx_t, net, i), optional_list(of_layer(weights_t, net, i)),
        net.has_biases, context.batch_sizes, net.batch_first, name_of(net.cell), net.k1,
        context.resets, context.kappa);
    x = output;
    layers_t.push_back({below, output, c, gates});
    h_n.push_back(layer_h_n);
    c_n.push_back(layer_c_n);
  }
  TensorVector result{x, concatenate(h_n), concatenate(c_n)};
  result.resize(kResults + kStates + weights.size());
  const auto any_of = [](auto begin, auto end) { return std::find(begin, end, true) != end; };
  if (!any_of(needs.begin(), needs.end())) return result;

  const int64_t per_layer = int64_t(weights.size()) / L;
  TensorVector d_hx(L), d_cx(L);
  Tensor d = grads[0], d_t = grads_t[0];
  for (int64_t i = L - 1; i >= 0; --i) {
    const Tensor* const layer = &kept[i * kKeptByLayer];
    const LayerTangents& t = layers_t[i];
    const auto first = needs.begin() + kStates + i * per_layer;
    auto [d_input, d_input_t, d_hx_t, d_cx_t, d_weights_t] = rnn_bwd_jvp().call(
        optional(d), of_layer(optional(grads[1]), net, i), of_layer(optional(grads[2]), net, i),
        optional(d_t), of_layer(optional(grads_t[1]), net, i),
        of_layer(optional(grads_t[2]), net, i), layer[0], layer[1], layer[2], layer[3],
        of_layer(context.hx, net, i), of_layer(context.cx, net, i), of_layer(weights, net, i),
        optional(t.input), t.output, t.c, t.gates, of_layer(hx_t, net, i), of_layer(cx_t, net, i),
        optional_list(of_layer(weights_t, net, i)), net.has_biases, context.batch_sizes,
        net.batch_first, name_of(net.cell),
        list_of({i > 0, i > 0 || needs[0], needs[1], needs[2], any_of(first, first + per_layer)}),
        net.k1, context.resets, context.kappa);
    d = masked(d_input, masks, i);
    d_t = masked(d_input_t, masks, i);
    d_hx[i] = d_hx_t;
    d_cx[i] = d_cx_t;
    for (int64_t j = 0; j < per_layer; ++j) {
      const int64_t index = i * per_layer + j;
      if (needs[kStates + index]) result[kResults + kStates + index] = d_weights_t[j];
    }
  }
  if (needs[0]) result[kResults] = d_t;
  if (needs[1]) result[kResults + 1] = concatenate(d_hx);
  if (needs[2]) result[kResults + 2] = concatenate(d_cx);
  return result;
}

// The operator.
TensorVector network_second(const OptionalTensors& grads, const OptionalTensors& grads_t,
                            const OptionalTensors& tangents, const OptionalTensor& hx,
                            const OptionalTensor& cx, const OptionalTensor& batch_sizes,
                            const OptionalTensor& resets, const OptionalTensor& kappa,
                            TensorList weights, TensorList kept, TensorList masks, bool has_biases,
                            int64_t num_layers, bool bidirectional, bool batch_first,
                            c10::string_view cell, int64_t k1, c10::List<bool> needs) {
  Options net{};
  net.num_layers = num_layers;
  net.directions = bidirectional ? 2 : 1;
  net.has_biases = has_biases;
  net.batch_first = batch_first;
  net.cell = parse_cell(cell);
  net.k1 = net.k2 = k1;
  check_options(net, weights);
  const size_t primals = kStates + weights.size();
  TORCH_CHECK(grads.size() == kResults && grads_t.size() == kResults,
              "grads and grads_t must hold one for each of output, h_n and c_n, got ", grads.size(),
              " and ", grads_t.size());
  TORCH_CHECK(tangents.size() == primals && needs.size() == primals,
              "tangents and needs must hold one for each of input, hx, cx and ", weights.size(),
              " weights, got ", tangents.size(), " and ", needs.size());
  TORCH_CHECK(int64_t(kept.size()) == num_layers * kKeptByLayer, "kept must hold ", kKeptByLayer,
              " tensors for each of ", num_layers, " layers, got ", kept.size());
  check_masks(net, masks);
  TensorVector result =
      second(net, {hx, cx, batch_sizes, resets, kappa}, vector_of(grads), vector_of(grads_t),
             vector_of(tangents), weights, kept, masks, {needs.begin(), needs.end()});
  for (Tensor& each : result) {
    if (!each.defined()) each = at::empty({0}, kept[0].options());
  }
  return result;
}

}  // namespace

// Not in the unnamed namespace: graphs show the name.
class NetworkGradients : public torch::autograd::Function<NetworkGradients> {
 public:
  static variable_list forward(AutogradContext* ctx, const OptionalTensor& grad_output,
                               const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
                               const Tensor& input, const OptionalTensor& /*hx*/,
                               const OptionalTensor& /*cx*/, TensorList weights, const Options& net,
                               const Context& context, const TensorVector& kept,
                               const TensorVector& masks, const std::vector<bool>& needs) {
    const at::AutoDispatchBelowAutograd guard;
    TensorVector grads;
    for (const OptionalTensor* each : {&grad_output, &grad_h_n, &grad_c_n}) {
      grads.push_back(each->value_or(Tensor()));
    }
    const TensorVector all = network_gradients(net, context, grads, weights, kept, masks, needs);
    variable_list saved = std::move(grads);
    context.append_to(&saved);
    saved.push_back(input);
    for (const TensorList& list : {weights, TensorList(kept), TensorList(masks)}) {
      saved.insert(saved.end(), list.begin(), list.end());
    }
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    ctx->saved_data["options"] = as_list(net);
    ctx->saved_data["num_weights"] = int64_t(weights.size());
    ctx->saved_data["needs"] = list_of(needs);
    variable_list results;
    for (size_t i = 0; i < needs.size(); ++i) {
      if (needs[i]) results.push_back(all[i]);
    }
    return results;
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    const Options net = options_from(ctx->saved_data["options"].toIntVector());
    const int64_t num_weights = ctx->saved_data["num_weights"].toInt();
    const c10::List<bool> list = ctx->saved_data["needs"].toBoolList();
    const std::vector<bool> given(list.begin(), list.end());
    const variable_list saved = ctx->get_saved_variables();
    const TensorList all(saved), grads = all.slice(0, kResults);
    const Context context = Context::from_list(all.slice(kResults, Context::kTensors));
    const int64_t input = kResults + Context::kTensors, first_weight = input + 1;
    const int64_t first_kept = first_weight + num_weights;
    const TensorList weights = all.slice(first_weight, num_weights),
                     masks = all.slice(first_kept + net.num_layers * kKeptByLayer);
    TensorVector kept = all.slice(first_kept, net.num_layers * kKeptByLayer).vec();
    kept[0] = all[input];

    TensorVector tangents(given.size());
    size_t next_result = 0;
    for (size_t i = 0; i < given.size(); ++i) {
      if (given[i]) tangents[i] = cotangents[next_result++];
    }
    int64_t next = 0;
    const auto is_needed = [&](bool is_there) { return is_there && ctx->needs_input_grad(next++); };
    std::vector<bool> of_grads, needs;
    for (const Tensor& grad : grads) of_grads.push_back(is_needed(grad.defined()));
    for (const bool is_there : {true, context.hx.has_value(), context.cx.has_value()}) {
      needs.push_back(is_needed(is_there));
    }
    for (int64_t i = 0; i < num_weights; ++i) needs.push_back(is_needed(true));

    const int64_t kOthers = 5;  // arguments of `forward` that are no primals
    variable_list result(kResults + needs.size() + kOthers);
    const auto is_there = [](const Tensor& tensor) { return tensor.defined(); };
    if (std::none_of(tangents.begin(), tangents.end(), is_there)) return result;
    TensorVector both;
    if (is_simple(net, kept, tangents)) {
      const at::AutoDispatchBelowAutograd guard;
      const TensorVector none(kResults);
      both = second(net, context, grads, none, tangents, weights, kept, masks, needs);
    } else {
      both = network_bwd_bwd().call(optional_list(tangents), optional_list(grads), context.hx,
                                    context.cx, context.batch_sizes, context.resets, context.kappa,
                                    weights, kept, masks, net.has_biases, net.num_layers,
                                    net.directions == 2, net.batch_first, name_of(net.cell), net.k1,
                                    net.k2, net.last_only, list_of(given), list_of(needs));
    }
    of_grads.insert(of_grads.end(), needs.begin(), needs.end());
    for (size_t i = 0; i < of_grads.size(); ++i) {
      const bool is_none = !both[i].defined() || (both[i].dim() == 1 && both[i].size(0) == 0);
      if (of_grads[i] && !is_none) result[i] = both[i];
    }
    return result;
  }

 private:
  // Whether `second` has all that this takes.
  static bool is_simple(const Options& net, TensorList kept, TensorList tangents) {
    if (at::GradMode::is_enabled() || has_forward_gradient(tangents)) return false;
    if (net.k2 > net.k1 || net.last_only) return false;
    const at::ScalarType dtype = kept[0].scalar_type();
    const bool needs_gates = net.cell == CellKind::kGru || net.cell == CellKind::kLstm;
    if (dtype != at::kFloat && dtype != at::kDouble) return false;
    if (needs_gates && kept[kKeptByLayer - 1].size(0) == 0) return false;
    return go_to_device({kept, tangents});
  }
};

TensorVector differentiable_gradients(const Options& net, const Context& context,
                                      const TensorVector& grads, TensorList weights,
                                      TensorList kept, TensorList masks,
                                      const std::vector<bool>& needs) {
  TensorVector constants;
  for (const Tensor& tensor : kept) constants.push_back(tensor.detach());
  const TensorVector results = NetworkGradients::apply(
      optional(grads[0]), optional(grads[1]), optional(grads[2]), kept[0], context.hx, context.cx,
      weights, net, context, constants, masks.vec(), needs);
  TensorVector all(needs.size());
  size_t next = 0;
  for (size_t i = 0; i < needs.size(); ++i) {
    if (needs[i]) all[i] = results[next++];
  }
  return all;
}

TORCH_LIBRARY_FRAGMENT(fastbptt, m) {
  // The tangents of a network's results along those of input, hx, cx and the weights, then those of the
  // gradients of the same, where needs asks for them, empty else: given the gradients of the results
  // and their tangents. None: zeros. Windows lie side by side.
  m.def(
      "network_second(Tensor?[] grads, Tensor?[] grads_t, Tensor?[] tangents, Tensor? hx, "
      "Tensor? cx, Tensor? batch_sizes, Tensor? resets, Tensor? kappa, Tensor[] weights, "
      "Tensor[] kept, Tensor[] masks, bool has_biases, int num_layers, bool bidirectional, "
      "bool batch_first, str cell, int k1, bool[] needs) -> Tensor[]",
      network_second);
  // The gradients of network_bwd's grads, and of input, hx, cx and each weight, along cotangents of
  // its results: empty where there are none. given: whose gradients network_bwd gave; needs: whose
  // are wanted. The rest as for network_bwd. Its kernel is in Python.
  m.def(
      "network_bwd_bwd(Tensor?[] cotangents, Tensor?[] grads, Tensor? hx, Tensor? cx, "
      "Tensor? batch_sizes, Tensor? resets, Tensor? kappa, Tensor[] weights, Tensor[] kept, "
      "Tensor[] masks, bool has_biases, int num_layers, bool bidirectional, bool batch_first, "
      "str cell, int k1, int k2, bool last_only, bool[] given, bool[] needs) -> Tensor[]");
}

}  // namespace fastbptt
