// What operators check of their arguments, for Python's side of them: the operators, run by what checks
// and computes nothing. It reads no data, so that of tensors without data it is the same.
#pragma once

#include "arguments.h"
#include "checks.h"
#include "network.h"
#include "tangent_call.h"
#include "tangents.h"

namespace fastbptt {
namespace {

ForwardResults only_check(const ForwardArguments& args) {
  check_forward<c10::SymInt>(args, HalfTypes::kBoth);
  return {};
}

BackwardResults only_check(const BackwardArguments& args) {
  const auto shape = check_backward<c10::SymInt>(args, HalfTypes::kBoth);
  // How many rows lanes have is for the device to know.
  const OptionalTensor& grad = args.grad_output;
  const bool any_rows = args.grad_by_lane && grad.has_value() && grad->dim() > 0;
  check_grad_by_lane(args, shape, any_rows ? grad->sym_size(0) : shape.N);
  return {};
}

std::vector<Tensor> only_check(const NetworkBackwardArguments& args) {
  check_network_backward(args);
  return {};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> only_check(const LayerCall& call,
                                                              const LayerTangents& tangents) {
  check_jvp(call, tangents);
  return {};
}

BackwardTangentTuple only_check(const LayerCall& call, const LayerTangents& tangents,
                                const ResultGradients& grads, const ResultGradients& grads_t,
                                const KeptTangents& kept_t, const c10::List<bool>& needs) {
  check_bwd_jvp(call, tangents, grads, grads_t, kept_t, needs);
  return {};
}

BackwardTuple only_check(const LayerCall& call, const ResultGradients& grads,
                         const c10::List<bool>& needs, int64_t groups) {
  check_bwd_apart(call, grads, needs, groups);
  return {};
}

// Those of steps have checked when they run anything.
ForwardTangents only_check(const ForwardTangentArguments&, const LayerShape&) { return {}; }
BackwardTangents only_check(const BackwardTangentArguments&, const LayerShape&) { return {}; }

}  // namespace
}  // namespace fastbptt
