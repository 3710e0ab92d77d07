// The _C module: it loads the operators, and has what Python asks without the dispatcher.
#include "python/function.h"
// The above comes first: it chooses what of Python there is.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/InferenceMode.h>

#include <stdexcept>

#include "cpu/kernels.h"
#include "few_rows_launch.h"
#include "few_rows_tensors.h"
#include "network.h"
#include "python/checks.h"
#include "user_cell/layer.h"
#include "user_cell/steps.h"
#include "workspace.h"

namespace fastbptt {
namespace {

using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<OptionalTensor>;

std::string cpu_isa() { return kernels().isa; }

void set_cpu_isa(const std::string& isa) { select_isa(isa, "set_cpu_isa's argument"); }

const UserCell& cell_at(int64_t address) { return *reinterpret_cast<const UserCell*>(address); }

std::tuple<Tensors, Tensors, Tensor, Tensor> user_forward(
    int64_t cell, const Tensor& input, const Tensor& w_ih, const OptionalTensor& w_hh,
    const OptionalTensor& b_ih, const OptionalTensor& b_hh, const OptionalTensors& initial,
    const Tensors& extras, const OptionalTensor& resets, const OptionalTensor& batch_sizes,
    int64_t direction, const Tensors& reset_to, bool keep) {
  const python::NoGil no_gil;
  UserResults r = run_user_layer(
      cell_at(cell),
      {input, w_ih, w_hh, b_ih, b_hh, initial, extras, resets, batch_sizes, direction, reset_to},
      keep);
  return {std::move(r.states), std::move(r.last), std::move(r.pre), std::move(r.kept)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensors, Tensors, Tensors> user_backward(
    int64_t cell, const Tensor& input, const Tensor& w_ih, const OptionalTensor& w_hh,
    const OptionalTensor& b_ih, const OptionalTensor& b_hh, const OptionalTensors& initial,
    const Tensors& extras, const OptionalTensor& resets, const OptionalTensor& batch_sizes,
    int64_t direction, const Tensors& reset_to, const Tensors& states, const OptionalTensor& pre,
    const OptionalTensor& kept, const OptionalTensors& d_states, const OptionalTensors& d_last,
    const OptionalTensor& kappa, double clip_grad, bool wants_input, bool wants_w_ih,
    bool wants_w_hh, bool wants_b_ih, bool wants_b_hh, const std::vector<bool>& wants_initial,
    const std::vector<bool>& wants_extras, const std::vector<bool>& wants_reset_to) {
  const python::NoGil no_gil;
  UserEach<Tensor> d = user_gradients(
      cell_at(cell),
      {input, w_ih, w_hh, b_ih, b_hh, initial, extras, resets, batch_sizes, direction, reset_to},
      {states, {}, pre.value_or(Tensor()), kept.value_or(Tensor())},
      {d_states, d_last, kappa, clip_grad},
      {wants_input, wants_w_ih, wants_w_hh, wants_b_ih, wants_b_hh, wants_initial, wants_extras,
       wants_reset_to});
  return {std::move(d.input), std::move(d.w_ih),    std::move(d.w_hh),   std::move(d.b_ih),
          std::move(d.b_hh),  std::move(d.initial), std::move(d.extras), std::move(d.reset_to)};
}

// Sizes T, B, N, I and H; input, weights, biases, resets and batch_sizes; and the rest of UserLayout.
std::tuple<std::vector<int64_t>, Tensors, Tensors, Tensors, std::vector<int64_t>, Tensors,
           std::vector<int64_t>>
read_user_arguments(int64_t gates, const std::vector<std::string>& extra_names, const Tensor& input,
                    const Tensor& w_ih, const OptionalTensor& w_hh, const OptionalTensor& b_ih,
                    const OptionalTensor& b_hh, const OptionalTensors& initial,
                    const Tensors& extras, const OptionalTensor& resets,
                    const OptionalTensor& batch_sizes, int64_t direction, const Tensors& reset_to) {
  const python::NoGil no_gil;
  const at::AutoDispatchBelowAutograd no_autograd;
  UserLayout of = user_layout(
      gates, extra_names,
      {input, w_ih, w_hh, b_ih, b_hh, initial, extras, resets, batch_sizes, direction, reset_to});
  const auto unwrapped = [](const OptionalTensors& tensors) {
    Tensors result;
    for (const OptionalTensor& each : tensors) result.push_back(each.value_or(Tensor()));
    return result;
  };
  return {{of.T, of.B, of.N, of.I, of.H},
          unwrapped({of.input, of.w_ih, of.w_hh, of.b_ih, of.b_hh, of.resets, of.batch_sizes}),
          unwrapped(of.initial),
          std::move(of.extras),
          std::move(of.strides),
          std::move(of.reset_to),
          std::move(of.reset_strides)};
}

int64_t user_cell_steps(int64_t call, bool goes_back, const OptionalTensor& rows,
                        const OptionalTensor& weight, const OptionalTensor& product) {
  const python::NoGil no_gil;
  std::optional<UserProducts> products;
  if (rows) products = UserProducts{*rows, *weight, *product};
  return run_user_steps(*reinterpret_cast<const UserStepsCall*>(call), goes_back, products);
}

bool cuda_built() {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow("fastbptt::rnn_fwd", "")
      .hasKernelForDispatchKey(c10::DispatchKey::CUDA);
}

std::tuple<Tensor, Tensor, Tensor> call_network(
    const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx, const Tensors& weights,
    bool has_biases, int64_t num_layers, bool bidirectional, const OptionalTensor& batch_sizes,
    bool batch_first, const std::string& cell, double dropout, int64_t k1, int64_t k2,
    bool last_only, bool recompute, const OptionalTensor& resets, const OptionalTensor& kappa) {
  const python::NoGil no_gil;
  return network(input, hx, cx, weights, has_biases, num_layers, bidirectional, batch_sizes,
                 batch_first, cell, dropout, k1, k2, last_only, recompute, resets, kappa);
}

// Weights in autocast's dtype, from autocast's own cache: cast once a region, not once a call. A copy
// made while gradients are off would serve the region's later calls too, so all are made with them on.
Tensors autocast_weights(const Tensors& weights, const Tensor& input) {
  const bool wants_gradients = at::GradMode::is_enabled();
  const c10::InferenceMode not_inference(false);
  const at::AutoGradMode with_gradients(true);
  const c10::DeviceType device = input.device().type();
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  Tensors result;
  result.reserve(weights.size());
  for (const Tensor& weight : weights) {
    Tensor cast = at::autocast::cached_cast(dtype, weight, device);
    if (wants_gradients && weight.requires_grad() && !cast.requires_grad()) {
      cast = weight.to(dtype);  // an operator of torch's put its copy there without gradients
    }
    result.push_back(std::move(cast));
  }
  return result;
}

PyMethodDef functions[] = {
    python::function<cpu_isa>("cpu_isa", "The instruction set whose kernels run on this CPU."),
    python::function<runnable_isas>("cpu_isas",
                                    "The instruction sets that this CPU can run, best first."),
    python::function<set_cpu_isa>("set_cpu_isa",
                                  "Runs the kernels of this instruction set from now on."),
    python::function<user_forward>("user_forward",
                                   "A layer of a user's cell on the CPU, given the address of a "
                                   "UserCell, _layer.Arguments, and whether to keep anything."),
    python::function<user_backward>("user_backward", "Its gradients; see user_gradients."),
    python::function<read_user_arguments>(
        "read_user_arguments",
        "Such a layer's arguments as kernels read them, given gates, extras' names and arguments."),
    python::function<user_cell_steps>(
        "user_cell_steps",
        "The steps of a user's cell on a device, given the address of a UserStepsCall and a "
        "UserProducts' tensors, or None of them. Gives a launch's error, or 0."),
    python::function<are_few_rows>("are_few_rows",
                                   "Whether a product of so many rows with a matrix of so many "
                                   "numbers has kernels of ours on a GPU."),
    python::function<allows_tf32>("allows_tf32",
                                  "Whether torch's float32 products on a GPU may be in tf32."),
    python::function<cuda_built>("cuda_built", "Whether this build has the CUDA kernels."),
    python::function<call_network>("network", "The operator `network` without the dispatcher."),
    python::function<autocast_weights>(
        "autocast_weights",
        "The weights in autocast's dtype on input's device, float64 ones as they are."),
    python::function<rnn_fwd<only_check>>("check_rnn_fwd", "What rnn_fwd checks."),
    python::function<rnn_bwd<only_check>>("check_rnn_bwd", "What rnn_bwd checks."),
    python::function<network_bwd<only_check>>("check_network_bwd", "What network_bwd checks."),
    python::function<rnn_jvp<only_check>>("check_rnn_jvp", "What rnn_jvp checks."),
    python::function<rnn_bwd_jvp<only_check>>("check_rnn_bwd_jvp", "What rnn_bwd_jvp checks."),
    python::function<rnn_bwd_apart<only_check>>("check_rnn_bwd_apart",
                                                "What rnn_bwd_apart checks."),
    python::function<rnn_jvp_steps<only_check>>("check_rnn_jvp_steps",
                                                "What rnn_jvp_steps checks."),
    python::function<rnn_bwd_jvp_steps<only_check>>("check_rnn_bwd_jvp_steps",
                                                    "What rnn_bwd_jvp_steps checks."),
    python::function<release_workspace>(
        "release_workspace", "Frees the memory that the calling thread keeps for its next call."),
    python::function<workspace_limit>("workspace_limit", "Bytes that stacked windows may take."),
    python::function<set_workspace_limit>("set_workspace_limit",
                                          "Sets the bytes that stacked windows may take."),
    python::function<stack_limit>(
        "stack_limit",
        "Bytes that may lie between the layers of a stack that the CPU runs by one call."),
    python::function<set_stack_limit>(
        "set_stack_limit", "Sets these bytes; 0: layers run one by one, each by its operator."),
    {nullptr, nullptr, 0, nullptr},
};

PyObject* make_module(const void*) {
  try {
    select_isa_from_environment();
  } catch (const std::runtime_error& error) {
    PyErr_SetString(PyExc_ImportError, error.what());
    return nullptr;
  }
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}

}  // namespace
}  // namespace fastbptt

PyMODINIT_FUNC PyInit__C() {
  return fastbptt::python::with_torchs_errors(fastbptt::make_module, nullptr);
}
