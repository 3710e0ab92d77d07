// What a user's cell is written in, beside what cells.h and the value type have.
#pragma once

#include <cmath>

#include "cpu/vec.h"

namespace fastbptt {
namespace {

template <typename V>
[[gnu::always_inline]] inline V number(double x) {
  return Bits<V>::broadcast(typename Bits<V>::scalar_t(x));
}

// fn of each lane.
template <typename V, typename Fn>
[[gnu::always_inline]] inline V by_lane(V x, Fn&& fn) {
  V result{};
  for (int i = 0; i < int(sizeof(V) / sizeof(x[0])); ++i) result[i] = fn(x[i]);
  return result;
}

template <typename V>
[[gnu::always_inline]] inline V square_root(V x) {
  return by_lane(x, [](auto v) { return std::sqrt(v); });
}
template <typename V>
inline V log_of(V x) {
  return by_lane(x, [](auto v) { return std::log(v); });
}
template <typename V>
inline V log1p_of(V x) {
  return by_lane(x, [](auto v) { return std::log1p(v); });
}
template <typename V>
inline V erf_of(V x) {
  return by_lane(x, [](auto v) { return std::erf(v); });
}
template <typename V>
inline V sine(V x) {
  return by_lane(x, [](auto v) { return std::sin(v); });
}
template <typename V>
inline V cosine(V x) {
  return by_lane(x, [](auto v) { return std::cos(v); });
}
template <typename V>
inline V power_of(V x, double exponent) {
  return by_lane(x, [=](auto v) { return std::pow(v, decltype(v)(exponent)); });
}

// 2^n in two factors, each of which has an exponent where exp(x) has none: so that what overflows
// comes out as infinity, and what is nearly zero is rounded once.
template <typename V>
[[gnu::always_inline]] inline V exp_of(V x) {
  using scalar_t = typename Bits<V>::scalar_t;
  using C = ExpConstants<scalar_t>;
  constexpr scalar_t kBeyond = sizeof(scalar_t) == 4 ? 110 : 760;  // exp is 0 or infinity there
  const V bounded = Bits<V>::copysign(bounded_magnitude(x, kBeyond), x);
  const V n = (bounded * C::kLog2e + C::kRound) - C::kRound;
  const V r = (bounded - n * C::kLn2High) - n * C::kLn2Low;
  const V shifted = n * scalar_t(0.5) + C::kRound, half = shifted - C::kRound;
  const V rest = (n - half) + C::kRound;
  const SplitExp<V> exp(r);
  return (exp.power * exp.fraction + exp.power) * Bits<V>::exp2_of_shifted(shifted) *
         Bits<V>::exp2_of_shifted(rest);
}

template <typename V>
[[gnu::always_inline]] inline V expm1_of(V x) {
  using scalar_t = typename Bits<V>::scalar_t;
  constexpr scalar_t kLarge = 40;  // beyond it exp is so large that -1 is lost
  const SplitExp<V> exp(Bits<V>::copysign(bounded_magnitude(x, kLarge), x));
  const V value = exp.power * exp.fraction + (exp.power - scalar_t(1));
  return select(x > kLarge, exp_of(x), value);
}

// A NaN stays a NaN, as in torch.
template <typename V>
[[gnu::always_inline]] inline V maximum(V a, V b) {
  return select((a < b) | (b != b), b, a);
}
template <typename V>
[[gnu::always_inline]] inline V minimum(V a, V b) {
  return select((b < a) | (b != b), b, a);
}

// Each number brought into [-bound, bound].
template <typename V, typename scalar_t>
[[gnu::always_inline]] inline V clipped(V x, scalar_t bound) {
  return minimum(maximum(x, number<V>(-bound)), number<V>(bound));
}

}  // namespace
}  // namespace fastbptt
