// What the two passes of a network share: its options, the tensors of a call, and their checks.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "arguments.h"
#include "checks.h"

namespace fastbptt {

using at::TensorList;
using TensorVector = std::vector<Tensor>;

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

// The tensors that a layer keeps for the backward pass: its input, output, c and gates.
constexpr int64_t kKeptByLayer = 4;

inline const char* name_of(CellKind cell) { return kCellNames[size_t(cell)]; }

inline OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// The tensors of a call besides input and weights.
struct Context {
  OptionalTensor hx, cx, batch_sizes, resets, kappa;

  static constexpr int64_t kTensors = 5;
  void append_to(TensorVector* list) const {
    for (const OptionalTensor* each : {&hx, &cx, &batch_sizes, &resets, &kappa}) {
      list->push_back(each->value_or(Tensor()));
    }
  }
  static Context from_list(TensorList list) {
    return {optional(list[0]), optional(list[1]), optional(list[2]), optional(list[3]),
            optional(list[4])};
  }
};

// What a node keeps of the options for its backward pass, as saved data can hold it.
inline std::vector<int64_t> as_list(const Options& net) {
  return {net.num_layers,    net.directions, net.has_biases, net.batch_first,
          int64_t(net.cell), net.k1,         net.k2,         net.last_only};
}
inline Options options_from(const std::vector<int64_t>& list) {
  Options net{};
  net.num_layers = list[0];
  net.directions = list[1];
  net.has_biases = list[2];
  net.batch_first = list[3];
  net.cell = CellKind(list[4]);
  net.k1 = list[5];
  net.k2 = list[6];
  net.last_only = list[7];
  return net;
}

inline c10::List<bool> list_of(const std::vector<bool>& flags) {
  c10::List<bool> list;
  list.reserve(flags.size());
  for (const bool flag : flags) list.push_back(flag);
  return list;
}

// The part of a [num_layers * directions, B, R] tensor that belongs to a layer.
inline OptionalTensor of_layer(const OptionalTensor& states, const Options& net, int64_t index) {
  if (!states.has_value() || net.num_layers == 1) return states;
  return states->narrow(0, index * net.directions, net.directions);
}

inline TensorList of_layer(TensorList weights, const Options& net, int64_t index) {
  const size_t per_layer = weights.size() / net.num_layers;
  return weights.slice(index * per_layer, per_layer);
}

inline Tensor concatenate(const std::vector<Tensor>& states) {
  return states.size() == 1 ? states[0] : at::cat(states);
}

// What the layers' own checks do not see.
inline void check_options(const Options& net, TensorList weights) {
  const int64_t count = int64_t(weights.size());
  TORCH_CHECK(net.num_layers > 0, "num_layers must be positive, got ", net.num_layers);
  TORCH_CHECK(net.num_layers <= count && count % (net.num_layers * net.directions) == 0,
              "weights must hold as many tensors for each of ", net.num_layers, " layers and ",
              net.directions, " directions, got ", count);
  TORCH_CHECK(net.dropout >= 0 && net.dropout <= 1, "dropout must be a probability, got ",
              net.dropout);
  LayerShape layer{};
  layer.cell = net.cell;
  layer.has_biases = net.has_biases;
  check_weight_count(of_layer(weights, net, 0), &layer);
  TORCH_CHECK(layer.D == net.directions, "weights must hold tensors for ", net.directions,
              " directions of each layer, got those for ", layer.D);
  check_windows(net.directions, net.k1, net.k2, net.last_only);
}

inline void check_masks(const Options& net, TensorList masks) {
  TORCH_CHECK(masks.empty() || int64_t(masks.size()) == net.num_layers - 1,
              "masks must be empty or hold one for each layer but the first, got ", masks.size());
}

inline void check_states(const Options& net, const char* name, const OptionalTensor& states) {
  if (!states.has_value()) return;
  check_strided(*states, name);
  const int64_t count = net.num_layers * net.directions;
  TORCH_CHECK(states->dim() == 3 && are_equal(states->sym_size(0), c10::SymInt(count)), name,
              " must have 3 dimensions, the first of size ", count, ", got shape ",
              states->sym_sizes());
}

// The backward pass: gradients of input, hx, cx and each weight, undefined where they are not needed.
// grads: of output, h_n and c_n. kept: kKeptByLayer tensors of each layer. masks: of the dropout before
// each layer but the first, or none. needs: as the results.
TensorVector network_gradients(const Options& net, const Context& context, TensorVector grads,
                               TensorList weights, TensorList kept, TensorList masks,
                               const std::vector<bool>& needs);

// The same where they are to be differentiated again: by a node of their own, of which `kept` are
// constants.
TensorVector differentiable_gradients(const Options& net, const Context& context,
                                      const TensorVector& grads, TensorList weights,
                                      TensorList kept, TensorList masks,
                                      const std::vector<bool>& needs);

// The first place where the dispatcher would hand tensors with such keys, other than views' and
// factories': their device, unless somebody traces, transforms or watches operators. To ask costs less
// than to go through it.
inline c10::DispatchKey first_key(c10::DispatchKeySet keys) {
  using c10::DispatchKey;
  const c10::DispatchKeySet passed({DispatchKey::ADInplaceOrView, DispatchKey::BackendSelect});
  const c10::DispatchKeySet all(c10::DispatchKeySet::FULL);
  return (c10::impl::computeDispatchKeySet(keys, all) - passed).highestPriorityTypeId();
}

inline c10::DispatchKey first_key(std::initializer_list<TensorList> lists) {
  c10::DispatchKeySet keys;
  for (const TensorList& list : lists) {
    for (const Tensor& tensor : list) {
      if (tensor.defined()) keys = keys | tensor.key_set();
    }
  }
  return first_key(keys);
}

inline bool go_to_cpu(std::initializer_list<TensorList> lists) {
  return first_key(lists) == c10::DispatchKey::CPU;
}

inline bool is_device(c10::DispatchKey key) {
  return key == c10::DispatchKey::CPU || key == c10::DispatchKey::CUDA;
}

// Whether below autograd a device is the first place.
inline bool go_to_device(std::initializer_list<TensorList> lists) {
  const at::AutoDispatchBelowAutograd guard;
  return is_device(first_key(lists));
}

inline bool has_forward_gradient(TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const Tensor& tensor) {
    return tensor.defined() && tensor._fw_grad(/*level=*/0).defined();
  });
}

// On the CPU, all layers of a stack by one call that runs them together: their results, from the
// bottom, or none where they had better be run one by one. Arguments as of the operators.
std::vector<ForwardResults> forward_stack_cpu(const Options& net, const Tensor& input,
                                              const Context& context, TensorList weights,
                                              bool keep_gates);

// Likewise, for windows that do not overlap; kept, masks and grads as of network_gradients, needs of
// each layer. From the top.
std::vector<BackwardResults> backward_stack_cpu(const Options& net, const Context& context,
                                                const TensorVector& grads, TensorList weights,
                                                TensorList kept, TensorList masks,
                                                const std::vector<c10::List<bool>>& needs);

}  // namespace fastbptt
