// Tangents of a layer's passes, on any device: the products for all steps at once by torch, and between
// them what only goes step by step (tangents.h). With F a layer and G its backward pass, rnn_jvp is the
// derivative of F along given tangents, rnn_bwd_jvp that of G: of them follow forward mode and, since the
// gradients of <u, G> are the tangents of F and of G along u, the derivative of the backward pass.
//
//   forward   pre' = x' W_ih^T + x W_ih'^T + h W_hh'^T + b', steps
//   backward  steps, dx' = d' W_ih + d W_ih', dW' = d'^T x + d^T x' and likewise of the others
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "checks.h"
#include "tangents.h"
#include "tensors.h"

namespace fastbptt {
namespace {

using OptionalTensors = c10::List<OptionalTensor>;
using ForwardTuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using BackwardTuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

const auto& forward_steps() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastbptt::rnn_jvp_steps", "")
          .typed<ForwardTuple(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                              const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&,
                              const Tensor&, const OptionalTensor&, const Tensor&,
                              const OptionalTensor&, const OptionalTensor&, int64_t, bool, bool,
                              c10::string_view)>();
  return op;
}

const auto& backward_steps() {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fastbptt::rnn_bwd_jvp_steps", "")
          .typed<BackwardTuple(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                               const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                               const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                               const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                               const OptionalTensor&, const OptionalTensor&, const Tensor&,
                               const OptionalTensor&, bool, const OptionalTensor&, int64_t, bool,
                               bool, c10::string_view)>();
  return op;
}

// Below autograd, and without autocast, which would round.
struct PlainTorch {
  at::AutoDispatchBelowAutograd autograd;
  c10::impl::ExcludeDispatchKeyGuard autocast{c10::autocast_dispatch_keyset};
};

// A sum of products, the first of which fills it.
class Products {
 public:
  explicit Products(Tensor sum) : sum_(std::move(sum)) {}

  // Adds a b, where both are there.
  void add(const Tensor& a, const Tensor& b) {
    if (!a.defined() || !b.defined()) return;
    is_filled_ ? sum_.addmm_(a, b) : at::mm_out(sum_, a, b);
    is_filled_ = true;
  }
  Tensor get() {
    if (!is_filled_) sum_.zero_();
    return sum_;
  }

 private:
  Tensor sum_;
  bool is_filled_ = false;
};

// What an operator is given of the layer itself.
struct LayerCall {
  const Tensor &input, &output, &c, &gates;
  const OptionalTensor &hx, &cx;
  at::TensorList weights;
  bool has_biases;
  const OptionalTensor& batch_sizes;
  bool batch_first;
  c10::string_view cell;
  int64_t k1;
  const OptionalTensor &resets, &kappa;
};

struct LayerTangents {
  const OptionalTensor &input, &hx, &cx;
  const OptionalTensors& weights;
};

Tensor undefined_or(const OptionalTensor& tensor) { return tensor.value_or(Tensor()); }

// A layer's tensors with a row for each step of each sequence, and the states that enter steps.
struct LayerRows {
  const LayerCall& call;
  const LayerShape& shape;
  const OwnedLayout layout;
  Tensor input;   // [N, I]
  Tensor resets;  // bool [N], or undefined
  Tensor gate;    // [N], or undefined

  LayerRows(const LayerCall& call, const LayerShape& shape)
      : call(call),
        shape(shape),
        layout(shape.T, shape.B, shape.N, call.batch_first, call.batch_sizes),
        input(rows(call.input)) {
    if (call.resets.has_value()) resets = call.resets->reshape({shape.N});
    make_gate();
  }

  // [..., K] like the input, as [N, K].
  Tensor rows(const Tensor& tensor) const {
    return tensor.contiguous().view({shape.N, tensor.size(-1)});
  }
  Tensor rows(const OptionalTensor& tensor) const {
    return tensor.has_value() ? rows(*tensor) : Tensor();
  }
  // The direction's part of [..., D*R].
  Tensor output_rows(const OptionalTensor& tensor, int64_t d) const {
    if (!tensor.has_value()) return {};
    const Tensor all = rows(*tensor);
    return shape.D == 1 ? all : all.narrow(1, d * shape.R, shape.R);
  }

  // What rows [N, K] hold of the step before each, in the direction of the recurrence, and
  // `initial` [B, K] of the first, or zeros.
  Tensor before(const Tensor& rows, const Tensor& initial, bool reverse) const {
    const int64_t T = shape.T, B = shape.B, K = rows.size(1);
    const Tensor first = initial.defined() ? initial : at::zeros({B, K}, rows.options());
    if (layout.layout.offsets) {
      return at::cat({rows, first}).index_select(0, reverse ? index_after() : index_before());
    }
    const int64_t time = call.batch_first ? 1 : 0;
    const Tensor steps = call.batch_first ? rows.view({B, T, K}) : rows.view({T, B, K});
    const Tensor others = steps.narrow(time, reverse ? 1 : 0, T - 1), edge = first.unsqueeze(time);
    const Tensor shifted = reverse ? at::cat({others, edge}, time) : at::cat({edge, others}, time);
    return shifted.view({shape.N, K});
  }

  // The states that entered the steps, zeros after resets.
  Tensor states_before(const Tensor& rows, const Tensor& initial, int64_t d) const {
    Tensor states = before(rows, initial, d == 1);
    if (resets.defined()) states.masked_fill_(crossed(resets, false, d), 0);
    return states;
  }
  // Their tangents.
  Tensor tangents_before(const Tensor& rows, const Tensor& initial, int64_t d) const {
    Tensor tangents = before(rows, initial, d == 1);
    if (!gate.defined()) return tangents;
    const Tensor crossing = crossed(gate, 1, d);
    return tangents.mul_(crossing).masked_fill_(crossing == 0, 0);
  }

 private:
  // The boundary's value that a state crosses on its way into each step, [N, 1]: it belongs to the
  // later step in time, and the reverse direction begins with none.
  Tensor crossed(const Tensor& of_rows, double none, int64_t d) const {
    const Tensor column = of_rows.unsqueeze(1);
    if (d == 0) return column;
    return before(column, at::full({shape.B, 1}, none, column.options()), true);
  }

  // What crosses boundaries is multiplied by: kappa, and 0 for resets and where windows begin.
  void make_gate() {
    const bool has_windows = call.k1 > 0 && call.k1 < shape.T;
    if (!call.kappa.has_value() && !resets.defined() && !has_windows) return;
    gate = call.kappa.has_value() ? call.kappa->reshape({shape.N}).clone()
                                  : at::ones({shape.N}, call.input.options());
    if (resets.defined()) gate.masked_fill_(resets, 0);
    if (!has_windows) return;
    if (layout.layout.offsets) {
      for (int64_t t = call.k1; t < shape.T; t += call.k1) {
        gate.narrow(0, layout.offsets[t], layout.layout.batch_sizes[t]).zero_();
      }
      return;
    }
    Tensor steps =
        call.batch_first ? gate.view({shape.B, shape.T}).t() : gate.view({shape.T, shape.B});
    steps.slice(0, call.k1, std::nullopt, call.k1).zero_();
  }

  // Rows of the steps before and after each; N + b where there is none.
  Tensor index_before() const {
    return make_index(
        [&](int64_t t, int64_t b) { return t > 0 ? layout.offsets[t - 1] + b : shape.N + b; });
  }
  Tensor index_after() const {
    return make_index([&](int64_t t, int64_t b) {
      const bool is_there = t + 1 < shape.T && b < layout.layout.batch_sizes[t + 1];
      return is_there ? layout.offsets[t + 1] + b : shape.N + b;
    });
  }
  template <typename RowOf>
  Tensor make_index(RowOf&& row_of) const {
    const Tensor index = at::empty({shape.N}, at::kLong);
    int64_t* to = index.mutable_data_ptr<int64_t>();
    for (int64_t t = 0; t < shape.T; ++t) {
      for (int64_t b = 0; b < layout.layout.batch_sizes[t]; ++b) *to++ = row_of(t, b);
    }
    return index.to(call.input.device());
  }
};

// A direction's weights, or what stands for them; undefined where there are none.
struct DirectionWeights {
  Tensor w_ih, w_hh, b_ih, b_hh, w_hr;

  template <typename At>
  DirectionWeights(const LayerShape& shape, int64_t d, At&& at) {
    const int64_t first = d * shape.weights_per_direction();
    w_ih = at(first);
    w_hh = at(first + 1);
    if (shape.has_biases) {
      b_ih = at(first + 2);
      b_hh = at(first + 3);
    }
    if (shape.has_projection) w_hr = at(first + (shape.has_biases ? 4 : 2));
  }
};

DirectionWeights weights_of(const LayerShape& shape, at::TensorList weights, int64_t d) {
  return {shape, d, [&](int64_t i) { return weights[i]; }};
}
DirectionWeights weights_of(const LayerShape& shape, const OptionalTensors& weights, int64_t d) {
  return {shape, d,
          [&](int64_t i) { return weights.empty() ? Tensor() : undefined_or(weights.get(i)); }};
}

// Of a [D, ...] tensor, or undefined.
Tensor of_direction(const OptionalTensor& tensor, int64_t d) {
  return tensor.has_value() && tensor->size(0) > 0 ? tensor->select(0, d) : Tensor();
}
OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// One direction: its primal tensors, and how d's columns lie.
struct Direction {
  const LayerRows& rows;
  const LayerShape& shape;
  const int64_t d;
  const DirectionWeights weights, weights_t;
  const Tensor output, c, gates, hx;
  Tensor before;    // [N, H] LSTM's c, GRU's h, as the steps take it; else no rows
  Tensor h_before;  // [N, R], made where it is needed
  const int64_t in_columns, rec_columns,
      columns;  // of W_ih's and W_hh's part, and where the latter begins

  Direction(const LayerRows& rows, const OptionalTensors& weights_t, int64_t d)
      : rows(rows),
        shape(rows.shape),
        d(d),
        weights(weights_of(shape, rows.call.weights, d)),
        weights_t(weights_of(shape, weights_t, d)),
        output(rows.output_rows(rows.call.output, d)),
        c(shape.has_cell_state() ? rows.call.c[d] : at::empty({0, shape.H}, options())),
        gates(shape.S > 0 ? rows.call.gates[d] : at::empty({0, 0}, options())),
        hx(of_direction(rows.call.hx, d)),
        in_columns(shape.G * shape.H),
        rec_columns(is_gru() ? shape.H : 0),
        columns(in_columns + rec_columns) {
    if (shape.has_cell_state()) {
      before = rows.states_before(c, of_direction(rows.call.cx, d), d);
    } else {
      before = is_gru() ? state_before() : at::empty({0, shape.H}, options());
    }
  }

  bool is_gru() const { return shape.cell == CellKind::kGru; }
  at::TensorOptions options() const { return rows.call.input.options(); }

  // h as it entered each step.
  Tensor state_before() {
    if (!h_before.defined()) h_before = rows.states_before(output, hx, d);
    return h_before;
  }

  // The columns of d, or of pre, that belong to W_ih and to W_hh.
  Tensor in(const Tensor& d) const { return d.defined() ? d.narrow(-1, 0, in_columns) : d; }
  Tensor rec(const Tensor& d) const {
    return d.defined() ? d.narrow(-1, rec_columns, in_columns) : d;
  }
  // W_ih, or its bias, with its rows in the order of d's columns: GRU's n comes first there.
  Tensor in_column_order(const Tensor& of_input) const {
    return is_gru() && of_input.defined() ? of_input.roll(shape.H, 0) : of_input;
  }
  Tensor in_gate_order(const Tensor& of_columns, int64_t dim = 0) const {
    return is_gru() ? of_columns.roll(-shape.H, dim) : of_columns;
  }

  // LSTM's state before the projection, o tanh(c), and its tangent.
  Tensor unprojected() const { return output_gate(gates) * c.tanh(); }
  Tensor unprojected_tangent(const Tensor& gates_t, const Tensor& c_t) const {
    const Tensor tanh_c = c.tanh();
    return output_gate(gates_t) * tanh_c + output_gate(gates) * (1 - tanh_c * tanh_c) * c_t;
  }

 private:
  Tensor output_gate(const Tensor& of_gates) const {
    return of_gates.narrow(1, 3 * shape.H, shape.H);
  }
};

// What a primal call must be, on any device. The kernels assume.
LayerShape check_call(const LayerCall& call) {
  const c10::List<bool> needs({false, false, false, false});
  const OptionalTensor none;
  const BackwardArguments args{{call.input, call.hx, call.cx, call.weights, call.has_biases,
                                call.batch_sizes, call.batch_first, call.cell, call.resets},
                               none,
                               none,
                               none,
                               call.output,
                               call.c,
                               call.gates,
                               needs,
                               call.k1,
                               call.k1,
                               false,
                               call.kappa,
                               none,
                               0,
                               0,
                               false,
                               false,
                               none};
  const LayerShape shape = check_backward(args, HalfTypes::kNone);
  TORCH_CHECK(shape.S == 0 || shape.has_gates(call.gates) || shape.N == 0,
              "gates must be kept, got none");
  return shape;
}

void check_like(const OptionalTensor& tensor, const std::string& name, const Tensor& like) {
  if (tensor.has_value()) check_tensor<int64_t>(*tensor, name, like.sizes(), like);
}

void check_tangents(const LayerCall& call, const LayerShape& shape, const LayerTangents& t) {
  const Tensor& input = call.input;
  check_like(t.input, "input_t", input);
  if (t.hx.has_value()) check_tensor<int64_t>(*t.hx, "hx_t", {shape.D, shape.B, shape.R}, input);
  if (t.cx.has_value()) {
    TORCH_CHECK(shape.has_cell_state(), "cx_t is for an LSTM only, and cell is \"", call.cell,
                "\"");
    check_tensor<int64_t>(*t.cx, "cx_t", {shape.D, shape.B, shape.H}, input);
  }
  TORCH_CHECK(t.weights.empty() || t.weights.size() == call.weights.size(),
              "weights_t must be empty or hold one for each of ", call.weights.size(),
              " weights, got ", t.weights.size());
  for (size_t i = 0; i < t.weights.size(); ++i) {
    check_like(t.weights.get(i), "weights_t[" + std::to_string(i) + "]", call.weights[i]);
  }
}

void check_gradients(const LayerCall& call, const LayerShape& shape, const std::string& suffix,
                     const OptionalTensor& output, const OptionalTensor& h_n,
                     const OptionalTensor& c_n) {
  const int64_t with_c = shape.has_cell_state() ? shape.D : 0;
  check_like(output, "grad_output" + suffix, call.output);
  if (h_n.has_value()) {
    check_tensor<int64_t>(*h_n, "grad_h_n" + suffix, {shape.D, shape.B, shape.R}, call.input);
  }
  if (c_n.has_value()) {
    check_tensor<int64_t>(*c_n, "grad_c_n" + suffix, {with_c, shape.B, shape.H}, call.input);
  }
}

// Puts what the directions gave side by side, in the shape of `like`.
Tensor side_by_side(const std::vector<Tensor>& parts, c10::IntArrayRef sizes) {
  return (parts.size() == 1 ? parts[0] : at::cat(parts, 1)).view(sizes);
}
Tensor stacked(const std::vector<Tensor>& parts) {
  return parts.size() == 1 ? parts[0].unsqueeze(0) : at::stack(parts);
}

// The tangents of pre-activations as far as what they depend on is known, [N, C*H].
Tensor known_pre_activations(Direction& direction, const Tensor& input_t) {
  const DirectionWeights &w = direction.weights, &w_t = direction.weights_t;
  const auto transposed = [](const Tensor& weight) {
    return weight.defined() ? weight.t() : weight;
  };
  Tensor pre = at::empty({direction.shape.N, direction.columns}, direction.options());
  Products in(direction.in(pre));
  in.add(input_t, transposed(direction.in_column_order(w.w_ih)));
  in.add(direction.rows.input, transposed(direction.in_column_order(w_t.w_ih)));
  in.get();
  if (direction.rec_columns > 0) {
    direction.rec(pre)
        .narrow(1, direction.in_columns - direction.rec_columns, direction.rec_columns)
        .zero_();
  }
  if (w_t.w_hh.defined()) direction.rec(pre).addmm_(direction.state_before(), w_t.w_hh.t());
  if (w_t.b_ih.defined()) direction.in(pre).add_(direction.in_column_order(w_t.b_ih));
  if (w_t.b_hh.defined()) direction.rec(pre).add_(w_t.b_hh);
  return pre;
}

ForwardTuple rnn_jvp(const Tensor& input, const Tensor& output, const Tensor& c,
                     const Tensor& gates, const OptionalTensor& hx, const OptionalTensor& cx,
                     at::TensorList weights, const OptionalTensor& input_t,
                     const OptionalTensor& hx_t, const OptionalTensor& cx_t,
                     const OptionalTensors& weights_t, bool has_biases,
                     const OptionalTensor& batch_sizes, bool batch_first, c10::string_view cell,
                     int64_t k1, const OptionalTensor& resets, const OptionalTensor& kappa) {
  const LayerCall call{input,      output,      c,           gates, hx, cx,     weights,
                       has_biases, batch_sizes, batch_first, cell,  k1, resets, kappa};
  const LayerShape shape = check_call(call);
  check_tangents(call, shape, {input_t, hx_t, cx_t, weights_t});
  const PlainTorch guard;
  if (shape.N == 0) {
    const int64_t with_c = shape.has_cell_state() ? shape.D : 0;
    return {at::zeros_like(output), at::zeros({shape.D, 0, shape.R}, input.options()),
            at::zeros({with_c, 0, shape.H}, input.options()), at::zeros_like(c),
            at::zeros_like(gates)};
  }
  const LayerRows rows(call, shape);
  const Tensor input_rows = rows.rows(input_t);
  std::vector<Tensor> output_t, h_n_t, c_n_t, c_t, gates_t;
  for (int64_t d = 0; d < shape.D; ++d) {
    Direction direction(rows, weights_t, d);
    const Tensor pre = known_pre_activations(direction, input_rows);
    Tensor projected;
    if (direction.weights_t.w_hr.defined()) {
      projected = at::mm(direction.unprojected(), direction.weights_t.w_hr.t());
    }
    const auto [out, each_c, each_gates, h_n, c_n] = forward_steps().call(
        pre, optional(projected), optional(of_direction(hx_t, d)), optional(of_direction(cx_t, d)),
        direction.output, direction.c, direction.gates, direction.before, optional(rows.gate),
        direction.weights.w_hh, optional(direction.weights.w_hr), batch_sizes, shape.T, batch_first,
        d == 1, cell);
    output_t.push_back(out);
    c_t.push_back(each_c);
    gates_t.push_back(each_gates);
    h_n_t.push_back(h_n);
    c_n_t.push_back(c_n);
  }
  const auto of_cell_state = [&](const std::vector<Tensor>& parts, int64_t count) {
    return shape.has_cell_state() ? stacked(parts)
                                  : at::empty({0, count, shape.H}, input.options());
  };
  return {side_by_side(output_t, output.sizes()), stacked(h_n_t), of_cell_state(c_n_t, shape.B),
          of_cell_state(c_t, shape.N), shape.S > 0 ? stacked(gates_t) : at::zeros_like(gates)};
}

// The backward steps of a direction: values, and tangents where `tangents` are there.
struct StepGradients {
  const OptionalTensor &output, &h_n, &c_n;
};
struct KeptTangents {
  const OptionalTensor &output, &c, &gates, &hx, &cx;
};

BackwardTangents run_backward_steps(Direction& direction, const StepGradients& grads,
                                    const StepGradients& grads_t, const KeptTangents* kept_t,
                                    const Tensor& before_t, bool needs_states) {
  const LayerRows& rows = direction.rows;
  const int64_t d = direction.d;
  const DirectionWeights &w = direction.weights, &w_t = direction.weights_t;
  const bool weights_too = w_t.w_hh.defined() || w_t.w_hr.defined();
  const auto with_tangent = [&](const Tensor& weight, const Tensor& tangent) {
    if (!weights_too || !weight.defined()) return weight;
    return at::cat({weight, tangent.defined() ? tangent : at::zeros_like(weight)});
  };
  const auto rows_of = [&](const OptionalTensor& tensor) {
    return optional(rows.output_rows(tensor, d));
  };
  const auto state_of = [&](const OptionalTensor& tensor) {
    return optional(of_direction(tensor, d));
  };
  OptionalTensor output_t, c_t, gates_t;
  if (kept_t) {
    output_t = rows_of(kept_t->output);
    c_t = state_of(kept_t->c);
    gates_t = state_of(kept_t->gates);
  }
  BackwardTangents r;
  std::tie(r.d, r.d_t, r.d_projected, r.d_projected_t, r.d_hx, r.d_hx_t, r.d_cx, r.d_cx_t) =
      backward_steps().call(
          rows_of(grads.output), rows_of(grads_t.output), state_of(grads.h_n),
          state_of(grads_t.h_n), state_of(grads.c_n), state_of(grads_t.c_n), direction.output,
          direction.c, direction.gates, direction.before, output_t, c_t, gates_t,
          optional(before_t), optional(rows.gate), with_tangent(w.w_hh, w_t.w_hh),
          optional(with_tangent(w.w_hr, w_t.w_hr)), needs_states, rows.call.batch_sizes,
          rows.shape.T, rows.call.batch_first, d == 1, rows.call.cell);
  return r;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>> rnn_bwd_jvp(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
    const OptionalTensor& grad_c_n, const OptionalTensor& grad_output_t,
    const OptionalTensor& grad_h_n_t, const OptionalTensor& grad_c_n_t, const Tensor& input,
    const Tensor& output, const Tensor& c, const Tensor& gates, const OptionalTensor& hx,
    const OptionalTensor& cx, at::TensorList weights, const OptionalTensor& input_t,
    const Tensor& output_t, const Tensor& c_t, const Tensor& gates_t, const OptionalTensor& hx_t,
    const OptionalTensor& cx_t, const OptionalTensors& weights_t, bool has_biases,
    const OptionalTensor& batch_sizes, bool batch_first, c10::string_view cell,
    c10::List<bool> needs, int64_t k1, const OptionalTensor& resets, const OptionalTensor& kappa) {
  const LayerCall call{input,      output,      c,           gates, hx, cx,     weights,
                       has_biases, batch_sizes, batch_first, cell,  k1, resets, kappa};
  const LayerShape shape = check_call(call);
  check_tangents(call, shape, {input_t, hx_t, cx_t, weights_t});
  check_gradients(call, shape, "", grad_output, grad_h_n, grad_c_n);
  check_gradients(call, shape, "_t", grad_output_t, grad_h_n_t, grad_c_n_t);
  check_like(output_t, "output_t", output);
  check_like(c_t, "c_t", c);
  check_like(gates_t, "gates_t", gates);
  TORCH_CHECK(needs.size() == 5,
              "needs must hold 5 flags (the gradient of input, and the tangents of those of input, "
              "hx, cx and weights), got ",
              needs.size());
  TORCH_CHECK((!needs[2] || hx.has_value()) && (!needs[3] || cx.has_value()),
              "needs asks for the gradient of a state that is absent");
  const PlainTorch guard;
  const auto options = input.options();
  const auto result = [&](bool needed, c10::IntArrayRef sizes) {
    return needed ? at::zeros(sizes, options) : at::empty({0}, options);
  };
  std::vector<Tensor> d_weights;
  if (shape.N == 0) {
    for (const Tensor& weight : weights) d_weights.push_back(result(needs[4], weight.sizes()));
    return {result(needs[0], input.sizes()), result(needs[1], input.sizes()),
            result(needs[2], {shape.D, 0, shape.R}), result(needs[3], {shape.D, 0, shape.H}),
            d_weights};
  }
  const LayerRows rows(call, shape);
  const Tensor input_rows = rows.rows(input_t);
  const KeptTangents kept_t{output_t, c_t, gates_t, hx_t, cx_t};
  const auto empty_like_input = [&](bool needed) {
    return needed ? at::empty({shape.N, shape.I}, options) : at::empty({0}, options);
  };
  Products d_input(empty_like_input(needs[0])), d_input_t(empty_like_input(needs[1]));
  std::vector<Tensor> d_hx, d_cx;
  for (int64_t d = 0; d < shape.D; ++d) {
    Direction direction(rows, weights_t, d);
    const DirectionWeights &w = direction.weights, &w_t = direction.weights_t;
    const Tensor out_t = rows.output_rows(output_t, d);
    Tensor before_t, h_before_t;
    if (needs[4] || direction.is_gru()) {
      h_before_t = rows.tangents_before(out_t, of_direction(hx_t, d), d);
    }
    if (shape.has_cell_state()) {
      before_t = rows.tangents_before(c_t[d], of_direction(cx_t, d), d);
    } else if (direction.is_gru()) {
      before_t = h_before_t;
    }
    const BackwardTangents r = run_backward_steps(direction, {grad_output, grad_h_n, grad_c_n},
                                                  {grad_output_t, grad_h_n_t, grad_c_n_t}, &kept_t,
                                                  before_t, needs[2] || needs[3]);
    const Tensor d_in = direction.in(r.d), d_in_t = direction.in(r.d_t);
    const Tensor w_ih = direction.in_column_order(w.w_ih),
                 w_ih_t = direction.in_column_order(w_t.w_ih);
    if (needs[0]) d_input.add(d_in, w_ih);
    if (needs[1]) {
      d_input_t.add(d_in_t, w_ih);
      d_input_t.add(d_in, w_ih_t);
    }
    d_hx.push_back(r.d_hx_t);
    d_cx.push_back(r.d_cx_t);
    if (!needs[4]) continue;
    const auto product = [&](const Tensor& weight, const Tensor& a, const Tensor& b_t,
                             const Tensor& a_t, const Tensor& b) {
      Products sum(at::empty_like(weight, at::MemoryFormat::Contiguous));
      sum.add(a_t.t(), b);
      sum.add(a.t(), b_t);
      return sum.get();
    };
    d_weights.push_back(
        direction.in_gate_order(product(w.w_ih, d_in, input_rows, d_in_t, rows.input)));
    d_weights.push_back(product(w.w_hh, direction.rec(r.d), h_before_t, direction.rec(r.d_t),
                                direction.state_before()));
    if (has_biases) {
      const Tensor sums = r.d_t.sum(0);
      d_weights.push_back(direction.in_gate_order(direction.in(sums)));
      d_weights.push_back(direction.rec(sums));
    }
    if (shape.has_projection) {
      d_weights.push_back(
          product(w.w_hr, r.d_projected,
                  direction.unprojected_tangent(of_direction(gates_t, d), of_direction(c_t, d)),
                  r.d_projected_t, direction.unprojected()));
    }
  }
  if (!needs[4]) d_weights.assign(weights.size(), at::empty({0}, options));
  const Tensor nothing = at::empty({0}, options);
  return {needs[0] ? d_input.get().view(input.sizes()) : nothing,
          needs[1] ? d_input_t.get().view(input.sizes()) : nothing,
          needs[2] ? stacked(d_hx) : nothing, needs[3] ? stacked(d_cx) : nothing, d_weights};
}

// Rows [N, K] by group of sequences, [groups, N / groups, K]: sequence i is in group i % groups.
Tensor by_group(const Tensor& of_rows, const LayerRows& rows, int64_t groups) {
  const int64_t K = of_rows.size(1);
  if (rows.call.batch_first) {
    const int64_t B = rows.shape.B / groups, T = rows.shape.T;
    return of_rows.reshape({B, groups, T, K}).transpose(0, 1).reshape({groups, B * T, K});
  }
  return of_rows.reshape({-1, groups, K}).transpose(0, 1);
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> rnn_bwd_apart(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
    const OptionalTensor& grad_c_n, const Tensor& input, const Tensor& output, const Tensor& c,
    const Tensor& gates, const OptionalTensor& hx, const OptionalTensor& cx, at::TensorList weights,
    bool has_biases, const OptionalTensor& batch_sizes, bool batch_first, c10::string_view cell,
    c10::List<bool> needs, int64_t groups, int64_t k1, const OptionalTensor& resets,
    const OptionalTensor& kappa) {
  const LayerCall call{input,      output,      c,           gates, hx, cx,     weights,
                       has_biases, batch_sizes, batch_first, cell,  k1, resets, kappa};
  const LayerShape shape = check_call(call);
  check_gradients(call, shape, "", grad_output, grad_h_n, grad_c_n);
  TORCH_CHECK(groups > 0, "groups must be positive, got ", groups);
  bool are_even = shape.B % groups == 0;
  if (batch_sizes.has_value()) {
    const int64_t* size = batch_sizes->const_data_ptr<int64_t>();
    for (int64_t t = 0; t < shape.T; ++t) are_even = are_even && size[t] % groups == 0;
  }
  TORCH_CHECK(are_even, "each step must have as many sequences of each of ", groups,
              " groups, got a batch of ", shape.B);
  TORCH_CHECK(needs.size() == 4, "needs must hold 4 flags (input, hx, cx, weights), got ",
              needs.size());
  TORCH_CHECK((!needs[1] || hx.has_value()) && (!needs[2] || cx.has_value()),
              "needs asks for the gradient of a state that is absent");
  const PlainTorch guard;
  const auto options = input.options();
  const auto of_groups = [&](const Tensor& weight) {
    std::vector<int64_t> sizes = weight.sizes().vec();
    sizes.insert(sizes.begin(), groups);
    return sizes;
  };
  const Tensor nothing = at::empty({0}, options);
  std::vector<Tensor> d_weights;
  if (shape.N == 0) {
    for (const Tensor& weight : weights) {
      d_weights.push_back(needs[3] ? at::zeros(of_groups(weight), options) : nothing);
    }
    return {needs[0] ? at::zeros_like(input) : nothing,
            needs[1] ? at::zeros({shape.D, 0, shape.R}, options) : nothing,
            needs[2] ? at::zeros({shape.D, 0, shape.H}, options) : nothing, d_weights};
  }
  const LayerRows rows(call, shape);
  Products d_input(needs[0] ? at::empty({shape.N, shape.I}, options) : nothing);
  std::vector<Tensor> d_hx, d_cx;
  const OptionalTensor none;
  const OptionalTensors no_tangents;
  for (int64_t d = 0; d < shape.D; ++d) {
    Direction direction(rows, no_tangents, d);
    const DirectionWeights& w = direction.weights;
    const BackwardTangents r =
        run_backward_steps(direction, {grad_output, grad_h_n, grad_c_n}, {none, none, none},
                           nullptr, Tensor(), needs[1] || needs[2]);
    const Tensor d_in = direction.in(r.d);
    if (needs[0]) d_input.add(d_in, direction.in_column_order(w.w_ih));
    d_hx.push_back(r.d_hx);
    d_cx.push_back(r.d_cx);
    if (!needs[3]) continue;
    const Tensor apart = by_group(r.d, rows, groups);
    const auto product = [&](const Tensor& a, const Tensor& b) {
      return at::bmm(a.transpose(1, 2), by_group(b, rows, groups));
    };
    d_weights.push_back(direction.in_gate_order(product(direction.in(apart), rows.input), 1));
    d_weights.push_back(product(direction.rec(apart), direction.state_before()));
    if (has_biases) {
      const Tensor sums = apart.sum(1);
      d_weights.push_back(direction.in_gate_order(direction.in(sums), 1));
      d_weights.push_back(direction.rec(sums));
    }
    if (shape.has_projection) {
      d_weights.push_back(product(by_group(r.d_projected, rows, groups), direction.unprojected()));
    }
  }
  if (!needs[3]) d_weights.assign(weights.size(), nothing);
  return {needs[0] ? d_input.get().view(input.sizes()) : nothing,
          needs[1] ? stacked(d_hx) : nothing, needs[2] ? stacked(d_cx) : nothing, d_weights};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastbptt, m) {
  m.def(kForwardTangentsSchema);
  m.def(kBackwardTangentsSchema);
  // The tangents of rnn_fwd's results along those given; None is zeros, and weights_t may be empty.
  // output, c, gates: as rnn_fwd gave and kept them. k1, resets, kappa: tangents are cut, or
  // multiplied, where the backward pass cuts or multiplies gradients.
  m.def(
      "rnn_jvp(Tensor input, Tensor output, Tensor c, Tensor gates, Tensor? hx, Tensor? cx, "
      "Tensor[] weights, Tensor? input_t, Tensor? hx_t, Tensor? cx_t, Tensor?[] weights_t, "
      "bool has_biases, Tensor? batch_sizes, bool batch_first, str cell, int k1=0, "
      "Tensor? resets=None, Tensor? kappa=None) "
      "-> (Tensor output_t, Tensor h_n_t, Tensor c_n_t, Tensor c_t, Tensor gates_t)");
  // The gradient of input as rnn_bwd gives it, and the tangents of its results. output_t, c_t,
  // gates_t: as rnn_jvp gave them. needs: the gradient of input, then the tangents of those of input,
  // hx, cx and weights.
  m.def(
      "rnn_bwd_jvp(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, "
      "Tensor? grad_output_t, Tensor? grad_h_n_t, Tensor? grad_c_n_t, Tensor input, "
      "Tensor output, Tensor c, Tensor gates, Tensor? hx, Tensor? cx, Tensor[] weights, "
      "Tensor? input_t, Tensor output_t, Tensor c_t, Tensor gates_t, Tensor? hx_t, Tensor? cx_t, "
      "Tensor?[] weights_t, bool has_biases, Tensor? batch_sizes, bool batch_first, str cell, "
      "bool[] needs, int k1=0, Tensor? resets=None, Tensor? kappa=None) "
      "-> (Tensor d_input, Tensor d_input_t, Tensor d_hx_t, Tensor d_cx_t, Tensor[] d_weights_t)");
  // As rnn_bwd, with a sum for each of `groups` groups of sequences instead of one over all:
  // d_weights [groups, ...]. Sequence i belongs to group i % groups.
  m.def(
      "rnn_bwd_apart(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, "
      "Tensor output, Tensor c, Tensor gates, Tensor? hx, Tensor? cx, Tensor[] weights, "
      "bool has_biases, Tensor? batch_sizes, bool batch_first, str cell, bool[] needs, "
      "int groups, int k1=0, Tensor? resets=None, Tensor? kappa=None) "
      "-> (Tensor d_input, Tensor d_hx, Tensor d_cx, Tensor[] d_weights)");
}

TORCH_LIBRARY_IMPL(fastbptt, CompositeExplicitAutograd, m) {
  m.impl("rnn_jvp", rnn_jvp);
  m.impl("rnn_bwd_jvp", rnn_bwd_jvp);
  m.impl("rnn_bwd_apart", rnn_bwd_apart);
}

TORCH_LIBRARY_IMPL(fastbptt, Autograd, m) {
  for (const char* name :
       {"rnn_jvp_steps", "rnn_bwd_jvp_steps", "rnn_jvp", "rnn_bwd_jvp", "rnn_bwd_apart"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace fastbptt
