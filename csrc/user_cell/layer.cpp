#include "user_cell/layer.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <string>

#include "checks.h"
#include "cpu/kernels.h"
#include "tensors.h"

namespace fastbptt {
namespace {

const void* read(const Tensor& tensor) { return const_data<void>(tensor); }
const void* read(const OptionalTensor& tensor) { return tensor ? read(*tensor) : nullptr; }

template <typename T>
std::vector<const void*> read_each(const std::vector<T>& tensors) {
  std::vector<const void*> result;
  for (const T& each : tensors) result.push_back(read(each));
  return result;
}

void* write(const Tensor& tensor) { return data<void>(tensor); }

std::vector<void*> write_each(const std::vector<Tensor>& tensors) {
  std::vector<void*> result;
  for (const Tensor& each : tensors) result.push_back(write(each));
  return result;
}

// What is common to both passes; the call points into it.
struct Pass {
  const UserLayout layout;
  const OwnedLayout owned;
  const std::vector<const void*> initial, extras, reset_to;
  const std::vector<void*> states;
  UserCall call{};

  Pass(const UserCell& cell, UserLayout of, int64_t direction, const UserResults& results)
      : layout(std::move(of)),
        owned(layout.T, layout.B, layout.N, false, layout.batch_sizes),
        initial(read_each(layout.initial)),
        extras(read_each(layout.extras)),
        reset_to(read_each(layout.reset_to)),
        states(write_each(results.states)) {
    call.cell = &cell;
    call.T = layout.T;
    call.B = layout.B;
    call.N = layout.N;
    call.I = layout.I;
    call.H = layout.H;
    call.direction = direction;
    call.ld_kept = results.kept.defined() ? results.kept.size(-1) : 0;
    call.offsets = owned.layout.offsets;
    call.batch_sizes = owned.layout.batch_sizes;
    call.resets = static_cast<const bool*>(read(layout.resets));
    call.input = read(layout.input);
    call.w_ih = read(layout.w_ih);
    call.w_hh = read(layout.w_hh);
    call.b_ih = read(layout.b_ih);
    call.b_hh = read(layout.b_hh);
    call.initial = initial.data();
    call.all_states = states.data();
    call.extra_data = extras.data();
    call.extra_strides = layout.strides.data();
    call.reset_to = reset_to.empty() ? nullptr : reset_to.data();
    call.reset_strides = layout.reset_strides.data();
    call.pre = write(results.pre);
    call.kept = write(results.kept);
  }
  Pass(const Pass&) = delete;
};

template <typename T>
void check_count(const char* name, const std::vector<T>& each, int64_t count) {
  TORCH_CHECK(int64_t(each.size()) == count, name, " must hold ", count, " of them, got ",
              each.size());
}

UserLayout layout_of(const UserCell& cell, const UserArguments& args) {
  TORCH_CHECK(args.input.device().is_cpu() &&
                  args.input.scalar_type() == (cell.is_double ? at::kDouble : at::kFloat),
              "input must be of the CPU and of the cell's dtype, got ", args.input.device(),
              " and ", args.input.scalar_type());
  const std::vector<std::string> names(cell.extra_names, cell.extra_names + cell.extras);
  UserLayout layout = user_layout(cell.gates, names, args);
  check_count("hx", args.initial, cell.states);
  if (!args.reset_to.empty()) check_count("reset_to", args.reset_to, cell.states);
  const std::string isa = kernels().isa, own = isa.substr(0, isa.find("_bf16"));
  TORCH_CHECK(own == cell.isa, "a cell's passes must be in one instruction set: it was ", cell.isa,
              " when the forward pass ran, and is ", own, " now");
  return layout;
}

// Those of what a forward pass keeps in each row: of the input's part of the gates, and of values.
int64_t pre_columns(const UserCell& cell, int64_t H) { return cell.gates * H; }
int64_t kept_columns(const UserCell& cell, int64_t H) {
  return cell.fits_pre ? pre_columns(cell, H) : cell.kept_values * H + 2 * cell.norms;
}
bool keeps_values(const UserCell& cell) { return cell.kept_values > 0 || cell.norms > 0; }

std::vector<int64_t> state_sizes(const UserLayout& layout) {
  std::vector<int64_t> sizes = layout.input.sizes().vec();
  sizes.back() = layout.H;
  return sizes;
}

// What a forward pass gave.
void check_kept(const Tensor& tensor, const char* name, at::IntArrayRef sizes,
                const Tensor& input) {
  check_tensor<int64_t>(tensor, name, sizes, input);
  TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous, got strides ", tensor.strides());
}

// They are read as they lie.
UserResults without_negated_views(UserResults results) {
  const auto resolve = [](Tensor& tensor) {
    if (tensor.defined()) tensor = tensor.resolve_neg();
  };
  for (Tensor& each : results.states) resolve(each);
  resolve(results.pre);
  resolve(results.kept);
  return results;
}

}  // namespace

UserResults run_user_layer(const UserCell& cell, const UserArguments& args, bool keep) {
  const at::AutoDispatchBelowAutograd no_autograd;
  UserLayout layout = layout_of(cell, args);
  const auto empty = [&](at::IntArrayRef sizes) {
    return at::empty(sizes, layout.input.options());
  };
  UserResults results;
  for (int64_t k = 0; k < cell.states; ++k) {
    results.states.push_back(empty(state_sizes(layout)));
    results.last.push_back(empty({layout.B, layout.H}));
  }
  if (keep && cell.keeps_pre) results.pre = empty({layout.N, pre_columns(cell, layout.H)});
  if (keep && keeps_values(cell)) {
    results.kept = cell.fits_pre ? results.pre : empty({layout.N, kept_columns(cell, layout.H)});
  }
  Pass pass(cell, std::move(layout), args.direction, results);
  const std::vector<void*> last = write_each(results.last);
  pass.call.last = last.data();
  run_user_forward(pass.call, at::get_num_threads());
  return results;
}

UserEach<Tensor> user_gradients(const UserCell& cell, const UserArguments& args,
                                const UserResults& given_results, const UserGiven& given,
                                const UserEach<bool>& wanted) {
  const at::AutoDispatchBelowAutograd no_autograd;
  const UserResults results = without_negated_views(given_results);
  Pass pass(cell, layout_of(cell, args), args.direction, results);
  const UserLayout& of = pass.layout;
  const std::vector<int64_t> sizes = state_sizes(of);
  check_count("states", results.states, cell.states);
  for (const Tensor& each : results.states) check_kept(each, "states", sizes, of.input);
  if (cell.keeps_pre) check_kept(results.pre, "pre", {of.N, pre_columns(cell, of.H)}, of.input);
  if (keeps_values(cell)) {
    check_kept(results.kept, "kept", {of.N, kept_columns(cell, of.H)}, of.input);
  }
  check_count("wanted.initial", wanted.initial, cell.states);
  check_count("wanted.extras", wanted.extras, cell.extras);
  if (!wanted.reset_to.empty()) check_count("wanted.reset_to", wanted.reset_to, cell.states);
  const auto checked = [&](const std::vector<OptionalTensor>& gradients, const char* name,
                           at::IntArrayRef wanted_sizes) {
    std::vector<OptionalTensor> contiguous;
    for (const OptionalTensor& each : gradients) {
      contiguous.push_back(each ? as_stored(each->to(of.input.scalar_type())) : each);
      if (each) check_tensor<int64_t>(*contiguous.back(), name, wanted_sizes, of.input);
    }
    contiguous.resize(size_t(cell.states));
    return contiguous;
  };
  const std::vector<OptionalTensor> d_states = checked(given.d_states, "a state's gradient", sizes);
  const std::vector<OptionalTensor> d_last =
      checked(given.d_last, "a last state's gradient", {of.B, of.H});
  OptionalTensor kappa;
  if (given.kappa) kappa = as_stored(given.kappa->to(of.input.scalar_type()));
  check_rows<int64_t>(kappa, "kappa", of.input.scalar_type(), of.input);

  UserEach<Tensor> found;
  const auto like = [](const OptionalTensor& tensor, bool is_wanted) {
    return is_wanted && tensor ? at::empty_like(*tensor) : Tensor();
  };
  found.input = like(of.input, wanted.input);
  found.w_ih = like(of.w_ih, wanted.w_ih);
  found.w_hh = like(of.w_hh, wanted.w_hh);
  found.b_ih = like(of.b_ih, wanted.b_ih);
  found.b_hh = like(of.b_hh, wanted.b_hh);
  for (const bool is_wanted : wanted.initial) {  // that of a state which is reset first stays zero
    found.initial.push_back(is_wanted ? at::zeros({of.B, of.H}, of.input.options()) : Tensor());
  }
  for (size_t k = 0; k < wanted.extras.size(); ++k) {
    const bool is_sum = of.strides[2 * k] == 0;
    found.extras.push_back(!wanted.extras[k] ? Tensor()
                           : is_sum          ? at::empty({of.H}, of.input.options())
                                             : at::empty(sizes, of.input.options()));
  }
  bool any_reset_to = false;
  for (const bool is_wanted : wanted.reset_to) {
    found.reset_to.push_back(is_wanted ? at::zeros(sizes, of.input.options()) : Tensor());
    any_reset_to |= is_wanted;
  }

  const std::vector<const void*> of_states = read_each(d_states), of_last = read_each(d_last);
  const std::vector<void*> initial = write_each(found.initial), extras = write_each(found.extras);
  const std::vector<void*> reset_to = write_each(found.reset_to);
  UserCall& call = pass.call;
  call.clip_grad = given.clip_grad;
  call.kappa = read(kappa);
  call.d_states = of_states.data();
  call.d_last = of_last.data();
  call.d_initial = initial.data();
  call.d_extras = extras.data();
  call.d_reset_to = any_reset_to ? reset_to.data() : nullptr;
  call.d_input = write(found.input);
  call.d_w_ih = write(found.w_ih);
  call.d_w_hh = write(found.w_hh);
  call.d_b_ih = write(found.b_ih);
  call.d_b_hh = write(found.b_hh);
  run_user_backward(call, at::get_num_threads());
  return found;
}

}  // namespace fastbptt
