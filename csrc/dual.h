// Dual numbers over a value type: a value and its derivative along some direction, its tangent. On
// them the cells' own formulas give their derivatives, forward and backward, without formulas for those.
#pragma once

#include "cells.h"

namespace fastbptt {
namespace {

template <typename V>
struct Dual {
  using scalar_t = typename Bits<V>::scalar_t;

  V value, tangent;

  [[gnu::always_inline]] FASTBPTT_HD friend inline Dual operator+(Dual a, Dual b) {
    return {a.value + b.value, a.tangent + b.tangent};
  }
  [[gnu::always_inline]] FASTBPTT_HD friend inline Dual operator-(Dual a, Dual b) {
    return {a.value - b.value, a.tangent - b.tangent};
  }
  [[gnu::always_inline]] FASTBPTT_HD friend inline Dual operator*(Dual a, Dual b) {
    return {a.value * b.value, a.tangent * b.value + a.value * b.tangent};
  }
  [[gnu::always_inline]] FASTBPTT_HD friend inline Dual operator+(Dual a, int b) {
    return {a.value + Bits<V>::broadcast(scalar_t(b)), a.tangent};
  }
  [[gnu::always_inline]] FASTBPTT_HD friend inline Dual operator-(int a, Dual b) {
    return {Bits<V>::broadcast(scalar_t(a)) - b.value, -b.tangent};
  }
  [[gnu::always_inline]] FASTBPTT_HD friend inline Dual& operator+=(Dual& a, Dual b) {
    return a = a + b;
  }
  [[gnu::always_inline]] FASTBPTT_HD friend inline auto operator<=(Dual a, int b) {
    return a.value <= Bits<V>::broadcast(scalar_t(b));
  }
};

template <typename Flags, typename V>
[[gnu::always_inline]] FASTBPTT_HD inline Dual<V> select(Flags is_so, Dual<V> a, Dual<V> b) {
  return {select(is_so, a.value, b.value), select(is_so, a.tangent, b.tangent)};
}

template <typename V>
[[gnu::always_inline]] FASTBPTT_HD inline Dual<V> tanh(Dual<V> x) {
  const V value = tanh(x.value);
  return {value, (1 - value * value) * x.tangent};
}

// A cell's activations where their values are known: only tangents of pre-activations count.
template <typename V>
struct Replay {
  const V* saved;  // those kept
  V h;             // of the Elman cell

  [[gnu::always_inline]] FASTBPTT_HD Dual<V> sigmoid(int k, Dual<V> pre) const {
    return {saved[k], saved[k] * (1 - saved[k]) * pre.tangent};
  }
  [[gnu::always_inline]] FASTBPTT_HD Dual<V> tanh(int k, Dual<V> pre) const {
    return {saved[k], (1 - saved[k] * saved[k]) * pre.tangent};
  }
  template <typename Phi>
  [[gnu::always_inline]] FASTBPTT_HD Dual<V> phi(Dual<V> pre) const {
    return {h, Phi::derivative(h) * pre.tangent};
  }
};

// The tangents of a cell's step: of its new state, of what it keeps, saved_t, and of LSTM's c. `saved`,
// h and `before` are the step's own values; pre and rec those of tangents, in forward's order.
template <typename Cell, typename V>
[[gnu::always_inline]] FASTBPTT_HD inline V forward_tangent(const V* saved, V h, Dual<V> before,
                                                            const V* pre, const V* rec, V* saved_t,
                                                            V* c_t) {
  constexpr int G = Cell::kGates;
  Dual<V> in[G], recurrent[G], kept[Cell::kSaved + 1], c{};
  for (int g = 0; g < G; ++g) {
    in[g] = {V{}, pre[g]};
    recurrent[g] = {V{}, rec[g]};
  }
  // It takes part as a value, not only through an activation.
  if constexpr (Cell::kRecurrentBias) recurrent[G - 1].value = saved[Cell::kSaved - 1];
  const Replay<V> act{saved, h};
  Dual<V> result;
  if constexpr (Cell::kHasCellState) {
    result = Cell::forward(in, recurrent, before, kept, &c, act);
    *c_t = c.tangent;
  } else {
    result = Cell::forward(in, recurrent, before, kept, act);
  }
  for (int k = 0; k < Cell::kSaved; ++k) saved_t[k] = kept[k].tangent;
  return result.tangent;
}

}  // namespace
}  // namespace fastbptt
