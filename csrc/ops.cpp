// The operators' schemas, and the _C module that loads them.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/InferenceMode.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include "checks.h"
#include "cpu/kernels.h"
#include "network.h"
#include "user_cell/call.h"
#include "user_cell/steps.h"
#include "workspace.h"

namespace fastbptt {
namespace {

// Weights in autocast's dtype, from autocast's own cache: cast once a region, not once a call. A copy
// made while gradients are off would serve the region's later calls too, so all are made with them on.
std::vector<Tensor> autocast_weights(const std::vector<Tensor>& weights, const Tensor& input) {
  const bool wants_gradients = at::GradMode::is_enabled();
  const c10::InferenceMode not_inference(false);
  const at::AutoGradMode with_gradients(true);
  const c10::DeviceType device = input.device().type();
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  std::vector<Tensor> result;
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

}  // namespace

TORCH_LIBRARY(fastbptt, m) {
  m.def(kForwardSchema);
  m.def(kBackwardSchema);
}

PYBIND11_MODULE(_C, m) {
  select_isa_from_environment();
  m.def(
      "cpu_isa", [] { return std::string(kernels().isa); },
      "The instruction set whose kernels run on this CPU.");
  m.def("cpu_isas", runnable_isas, "The instruction sets that this CPU can run, best first.");
  m.def(
      "set_cpu_isa", [](const std::string& isa) { select_isa(isa, "set_cpu_isa's argument"); },
      pybind11::arg("isa"), "Runs the kernels of this instruction set from now on.");
  m.def(
      "user_cell",
      [](uintptr_t call, bool goes_back) {
        HANDLE_TH_ERRORS
        const pybind11::gil_scoped_release no_gil;
        const auto& user_call = *reinterpret_cast<const UserCall*>(call);
        (goes_back ? run_user_backward : run_user_forward)(user_call, at::get_num_threads());
        END_HANDLE_TH_ERRORS_PYBIND
      },
      "A pass of a user's cell, given the address of a UserCall.");
  m.def(
      "user_cell_steps",
      [](uintptr_t call, bool goes_back, const OptionalTensor& rows, const OptionalTensor& weight,
         const OptionalTensor& product) {
        HANDLE_TH_ERRORS
        const pybind11::gil_scoped_release no_gil;
        std::optional<UserProducts> products;
        if (rows) products = UserProducts{*rows, *weight, *product};
        return run_user_steps(*reinterpret_cast<const UserStepsCall*>(call), goes_back, products);
        END_HANDLE_TH_ERRORS_PYBIND
      },
      "The steps of a user's cell on a device, given the address of a UserStepsCall and a "
      "UserProducts' tensors, or None of them. Gives a launch's error, or 0.");
  m.def(
      "cuda_built",
      [] {
        return c10::Dispatcher::singleton()
            .findSchemaOrThrow("fastbptt::rnn_fwd", "")
            .hasKernelForDispatchKey(c10::DispatchKey::CUDA);
      },
      "Whether this build has the CUDA kernels.");
  m.def(
      "network",
      [](const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
         const std::vector<Tensor>& weights, bool has_biases, int64_t num_layers,
         bool bidirectional, const OptionalTensor& batch_sizes, bool batch_first,
         const std::string& cell, double dropout, int64_t k1, int64_t k2, bool last_only,
         bool recompute, const OptionalTensor& resets, const OptionalTensor& kappa) {
        HANDLE_TH_ERRORS
        const pybind11::gil_scoped_release no_gil;
        return network(input, hx, cx, weights, has_biases, num_layers, bidirectional, batch_sizes,
                       batch_first, cell, dropout, k1, k2, last_only, recompute, resets, kappa);
        END_HANDLE_TH_ERRORS_PYBIND
      },
      "The operator `network` without the dispatcher.");
  m.def(
      "autocast_weights",
      [](const std::vector<Tensor>& weights, const Tensor& input) {
        HANDLE_TH_ERRORS
        return autocast_weights(weights, input);
        END_HANDLE_TH_ERRORS_PYBIND
      },
      "The weights in autocast's dtype on input's device, float64 ones as they are.");
  m.def(
      "check_forward",
      [](const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
         const std::vector<Tensor>& weights, bool has_biases, const OptionalTensor& batch_sizes,
         bool batch_first, const std::string& cell, const OptionalTensor& resets) {
        HANDLE_TH_ERRORS
        check_forward<c10::SymInt>(
            {input, hx, cx, weights, has_biases, batch_sizes, batch_first, cell, resets},
            HalfTypes::kBoth);
        END_HANDLE_TH_ERRORS_PYBIND
      },
      "What rnn_fwd checks, for tensors without data.");
  m.def(
      "check_backward",
      [](const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
         const OptionalTensor& grad_c_n, const Tensor& input, const Tensor& output, const Tensor& c,
         const Tensor& gates, const OptionalTensor& hx, const OptionalTensor& cx,
         const std::vector<Tensor>& weights, bool has_biases, const OptionalTensor& batch_sizes,
         bool batch_first, const std::string& cell, const std::vector<bool>& needs, int64_t k1,
         int64_t k2, bool last_only, const OptionalTensor& resets, const OptionalTensor& kappa,
         const OptionalTensor& mask, int64_t first_window, int64_t num_windows, bool grad_by_lane,
         bool input_by_lane, const OptionalTensor& grad_network) {
        HANDLE_TH_ERRORS
        c10::List<bool> flags;
        for (const bool flag : needs) flags.push_back(flag);
        const BackwardArguments arguments{
            {input, hx, cx, weights, has_biases, batch_sizes, batch_first, cell, resets},
            grad_output,
            grad_h_n,
            grad_c_n,
            output,
            c,
            gates,
            flags,
            k1,
            k2,
            last_only,
            kappa,
            mask,
            first_window,
            num_windows,
            grad_by_lane,
            input_by_lane,
            grad_network};
        const auto shape = check_backward<c10::SymInt>(arguments, HalfTypes::kBoth);
        // How many rows lanes have is for the device to know.
        const bool any_rows = grad_by_lane && grad_output.has_value() && grad_output->dim() > 0;
        check_grad_by_lane(arguments, shape, any_rows ? grad_output->sym_size(0) : shape.N);
        END_HANDLE_TH_ERRORS_PYBIND
      },
      "What rnn_bwd checks, for tensors without data.");
  m.def("release_workspace", release_workspace,
        "Frees the memory that the calling thread keeps for its next call.");
  m.def("workspace_limit", workspace_limit, "Bytes that stacked windows may take.");
  m.def("set_workspace_limit", set_workspace_limit, pybind11::arg("bytes"),
        "Sets the bytes that stacked windows may take.");
  m.def("stack_limit", stack_limit,
        "Bytes that may lie between the layers of a stack that the CPU runs by one call.");
  m.def("set_stack_limit", set_stack_limit, pybind11::arg("bytes"),
        "Sets these bytes; 0: layers run one by one, each by its operator.");
}

}  // namespace fastbptt
