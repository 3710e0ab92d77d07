// A layer's tensors as its tangents need them: all steps' rows at once, and the states that enter them.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <vector>

#include "tangent_call.h"
#include "tensors.h"

namespace fastbptt {
namespace {

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

inline Tensor undefined_or(const OptionalTensor& tensor) { return tensor.value_or(Tensor()); }

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

inline DirectionWeights weights_of(const LayerShape& shape, at::TensorList weights, int64_t d) {
  return {shape, d, [&](int64_t i) { return weights[i]; }};
}
inline DirectionWeights weights_of(const LayerShape& shape, const OptionalTensorList& weights,
                                   int64_t d) {
  return {shape, d,
          [&](int64_t i) { return weights.empty() ? Tensor() : undefined_or(weights.get(i)); }};
}

// Of a [D, ...] tensor, or undefined.
inline Tensor of_direction(const OptionalTensor& tensor, int64_t d) {
  return tensor.has_value() && tensor->size(0) > 0 ? tensor->select(0, d) : Tensor();
}
inline OptionalTensor optional(const Tensor& tensor) {
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

  Direction(const LayerRows& rows, const OptionalTensorList& weights_t, int64_t d)
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

// Puts what the directions gave side by side, in the shape of `like`.
inline Tensor side_by_side(const std::vector<Tensor>& parts, c10::IntArrayRef sizes) {
  return (parts.size() == 1 ? parts[0] : at::cat(parts, 1)).view(sizes);
}
inline Tensor stacked(const std::vector<Tensor>& parts) {
  return parts.size() == 1 ? parts[0].unsqueeze(0) : at::stack(parts);
}

}  // namespace
}  // namespace fastbptt
