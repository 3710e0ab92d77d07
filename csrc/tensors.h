// The operators' tensors, between their checks and the kernels, on any device: contiguous arguments,
// the batch's layout, and results.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "checks.h"
#include "lanes.h"

namespace fastbptt {

// A batch's layout with the storage behind its pointers.
struct OwnedLayout {
  std::vector<int64_t> offsets;
  Layout layout;

  OwnedLayout(const LayerShape& shape, const LayerArguments& args)
      : OwnedLayout(shape.T, shape.B, shape.N, args.batch_first, args.batch_sizes) {}
  OwnedLayout(int64_t T, int64_t B, int64_t N, bool batch_first,
              const OptionalTensor& batch_sizes) {
    layout = {T, B, N, batch_first ? 1 : B, batch_first ? T : 1, nullptr, nullptr};
    if (!batch_sizes.has_value()) return;
    layout.batch_sizes = batch_sizes->const_data_ptr<int64_t>();
    offsets.resize(T + 1);
    for (int64_t t = 0; t < T; ++t) offsets[t + 1] = offsets[t] + layout.batch_sizes[t];
    layout.offsets = offsets.data();
  }
  OwnedLayout(const OwnedLayout&) = delete;
};

inline OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(tensor->contiguous()) : tensor;
}

// The arguments of a layer, contiguous.
struct LayerTensors {
  Tensor input;
  OptionalTensor hx, cx, resets;
  std::vector<Tensor> weights;

  explicit LayerTensors(const LayerArguments& args)
      : input(args.input.contiguous()),
        hx(contiguous(args.hx)),
        cx(contiguous(args.cx)),
        resets(contiguous(args.resets)) {
    for (const Tensor& weight : args.weights) weights.push_back(weight.contiguous());
  }

  // Makes numbers of all of them have a dtype.
  void convert(at::ScalarType dtype) {
    input = input.to(dtype);
    for (OptionalTensor* each : {&hx, &cx}) convert_optional(each, dtype);
    for (Tensor& weight : weights) weight = weight.to(dtype);
  }

 protected:
  static void convert_optional(OptionalTensor* tensor, at::ScalarType dtype) {
    if (tensor->has_value()) *tensor = (*tensor)->to(dtype);
  }
};

struct BackwardTensors : LayerTensors {
  Tensor output, c, gates;
  OptionalTensor d_output, d_h_n, d_c_n, kappa, mask;
  OptionalTensor d_network;  // no kernel reads it: never converted

  explicit BackwardTensors(const BackwardArguments& args)
      : LayerTensors(args),
        output(args.output.contiguous()),
        c(args.c.contiguous()),
        gates(args.gates.contiguous()),
        d_output(contiguous(args.grad_output)),
        d_h_n(contiguous(args.grad_h_n)),
        d_c_n(contiguous(args.grad_c_n)),
        kappa(contiguous(args.kappa)),
        mask(contiguous(args.mask)),
        d_network(contiguous(args.grad_network)) {}

  void convert(at::ScalarType dtype) {
    LayerTensors::convert(dtype);
    for (Tensor* each : {&output, &c, &gates}) *each = each->to(dtype);
    for (OptionalTensor* each : {&d_output, &d_h_n, &d_c_n, &kappa, &mask}) {
      convert_optional(each, dtype);
    }
  }
};

// The shapes of the backward operator's gradient of input: with a row for each of `lane_rows`, or
// for the steps that the windows lie in.
inline std::vector<int64_t> d_input_sizes(const BackwardArguments& args, const LayerShape& shape,
                                          const OwnedLayout& layout, Span span, int64_t lane_rows) {
  if (args.input_by_lane) return {lane_rows, shape.I};
  std::vector<int64_t> sizes = args.input.sizes().vec();
  if (args.batch_sizes.has_value()) {
    sizes[0] = layout.offsets[span.end] - layout.offsets[span.begin];
  } else {
    sizes[args.batch_first ? 1 : 0] = span.end - span.begin;
  }
  return sizes;
}

// Results of the forward operator, not initialised; `empty(sizes)` makes a tensor.
template <typename Empty>
ForwardResults make_forward_results(const ForwardArguments& args, const LayerShape& shape,
                                    Empty&& empty) {
  const int64_t with_c = shape.has_cell_state() ? shape.D : 0;
  const int64_t with_gates = args.keep_gates && shape.S > 0 ? shape.D : 0;
  return {empty(output_sizes(args.input, shape)), empty({shape.D, shape.B, shape.R}),
          empty({with_c, shape.B, shape.H}), empty({with_c, shape.N, shape.H}),
          empty({with_gates, shape.N, shape.S * shape.H})};
}

// Those of the backward operator; an initial state's gradient may be partly a sum, and is made by
// `state(sizes)`.
template <typename Empty, typename State>
BackwardResults make_backward_results(const BackwardArguments& args,
                                      std::vector<int64_t> d_input_sizes, Empty&& empty,
                                      State&& state) {
  const std::vector<int64_t> nothing{0};
  BackwardResults results;
  results.d_input = empty(args.needs[0] ? d_input_sizes : nothing);
  results.d_hx = args.needs[1] ? state(args.hx->sizes().vec()) : empty(nothing);
  results.d_cx = args.needs[2] ? state(args.cx->sizes().vec()) : empty(nothing);
  for (const Tensor& weight : args.weights) {
    results.d_weights.push_back(empty(args.needs[3] ? weight.sizes().vec() : nothing));
  }
  return results;
}

// Where nothing is run: every gradient is zero.
inline BackwardResults zero(const BackwardResults& results) {
  for (const Tensor* each : {&results.d_input, &results.d_hx, &results.d_cx}) each->zero_();
  for (const Tensor& d_weight : results.d_weights) d_weight.zero_();
  return results;
}

// The results in a dtype: the same tensors where it is theirs.
inline ForwardResults converted(const ForwardResults& r, at::ScalarType dtype) {
  return {r.output.to(dtype), r.h_n.to(dtype), r.c_n.to(dtype), r.c.to(dtype), r.gates.to(dtype)};
}

inline BackwardResults converted(BackwardResults r, at::ScalarType dtype) {
  for (Tensor* each : {&r.d_input, &r.d_hx, &r.d_cx}) *each = each->to(dtype);
  for (Tensor& d_weight : r.d_weights) d_weight = d_weight.to(dtype);
  return r;
}

template <typename value_t>
const value_t* const_data(const Tensor& tensor) {
  return tensor.defined() ? static_cast<const value_t*>(tensor.const_data_ptr()) : nullptr;
}

template <typename value_t>
value_t* data(const Tensor& tensor) {
  return tensor.defined() ? static_cast<value_t*>(tensor.mutable_data_ptr()) : nullptr;
}

template <typename value_t>
const value_t* rows_of(const OptionalTensor& tensor) {
  return tensor.has_value() ? const_data<value_t>(*tensor) : nullptr;
}

// Direction d of a [D, ...] tensor, or null where there is none.
template <typename scalar_t>
const scalar_t* direction_of(const OptionalTensor& tensor, int64_t d) {
  return tensor.has_value() ? const_data<scalar_t>(*tensor) + d * tensor->stride(0) : nullptr;
}

template <typename scalar_t>
scalar_t* direction_of(const Tensor& tensor, int64_t d, bool wanted) {
  return wanted ? data<scalar_t>(tensor) + d * tensor.stride(0) : nullptr;
}

}  // namespace fastbptt
