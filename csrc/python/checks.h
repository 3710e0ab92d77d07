// What operators check of their arguments, for Python's side of them: of tensors without data it is the
// same. Each takes what its operator does.
#pragma once

#include <string>
#include <vector>

#include "checks.h"
#include "network.h"
#include "tangent_call.h"
#include "tangents.h"

namespace fastbptt {
namespace {

using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<OptionalTensor>;

template <typename T>
c10::List<T> list_of(const std::vector<T>& values) {
  c10::List<T> list;
  for (const T& value : values) list.push_back(value);
  return list;
}

void check_forward_arguments(const Tensor& input, const OptionalTensor& hx,
                             const OptionalTensor& cx, const Tensors& weights, bool has_biases,
                             const OptionalTensor& batch_sizes, bool batch_first,
                             const std::string& cell, const OptionalTensor& resets) {
  check_forward<c10::SymInt>(
      {input, hx, cx, weights, has_biases, batch_sizes, batch_first, cell, resets},
      HalfTypes::kBoth);
}

void check_backward_arguments(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                              const OptionalTensor& grad_c_n, const Tensor& input,
                              const Tensor& output, const Tensor& c, const Tensor& gates,
                              const OptionalTensor& hx, const OptionalTensor& cx,
                              const Tensors& weights, bool has_biases,
                              const OptionalTensor& batch_sizes, bool batch_first,
                              const std::string& cell, const std::vector<bool>& needs, int64_t k1,
                              int64_t k2, bool last_only, const OptionalTensor& resets,
                              const OptionalTensor& kappa, const OptionalTensor& mask,
                              int64_t first_window, int64_t num_windows, bool grad_by_lane,
                              bool input_by_lane, const OptionalTensor& grad_network) {
  const c10::List<bool> flags = list_of(needs);
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
}

void check_network_backward_arguments(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
    const OptionalTensor& grad_c_n, const OptionalTensor& hx, const OptionalTensor& cx,
    const OptionalTensor& batch_sizes, const OptionalTensor& resets, const OptionalTensor& kappa,
    const Tensors& weights, const Tensors& kept, const Tensors& masks, bool has_biases,
    int64_t num_layers, bool bidirectional, bool batch_first, const std::string& cell, int64_t k1,
    int64_t k2, bool last_only, const std::vector<bool>& needs) {
  check_network_backward({grad_output, grad_h_n,      grad_c_n,    hx,   cx,    batch_sizes,
                          resets,      kappa,         weights,     kept, masks, has_biases,
                          num_layers,  bidirectional, batch_first, cell, k1,    k2,
                          last_only,   needs});
}

void check_jvp_arguments(const Tensor& input, const Tensor& output, const Tensor& c,
                         const Tensor& gates, const OptionalTensor& hx, const OptionalTensor& cx,
                         const Tensors& weights, const OptionalTensor& input_t,
                         const OptionalTensor& hx_t, const OptionalTensor& cx_t,
                         const OptionalTensors& weights_t, bool has_biases,
                         const OptionalTensor& batch_sizes, bool batch_first,
                         const std::string& cell, int64_t k1, const OptionalTensor& resets,
                         const OptionalTensor& kappa) {
  check_jvp({input, output, c, gates, hx, cx, weights, has_biases, batch_sizes, batch_first, cell,
             k1, resets, kappa},
            {input_t, hx_t, cx_t, list_of(weights_t)});
}

void check_bwd_jvp_arguments(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                             const OptionalTensor& grad_c_n, const OptionalTensor& grad_output_t,
                             const OptionalTensor& grad_h_n_t, const OptionalTensor& grad_c_n_t,
                             const Tensor& input, const Tensor& output, const Tensor& c,
                             const Tensor& gates, const OptionalTensor& hx,
                             const OptionalTensor& cx, const Tensors& weights,
                             const OptionalTensor& input_t, const OptionalTensor& output_t,
                             const OptionalTensor& c_t, const OptionalTensor& gates_t,
                             const OptionalTensor& hx_t, const OptionalTensor& cx_t,
                             const OptionalTensors& weights_t, bool has_biases,
                             const OptionalTensor& batch_sizes, bool batch_first,
                             const std::string& cell, const std::vector<bool>& needs, int64_t k1,
                             const OptionalTensor& resets, const OptionalTensor& kappa) {
  check_bwd_jvp({input, output, c, gates, hx, cx, weights, has_biases, batch_sizes, batch_first,
                 cell, k1, resets, kappa},
                {input_t, hx_t, cx_t, list_of(weights_t)}, {grad_output, grad_h_n, grad_c_n},
                {grad_output_t, grad_h_n_t, grad_c_n_t}, {output_t, c_t, gates_t}, list_of(needs));
}

void check_bwd_apart_arguments(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                               const OptionalTensor& grad_c_n, const Tensor& input,
                               const Tensor& output, const Tensor& c, const Tensor& gates,
                               const OptionalTensor& hx, const OptionalTensor& cx,
                               const Tensors& weights, bool has_biases,
                               const OptionalTensor& batch_sizes, bool batch_first,
                               const std::string& cell, const std::vector<bool>& needs,
                               int64_t groups, int64_t k1, const OptionalTensor& resets,
                               const OptionalTensor& kappa) {
  check_bwd_apart({input, output, c, gates, hx, cx, weights, has_biases, batch_sizes, batch_first,
                   cell, k1, resets, kappa},
                  {grad_output, grad_h_n, grad_c_n}, list_of(needs), groups);
}

void check_jvp_steps(const Tensor& pre, const OptionalTensor& projected, const OptionalTensor& hx_t,
                     const OptionalTensor& cx_t, const Tensor& output, const Tensor& c,
                     const Tensor& gates, const Tensor& before, const OptionalTensor& gate,
                     const Tensor& w_hh, const OptionalTensor& w_hr,
                     const OptionalTensor& batch_sizes, int64_t T, bool batch_first, bool reverse,
                     const std::string& cell) {
  check_steps(ForwardTangentArguments{
      {output, c, gates, before, gate, w_hh, w_hr, batch_sizes, T, batch_first, reverse, cell},
      pre,
      projected,
      hx_t,
      cx_t});
}

void check_bwd_jvp_steps(const OptionalTensor& d_output, const OptionalTensor& d_output_t,
                         const OptionalTensor& d_h_n, const OptionalTensor& d_h_n_t,
                         const OptionalTensor& d_c_n, const OptionalTensor& d_c_n_t,
                         const Tensor& output, const Tensor& c, const Tensor& gates,
                         const Tensor& before, const OptionalTensor& output_t,
                         const OptionalTensor& c_t, const OptionalTensor& gates_t,
                         const OptionalTensor& before_t, const OptionalTensor& gate,
                         const Tensor& w_hh, const OptionalTensor& w_hr, bool needs_states,
                         const OptionalTensor& batch_sizes, int64_t T, bool batch_first,
                         bool reverse, const std::string& cell) {
  check_steps(BackwardTangentArguments{
      {output, c, gates, before, gate, w_hh, w_hr, batch_sizes, T, batch_first, reverse, cell},
      d_output,
      d_output_t,
      d_h_n,
      d_h_n_t,
      d_c_n,
      d_c_n_t,
      output_t,
      c_t,
      gates_t,
      before_t,
      needs_states});
}

}  // namespace
}  // namespace fastbptt
