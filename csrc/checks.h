// The one place where operator arguments are validated, for every device. Kernels assume.
#pragma once

#include <c10/core/SymIntArrayRef.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "arguments.h"
#include "params.h"

namespace fastbptt {

// Sizes are int64_t (Int) for a kernel. For a tracer they are c10::SymInt, which may be symbols: what
// is asked of them then holds for whatever they will stand for.
template <typename Int>
auto sizes_of(const Tensor& tensor) {
  if constexpr (std::is_same_v<Int, c10::SymInt>) {
    return tensor.sym_sizes();
  } else {
    return tensor.sizes();
  }
}

inline bool are_equal(int64_t a, int64_t b) { return a == b; }
inline bool are_equal(const c10::SymInt& a, const c10::SymInt& b) {
  return a.sym_eq(b).expect_true(__FILE__, __LINE__);
}
inline bool is_positive(int64_t a) { return a > 0; }
inline bool is_positive(const c10::SymInt& a) {
  return a.sym_gt(0).expect_true(__FILE__, __LINE__);
}

template <typename Int>
bool are_equal(c10::ArrayRef<Int> a, c10::ArrayRef<Int> b) {
  return a.size() == b.size() &&
         std::equal(a.begin(), a.end(), b.begin(),
                    [](const Int& x, const Int& y) { return are_equal(x, y); });
}

// The sizes of one layer, and where its weights stand.
template <typename Int>
struct LayerShapeOf {
  CellKind cell;
  Int T, B, N, I, H, R;  // as in params.h
  int64_t G, S, D;       // likewise; D: directions
  bool has_biases, has_projection;

  bool has_cell_state() const { return cell == CellKind::kLstm; }
  // Whether the activations were kept; else they are computed again.
  bool has_gates(const Tensor& gates) const {
    return S > 0 && gates.dim() > 0 && gates.size(0) > 0;
  }
  int64_t weights_per_direction() const { return 2 + 2 * has_biases + has_projection; }
  const Tensor& w_ih(at::TensorList w, int64_t d) const { return weight(w, d, 0); }
  const Tensor& w_hh(at::TensorList w, int64_t d) const { return weight(w, d, 1); }
  const Tensor& b_ih(at::TensorList w, int64_t d) const { return weight(w, d, 2); }
  const Tensor& b_hh(at::TensorList w, int64_t d) const { return weight(w, d, 3); }
  const Tensor& w_hr(at::TensorList w, int64_t d) const { return weight(w, d, has_biases ? 4 : 2); }

 private:
  const Tensor& weight(at::TensorList w, int64_t d, int64_t index) const {
    return w[d * weights_per_direction() + index];
  }
};
using LayerShape = LayerShapeOf<int64_t>;

inline void check_strided(const Tensor& tensor, const std::string& name) {
  TORCH_CHECK(tensor.layout() == at::kStrided, name, " must be a strided tensor, got layout ",
              tensor.layout());
}

template <typename Int>
void check_tensor(const Tensor& tensor, const std::string& name,
                  std::common_type_t<c10::ArrayRef<Int>> sizes, const Tensor& input) {
  TORCH_CHECK(tensor.defined(), name, " must be a tensor");
  TORCH_CHECK(are_equal<Int>(sizes_of<Int>(tensor), sizes), name, " must have shape ", sizes,
              ", got ", sizes_of<Int>(tensor));
  TORCH_CHECK(tensor.scalar_type() == input.scalar_type(), name, " must have input's dtype ",
              input.scalar_type(), ", got ", tensor.scalar_type());
  TORCH_CHECK(tensor.device() == input.device(), name, " must be on input's device ",
              input.device(), ", got ", tensor.device());
  check_strided(tensor, name);
}

constexpr std::array<const char*, 5> kCellNames{"tanh", "relu", "identity", "gru", "lstm"};

inline CellKind parse_cell(c10::string_view name) {
  const auto* found = std::find(kCellNames.begin(), kCellNames.end(), name);
  TORCH_CHECK(found != kCellNames.end(),
              "cell must be an Elman cell's nonlinearity (\"tanh\", \"relu\" or "
              "\"identity\"), \"gru\" or \"lstm\", got \"",
              name, "\"");
  return CellKind(found - kCellNames.begin());
}

// Fills in the cell, and what follows from it alone.
template <typename Int>
void set_cell(c10::string_view name, LayerShapeOf<Int>* shape) {
  shape->cell = parse_cell(name);
  shape->G = shape->cell == CellKind::kLstm ? 4 : shape->cell == CellKind::kGru ? 3 : 1;
  shape->S = shape->G > 1 ? 4 : 0;
}

// Whether a tensor on the CPU has values that can be read: not where it stands for one in a trace.
inline bool has_values(const Tensor& tensor) {
  return !tensor.key_set().has_any(
      c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::Functionalize}));
}

inline void check_input_dims(const Tensor& input, const OptionalTensor& batch_sizes) {
  const bool packed = batch_sizes.has_value();
  TORCH_CHECK(input.dim() == (packed ? 2 : 3), packed ? "a packed input" : "input", " must have ",
              packed ? 2 : 3, " dimensions, got ", input.dim());
  check_strided(input, "input");
}

// Fills T, B, N from a uniform input [T, B, I] or [B, T, I], or a packed one [N, I] and its
// batch_sizes. Where those have no values, a state tells what B is.
template <typename Int>
void check_batch_sizes(const Tensor& input, const OptionalTensor& batch_sizes, bool batch_first,
                       const OptionalTensor& state, LayerShapeOf<Int>* shape) {
  check_input_dims(input, batch_sizes);
  const auto input_sizes = sizes_of<Int>(input);
  if (!batch_sizes.has_value()) {
    shape->T = input_sizes[batch_first ? 1 : 0];
    shape->B = input_sizes[batch_first ? 0 : 1];
    shape->N = shape->T * shape->B;
    TORCH_CHECK(is_positive(shape->T), "input must have at least one time step, got shape ",
                input_sizes);
    return;
  }
  const Tensor& sizes = *batch_sizes;
  const auto steps = sizes_of<Int>(sizes);
  TORCH_CHECK(steps.size() == 1 && sizes.scalar_type() == at::kLong && sizes.device().is_cpu() &&
                  is_positive(steps[0]) && sizes.is_contiguous(),
              "batch_sizes must be a non-empty contiguous 1-D int64 tensor on the CPU, got shape ",
              steps, ", dtype ", sizes.scalar_type(), ", device ", sizes.device());
  TORCH_CHECK(!batch_first, "batch_first must be False for a packed input, got True");
  shape->T = steps[0];
  if (!has_values(sizes)) {
    shape->N = input_sizes[0];
    shape->B = state.has_value() && state->dim() == 3 ? sizes_of<Int>(*state)[1] : Int(0);
    return;
  }
  const int64_t* size = sizes.const_data_ptr<int64_t>();
  int64_t rows = 0;
  for (int64_t t = 0; t < sizes.numel(); ++t) {
    TORCH_CHECK(size[t] > 0 && (t == 0 || size[t] <= size[t - 1]),
                "batch_sizes must be positive and never increase, got ", size[t], " at step ", t);
    rows += size[t];
  }
  shape->B = size[0];
  shape->N = rows;
  TORCH_CHECK(are_equal(input_sizes[0], shape->N),
              "a packed input must have sum(batch_sizes) = ", rows, " rows, got ", input_sizes[0]);
}

// Finds out how many directions the list of weights is for, and whether it has projections.
template <typename Int>
void check_weight_count(at::TensorList weights, LayerShapeOf<Int>* shape) {
  const int64_t count = int64_t(weights.size()), plain = shape->has_biases ? 4 : 2;
  for (const bool projection : {false, true}) {
    if (projection && !shape->has_cell_state()) continue;
    for (int64_t directions = 1; directions <= 2; ++directions) {
      if (count != directions * (plain + projection)) continue;
      shape->D = directions;
      shape->has_projection = projection;
      return;
    }
  }
  TORCH_CHECK(false, "weights must hold ", plain, " tensors",
              shape->has_cell_state() ? " (one more with a projection)" : "",
              " for each of one or two directions, got ", count);
}

// What a device computes with besides float32 and float64.
enum class HalfTypes { kNone, kBoth };

// One value for each step of each sequence: [T, B] ([B, T] if batch_first), or packed [N].
template <typename Int>
void check_rows(const OptionalTensor& rows, const std::string& name, at::ScalarType dtype,
                const Tensor& input) {
  if (!rows.has_value()) return;
  const auto sizes = sizes_of<Int>(input).slice(0, input.dim() - 1);
  TORCH_CHECK(rows->scalar_type() == dtype, name, " must have dtype ", dtype, ", got ",
              rows->scalar_type());
  TORCH_CHECK(are_equal<Int>(sizes_of<Int>(*rows), sizes), name, " must have shape ", sizes,
              ", got ", sizes_of<Int>(*rows));
  TORCH_CHECK(rows->device() == input.device(), name, " must be on input's device ", input.device(),
              ", got ", rows->device());
}

// The first tensor that there is.
inline OptionalTensor first_of(std::initializer_list<const OptionalTensor*> tensors) {
  for (const OptionalTensor* each : tensors) {
    if (each->has_value()) return *each;
  }
  return std::nullopt;
}

// What both operators take. state: a tensor like hx, cx or their gradients, or none.
template <typename Int = int64_t>
LayerShapeOf<Int> check_layer(const LayerArguments& args, HalfTypes half_types,
                              const OptionalTensor& state) {
  const auto& [input, hx, cx, weights, has_biases, batch_sizes, batch_first, cell, resets] = args;
  LayerShapeOf<Int> shape{};
  set_cell(cell, &shape);
  shape.has_biases = has_biases;
  const at::ScalarType dtype = input.scalar_type();
  const bool takes_half = half_types == HalfTypes::kBoth;
  TORCH_CHECK_NOT_IMPLEMENTED(dtype == at::kFloat || dtype == at::kDouble ||
                                  (takes_half && (dtype == at::kHalf || dtype == at::kBFloat16)),
                              "input must have dtype ", takes_half ? "float16, bfloat16, " : "",
                              "float32 or float64, got ", dtype);
  check_batch_sizes(input, batch_sizes, batch_first, state, &shape);
  check_weight_count(weights, &shape);
  TORCH_CHECK(weights[1].dim() == 2, "weight_hh must have 2 dimensions, got ", weights[1].dim());
  const auto w_hh_sizes = sizes_of<Int>(weights[1]);
  shape.I = sizes_of<Int>(input).back();
  shape.R = w_hh_sizes[1];
  shape.H = w_hh_sizes[0] / shape.G;
  TORCH_CHECK(is_positive(shape.H) && is_positive(shape.R),
              "weight_hh must not be empty, got shape ", w_hh_sizes);
  TORCH_CHECK(shape.has_projection || are_equal(shape.R, shape.H), "weight_hh must have shape ",
              c10::ArrayRef<Int>({shape.G * shape.R, shape.R}), ", got ", w_hh_sizes);
  for (int64_t d = 0; d < shape.D; ++d) {
    const std::string suffix = d == 0 ? "" : " of the reverse direction";
    const Int rows = shape.G * shape.H;
    check_tensor<Int>(shape.w_ih(weights, d), "weight_ih" + suffix, {rows, shape.I}, input);
    check_tensor<Int>(shape.w_hh(weights, d), "weight_hh" + suffix, {rows, shape.R}, input);
    if (has_biases) {
      check_tensor<Int>(shape.b_ih(weights, d), "bias_ih" + suffix, {rows}, input);
      check_tensor<Int>(shape.b_hh(weights, d), "bias_hh" + suffix, {rows}, input);
    }
    if (shape.has_projection) {
      check_tensor<Int>(shape.w_hr(weights, d), "weight_hr" + suffix, {shape.R, shape.H}, input);
    }
  }
  if (hx.has_value()) check_tensor<Int>(*hx, "hx", {shape.D, shape.B, shape.R}, input);
  if (cx.has_value()) {
    TORCH_CHECK(shape.has_cell_state(), "cx is for an LSTM only, and cell is \"", cell, "\"");
    check_tensor<Int>(*cx, "cx", {shape.D, shape.B, shape.H}, input);
  }
  check_rows<Int>(resets, "resets", at::kBool, input);
  return shape;
}

// What the forward operator takes.
template <typename Int = int64_t>
LayerShapeOf<Int> check_forward(const LayerArguments& args, HalfTypes half_types) {
  return check_layer<Int>(args, half_types, first_of({&args.hx, &args.cx}));
}

// Where a backward pass is cut, as the operators take it.
inline void check_windows(int64_t directions, int64_t k1, int64_t k2, bool last_only) {
  TORCH_CHECK(k1 >= 0, "k1 must be 0 (no windows) or positive, got ", k1);
  TORCH_CHECK(k2 >= k1, "k2 must be at least k1 = ", k1, ", got ", k2);
  TORCH_CHECK(k1 > 0 || (k2 == 0 && !last_only), "k2 and last_only are for windows, and k1 is 0");
  TORCH_CHECK(directions == 1 || k2 == k1, "k2 must be k1 = ", k1,
              " for two directions, since windows would overlap, got ", k2);
}

// Which of `T` steps' windows a call takes.
template <typename Int>
void check_window_range(const Int& T, int64_t k1, int64_t k2, int64_t first_window,
                        int64_t num_windows) {
  TORCH_CHECK(first_window >= 0 && num_windows >= 0 && (num_windows == 0 || k2 > k1),
              "first_window and num_windows must not be negative, and are for k2 > k1, got ",
              first_window, " and ", num_windows);
  TORCH_CHECK(num_windows > 0 || first_window == 0, "first_window goes with num_windows, got ",
              first_window, " without it");
  if (num_windows == 0) return;
  const Int windows = (T - 1) / k1 + 1;
  TORCH_CHECK(num_windows <= windows && first_window <= windows - num_windows,
              "first_window + num_windows must be at most ", windows, ", got ", first_window,
              " and ", num_windows);
}

// The shape of the layer's output, and of its gradient.
template <typename Int>
std::vector<Int> output_sizes(const Tensor& input, const LayerShapeOf<Int>& shape) {
  std::vector<Int> sizes = sizes_of<Int>(input).vec();
  sizes.back() = shape.D * shape.R;
  return sizes;
}

// What the backward operator takes, but for a grad_output by lane.
template <typename Int = int64_t>
LayerShapeOf<Int> check_backward(const BackwardArguments& args, HalfTypes half_types) {
  const LayerShapeOf<Int> shape = check_layer<Int>(
      args, half_types, first_of({&args.hx, &args.cx, &args.grad_h_n, &args.grad_c_n}));
  const Tensor& input = args.input;
  const int64_t with_c = shape.has_cell_state() ? shape.D : 0;
  check_tensor<Int>(args.output, "output", output_sizes(input, shape), input);
  check_tensor<Int>(args.c, "c", {with_c, shape.N, shape.H}, input);
  check_tensor<Int>(args.gates, "gates",
                    {shape.has_gates(args.gates) ? shape.D : 0, shape.N, shape.S * shape.H}, input);
  if (args.grad_output.has_value() && !args.grad_by_lane) {
    check_tensor<Int>(*args.grad_output, "grad_output", output_sizes(input, shape), input);
  }
  if (args.grad_h_n.has_value()) {
    check_tensor<Int>(*args.grad_h_n, "grad_h_n", {shape.D, shape.B, shape.R}, input);
  }
  if (args.grad_c_n.has_value()) {
    check_tensor<Int>(*args.grad_c_n, "grad_c_n", {with_c, shape.B, shape.H}, input);
  }
  check_windows(shape.D, args.k1, args.k2, args.last_only);
  check_window_range(shape.T, args.k1, args.k2, args.first_window, args.num_windows);
  check_rows<Int>(args.kappa, "kappa", input.scalar_type(), input);
  if (args.mask.has_value()) check_tensor<Int>(*args.mask, "mask", sizes_of<Int>(input), input);
  TORCH_CHECK(args.k2 > args.k1 || !(args.grad_by_lane || args.input_by_lane),
              "grad_by_lane and input_by_lane are for overlapping windows, k2 > k1");
  TORCH_CHECK(args.grad_by_lane || !args.grad_network.has_value(),
              "grad_network goes with grad_by_lane, got it without");
  if (args.grad_network.has_value()) {
    check_tensor<Int>(*args.grad_network, "grad_network", output_sizes(input, shape), input);
  }
  TORCH_CHECK(args.needs.size() == 4, "needs must hold 4 flags (input, hx, cx, weights), got ",
              args.needs.size());
  TORCH_CHECK(!args.needs[1] || args.hx.has_value(),
              "needs asks for the gradient of hx, which is absent");
  TORCH_CHECK(!args.needs[2] || args.cx.has_value(),
              "needs asks for the gradient of cx, which is absent");
  return shape;
}

// A grad_output by lane has a row for each of `lane_rows` (step, lane).
template <typename Int>
void check_grad_by_lane(const BackwardArguments& args, const LayerShapeOf<Int>& shape,
                        const Int& lane_rows) {
  if (!args.grad_by_lane || !args.grad_output.has_value()) return;
  check_tensor<Int>(*args.grad_output, "grad_output", {lane_rows, shape.R}, args.input);
}

}  // namespace fastbptt
