#include "user_cell/layout.h"

#include <ATen/ops/full.h>

#include "checks.h"
#include "tensors.h"

namespace fastbptt {
namespace {

// An extra in input's dtype; its strides by row and by unit are added.
Tensor read_extra(const std::string& name, const Tensor& given, const UserLayout& of,
                  std::vector<int64_t>* strides) {
  Tensor extra = given;
  if (extra.dim() == 0 && extra.device() != of.input.device()) {
    extra = at::full({}, extra.item(), of.input.options());
  }
  extra = as_stored(extra.to(of.input.scalar_type()));
  const at::IntArrayRef shape = extra.sizes();
  std::vector<int64_t> by_unit = of.input.sizes().vec(), by_row = by_unit;
  by_unit.back() = of.H;
  by_row.back() = 1;
  if (shape.empty() || shape == at::IntArrayRef{1}) {
    strides->insert(strides->end(), {0, 0});
  } else if (shape == at::IntArrayRef{of.H}) {
    strides->insert(strides->end(), {0, 1});
  } else if (shape == at::IntArrayRef(by_unit)) {
    strides->insert(strides->end(), {of.H, 1});
  } else if (shape == at::IntArrayRef(by_row)) {
    strides->insert(strides->end(), {1, 0});
  } else {
    TORCH_CHECK_VALUE(false, name, " must be a number, [", of.H, "], ", at::IntArrayRef(by_unit),
                      " or ", at::IntArrayRef(by_row), ", got ", shape);
  }
  TORCH_CHECK(extra.device() == of.input.device(), name, " must be on input's device ",
              of.input.device(), ", got ", extra.device());
  return extra;
}

// What a state is at resets, with its strides by row and by sequence: where it is the same at all
// steps it is read once.
Tensor read_reset_to(const Tensor& given, const UserLayout& of, std::vector<int64_t>* strides) {
  std::vector<int64_t> sizes = of.input.sizes().vec();
  sizes.back() = of.H;
  check_tensor<int64_t>(given, "reset_to", sizes, of.input);
  if (of.batch_sizes || given.stride(0) > 0) {
    strides->insert(strides->end(), {of.H, 0});
    return as_stored(given);
  }
  strides->insert(strides->end(), {0, of.H});
  return as_stored(given.select(0, 0));
}

}  // namespace

Tensor as_stored(const Tensor& tensor) { return tensor.resolve_neg().contiguous(); }

UserLayout user_layout(int64_t gates, const std::vector<std::string>& extra_names,
                       const UserArguments& args) {
  UserLayout of;
  TORCH_CHECK(args.direction == 1 || args.direction == -1, "direction must be 1 or -1, got ",
              args.direction);
  of.input = as_stored(args.input);
  if (args.batch_sizes) of.batch_sizes = args.batch_sizes->to(at::kLong).contiguous();
  LayerShape shape{};
  check_batch_sizes<int64_t>(of.input, of.batch_sizes, false, std::nullopt, &shape);
  of.T = shape.T;
  of.B = shape.B;
  of.N = shape.N;
  of.I = of.input.size(-1);
  const Tensor& input = of.input;
  TORCH_CHECK(args.w_ih.dim() == 2 && args.w_ih.size(0) >= gates, "weight_ih must have shape ",
              "[gates * H, I] with ", gates, " gates, got ", args.w_ih.sizes());
  of.H = args.w_ih.size(0) / gates;
  const int64_t rows = gates * of.H;
  check_tensor<int64_t>(args.w_ih, "weight_ih", {rows, of.I}, input);
  of.w_ih = as_stored(args.w_ih);
  const auto read = [&](const OptionalTensor& tensor, const std::string& name,
                        at::IntArrayRef sizes) {
    if (tensor) check_tensor<int64_t>(*tensor, name, sizes, input);
    return tensor ? OptionalTensor(as_stored(*tensor)) : tensor;
  };
  of.w_hh = read(args.w_hh, "weight_hh", {rows, of.H});
  of.b_ih = read(args.b_ih, "bias_ih", {rows});
  of.b_hh = read(args.b_hh, "bias_hh", {rows});
  for (const OptionalTensor& state : args.initial) {
    of.initial.push_back(read(state, "hx", {of.B, of.H}));
  }
  check_rows<int64_t>(args.resets, "resets", at::kBool, input);
  of.resets = contiguous(args.resets);
  TORCH_CHECK(args.extras.size() == extra_names.size(), "extras must be ", extra_names.size(),
              ", got ", args.extras.size());
  for (size_t k = 0; k < extra_names.size(); ++k) {
    of.extras.push_back(read_extra(extra_names[k], args.extras[k], of, &of.strides));
  }
  for (const Tensor& each : args.reset_to) {
    of.reset_to.push_back(read_reset_to(each, of, &of.reset_strides));
  }
  return of;
}

}  // namespace fastbptt
