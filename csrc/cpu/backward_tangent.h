// One direction's gradients of the pre-activations and their tangents, step by step: the backward pass in
// dual numbers,
//
//   lambda_t = g_t + d_{t+1} W_hh + carry,  d_t = the cell's derivative of it,
//
// where the tangent of the product is d'_{t+1} W_hh + d_{t+1} W_hh'. With W_hh' packed below W_hh that
// is one product of d' and d side by side, and the product itself that of d with the upper part. Or
// without tangents, in ordinary numbers.
#pragma once

#include "cpu/tangent_steps.h"

namespace fastbptt {
namespace {

template <typename Cell, typename scalar_t>
struct BackwardTangent {
  using Params = BackwardTangentParams<scalar_t>;
  using V = Vec<scalar_t>;
  static constexpr int W = kLanes<scalar_t>;
  static constexpr int G = Cell::kGates, C = Cell::kColumns, S = Cell::kSaved;
  static constexpr int kOneBlock[] = {0};

  const Params& p;
  Packed<scalar_t> w_hh, w_hr;
  int64_t
      values;  // how many numbers of d a step hands on: of each, first their tangents, then they
  scalar_t* d_step[2];  // [num_lanes, stride], of two steps in turn
  int64_t stride;
  scalar_t* projected;  // [num_lanes, projected_stride] likewise the projected state's gradient
  int64_t projected_stride;
  scalar_t* product;  // [num_lanes, product_stride] the values' own
  int64_t product_stride;
  scalar_t *carry, *carry_t;  // [num_lanes, wide_stride]
  int64_t wide_stride;
  int64_t bytes;

  BackwardTangent(const Params& params, Arena arena, Split split) : p(params) {
    values = G * p.H;
    const int64_t with_tangents = 1 + p.has_tangents, with_weights = 1 + p.weights_too;
    stride = padded_stride<scalar_t>(with_tangents * values);
    projected_stride = padded_stride<scalar_t>(with_tangents * p.R);
    wide_stride = padded_stride<scalar_t>(p.H);
    product_stride = padded_stride<scalar_t>(max(p.R, p.H));
    w_hh = arena.take_packed<scalar_t>(with_weights * values, p.R, 1,
                                       panel_vecs_for<scalar_t>(p.R, 1, split));
    w_hr = arena.take_packed<scalar_t>(with_weights * p.R, p.w_hr ? p.H : 0, 1,
                                       panel_vecs_for<scalar_t>(p.H, 1, split));
    for (scalar_t*& d : d_step) d = arena.take<scalar_t>(p.num_lanes * stride);
    projected = arena.take<scalar_t>(p.w_hr ? p.num_lanes * projected_stride : 0);
    product = arena.take<scalar_t>(p.has_tangents ? p.num_lanes * product_stride : 0);
    carry = arena.take<scalar_t>(Cell::kHasCarry ? p.num_lanes * wide_stride : 0);
    carry_t =
        arena.take<scalar_t>(Cell::kHasCarry && p.has_tangents ? p.num_lanes * wide_stride : 0);
    bytes = arena.used;
  }

  static StepWork work_of(const Params& p) {
    return work_of_step(p, (1 + p.has_tangents + p.weights_too) * G * p.H, p.R, 1);
  }

  void pack(const Worker& worker) const {
    pack_direct(w_hh, p.w_hh, 1, kOneBlock, share(w_hh.panels(), worker.id, worker.count));
    if (!p.w_hr) return;
    pack_direct(w_hr, p.w_hr, 1, kOneBlock, share(w_hr.panels(), worker.id, worker.count));
  }

  void run_steps(const std::vector<Share>& shares, Parts parts, int64_t k, int64_t end) const {
    p.has_tangents ? run_steps_of<Dual<V>>(shares, parts, k, end)
                   : run_steps_of<V>(shares, parts, k, end);
  }

  // What the recurrence carries beyond the first steps.
  void finish(const Share& mine) const {
    if (!p.d_hx) return;
    p.has_tangents ? finish_initial_states<Dual<V>>(mine) : finish_initial_states<V>(mine);
  }

 private:
  // A number, which without tangents is a value alone.
  template <typename X>
  static X number(V value, V tangent) {
    if constexpr (std::is_same_v<X, V>) {
      return value;
    } else {
      return {value, tangent};
    }
  }
  template <typename X, typename Count>
  static X load_number(const scalar_t* value, const scalar_t* tangent, int64_t unit, Count count) {
    return number<X>(load_or_zero(value, unit, count), load_or_zero(tangent, unit, count));
  }
  template <typename X, typename Count>
  static void store_number(scalar_t* value, scalar_t* tangent, X x, Count count) {
    if constexpr (std::is_same_v<X, V>) {
      store_first(value, x, count);
    } else {
      store_first(value, x.value, count);
      store_first(tangent, x.tangent, count);
    }
  }
  template <typename X>
  static X through_gate(scalar_t gate, X x) {
    if constexpr (std::is_same_v<X, V>) {
      return through(gate, x);
    } else {
      return {through(gate, x.value), through(gate, x.tangent)};
    }
  }
  static const scalar_t* row_or_null(const scalar_t* rows, int64_t row, int64_t columns) {
    return rows ? rows + row * columns : nullptr;
  }

  // What a step needs to know of a lane, for all of its units.
  struct Row {
    int64_t row, index, batch;
    scalar_t gate;  // on what came from the step after this one
    bool ends;      // there is none
    scalar_t* d_step;
  };

  Row row_of(const Share& mine, int64_t i, int64_t s) const {
    const Lane& lane = mine.lane(i);
    const int64_t index = mine.index(i);
    return {row_at(p, lane, s),  index,
            lane.batch,          gate_after(p, lane, s),
            s + 1 == lane.steps, d_step[s % 2] + index * stride};
  }

  // The products of `from`, [lanes, ld], where `size` tangents lie before as many values, with some
  // panels of w: hands fn(row, unit, count, number) each, and its row's Row.
  template <typename X, typename Fn>
  void multiply(const Share& mine, Range panels, const Packed<scalar_t>& w, const scalar_t* from,
                int64_t ld, int64_t size, int64_t first, int64_t last, bool is_zero,
                Fn&& fn) const {
    const int64_t lane_ld = ld * mine.lane_step;
    from += is_zero ? 0 : mine.first_lane * ld;
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      if constexpr (std::is_same_v<X, V>) {
        panel_product(from, lane_ld, w, panel, is_zero ? 0 : size, first, last,
                      [&](int64_t i, const scalar_t* acc) {
                        for_each_unit_vec(w, panel, [&](int64_t v, int64_t unit, auto count) {
                          fn(i, unit, count, load(acc + v * W));
                        });
                      });
      } else {
        const auto own = [&](int64_t i) { return product + mine.index(i) * product_stride; };
        panel_product(from + (is_zero ? 0 : size), lane_ld, w, panel, is_zero ? 0 : size, first,
                      last, [&](int64_t i, const scalar_t* acc) {
                        for_each_unit_vec(w, panel, [&](int64_t v, int64_t unit, auto) {
                          store(own(i) + unit, load(acc + v * W));
                        });
                      });
        panel_product(from, lane_ld, w, panel, is_zero ? 0 : w.K, first, last,
                      [&](int64_t i, const scalar_t* acc) {
                        for_each_unit_vec(w, panel, [&](int64_t v, int64_t unit, auto count) {
                          fn(i, unit, count, X{load(own(i) + unit), load(acc + v * W)});
                        });
                      });
      }
    }
  }

  template <typename X>
  void run_steps_of(const std::vector<Share>& shares, Parts parts, int64_t k, int64_t end) const {
    for (; k < end; ++k) {
      const int64_t s = p.lanes[0].steps - 1 - k;
      for_each_share(shares, parts, [&](const Share& mine) { take_step<X>(mine, s); });
      if (!p.w_hr) continue;
      for_each_share(shares, parts, [&](const Share& mine) { project_step<X>(mine, s); });
    }
  }

  template <typename X>
  void take_step(const Share& mine, int64_t s) const {
    const int64_t entered = mine.active_at(s + 1), active = mine.active_at(s);
    mine.group.await();
    const auto run = [&](int64_t begin, int64_t end, bool is_zero) {
      for_each_row_group<Row>(
          begin, end, [&](int64_t i) { return row_of(mine, i, s); },
          [&](int64_t first, int64_t last, const Row* rows) {
            multiply<X>(mine, mine.panels, w_hh, d_step[(s + 1) % 2], stride, values, first, last,
                        is_zero, [&](int64_t i, int64_t unit, auto count, X from_after) {
                          finish_state(rows[i - first], unit, count, from_after);
                        });
          });
    };
    run(0, entered, false);
    if (entered < active) run(entered, active, true);
    mine.group.arrive();
  }

  template <typename X>
  void project_step(const Share& mine, int64_t s) const {
    mine.group.await();
    for_each_row_group<Row>(
        0, mine.active_at(s), [&](int64_t i) { return row_of(mine, i, s); },
        [&](int64_t first, int64_t last, const Row* rows) {
          multiply<X>(mine, mine.projected, w_hr, projected, projected_stride, p.R, first, last,
                      false, [&](int64_t i, int64_t unit, auto count, X dh) {
                        finish_units(rows[i - first], unit, count, dh);
                      });
        });
    mine.group.arrive();
  }

  // The gradient of the state, of what came from the step after it and what the loss adds.
  template <typename X, typename Count>
  void finish_state(const Row& row, int64_t unit, Count count, X from_after) const {
    X dh = through_gate(row.gate, from_after);
    dh += load_number<X>(p.d_output.at(row.row), p.d_output_t.at(row.row), unit, count);
    if (row.ends) {
      dh += load_number<X>(row_or_null(p.d_h_n, row.batch, p.R),
                           row_or_null(p.d_h_n_t, row.batch, p.R), unit, count);
    }
    if (!p.w_hr) return finish_units(row, unit, count, dh);
    const int64_t column = row.row * p.R + unit;
    store_number(p.d_projected + column, p.d_projected_t + column, dh, count);
    scalar_t* const to = projected + row.index * projected_stride + unit;
    store_number(to + p.has_tangents * p.R, to, dh, count);
  }

  // The cell's derivative for some units, given the gradient dh of its state.
  template <typename X, typename Count>
  void finish_units(const Row& row, int64_t unit, Count count, X dh) const {
    X d[C];
    if constexpr (S == 0) {
      const X h = load_number<X>(p.output.at(row.row), p.output_t.at(row.row), unit, count);
      for_phi<Cell>(p.kind, [&](auto cell) { cell.backward(dh, h, d); });
    } else {
      const auto of_unit = [&](const scalar_t* values, const scalar_t* tangents) {
        return load_number<X>(row_or_null(values, row.row, p.H),
                              row_or_null(tangents, row.row, p.H), unit, count);
      };
      X saved[S], to_before{}, from_after{};
      for (int k = 0; k < S; ++k) {
        saved[k] = load_number<X>(p.gates + row.row * S * p.H,
                                  row_or_null(p.gates_t, row.row, S * p.H), k * p.H + unit, count);
      }
      scalar_t *const own = carry + row.index * wide_stride + unit, *const own_t =
                                                                        carry_t +
                                                                        row.index * wide_stride +
                                                                        unit;
      const X before = of_unit(p.before, p.before_t);
      if (!row.ends) from_after = through_gate(row.gate, load_carry<X>(own, own_t));
      if constexpr (Cell::kHasCellState) {
        if (row.ends) {
          from_after = load_number<X>(row_or_null(p.d_c_n, row.batch, p.H),
                                      row_or_null(p.d_c_n_t, row.batch, p.H), unit, count);
        }
        Cell::backward(dh, from_after, saved, before, of_unit(p.c, p.c_t), d, &to_before);
      } else {
        Cell::backward(dh + from_after, saved, before, d, &to_before);
      }
      store_number(own, own_t, to_before, Whole<W>());
    }
    for (int j = 0; j < C; ++j) {
      const int64_t column = (row.row * C + j) * p.H + unit;
      store_number(p.d + column, p.d_t + column, d[j], count);
    }
    for (int g = 0; g < G; ++g) {
      scalar_t* const to = row.d_step + g * p.H + unit;
      store_number(to + p.has_tangents * values, to, d[Cell::kFirstRecurrent + g], count);
    }
  }

  template <typename X>
  static X load_carry(const scalar_t* value, const scalar_t* tangent) {
    if constexpr (std::is_same_v<X, V>) {
      return load(value);
    } else {
      return {load(value), load(tangent)};
    }
  }

  template <typename X>
  void finish_initial_states(const Share& mine) const {
    multiply<X>(mine, mine.panels, w_hh, d_step[0], stride, values, 0, mine.num_lanes, false,
                [&](int64_t i, int64_t unit, auto count, X dh) {
                  const Lane& lane = mine.lane(i);
                  if constexpr (Cell::kHasCarry && !Cell::kHasCellState) {
                    const int64_t own = mine.index(i) * wide_stride + unit;
                    dh += load_carry<X>(carry + own, carry_t + own);
                  }
                  const int64_t column = lane.batch * p.R + unit;
                  store_number(p.d_hx + column, p.d_hx_t + column,
                               through_gate(gate_before(p, lane), dh), count);
                });
    if constexpr (!Cell::kHasCellState) return;
    const Packed<scalar_t>& units = p.w_hr ? w_hr : w_hh;
    const Range panels = p.w_hr ? mine.projected : mine.panels;
    for (int64_t i = 0; i < mine.num_lanes; ++i) {
      const Lane& lane = mine.lane(i);
      for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
        for_each_unit_vec(units, panel, [&](int64_t, int64_t unit, auto count) {
          const int64_t own = mine.index(i) * wide_stride + unit, column = lane.batch * p.H + unit;
          const X c = load_carry<X>(carry + own, carry_t + own);
          store_number(p.d_cx + column, p.d_cx_t + column, through_gate(gate_before(p, lane), c),
                       count);
        });
      }
    }
  }
};

}  // namespace
}  // namespace fastbptt
