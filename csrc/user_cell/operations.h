// What a user's cell is written in, beside what cells.h has, for every value type.
#pragma once

#include "cells.h"

namespace fastbptt {
namespace {

// Names a phase of a cell, see fastbptt/_phases.py.
template <int number>
struct Phase {};

#ifdef __CUDACC_RTC__
__device__ inline double infinity() { return __longlong_as_double(0x7ff0000000000000); }
__device__ inline double not_a_number() { return __longlong_as_double(0x7ff8000000000000); }
#else
[[maybe_unused]] inline double infinity() { return __builtin_inf(); }
[[maybe_unused]] inline double not_a_number() { return __builtin_nan(""); }
#endif

// Where a comparison does not hold.
template <typename Flags>
[[gnu::always_inline]] FASTBPTT_HD inline Flags negated(Flags flags) {
  return ~flags;
}
[[gnu::always_inline, maybe_unused]] FASTBPTT_HD inline bool negated(bool flag) { return !flag; }

template <typename V>
[[gnu::always_inline]] FASTBPTT_HD inline V number(double x) {
  return Bits<V>::broadcast(typename Bits<V>::scalar_t(x));
}

// 2^n in two factors, each of which has an exponent where exp(x) has none: so that what overflows
// comes out as infinity, and what is nearly zero is rounded once.
template <typename V>
[[gnu::always_inline]] FASTBPTT_HD inline V exp_of(V x) {
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
[[gnu::always_inline]] FASTBPTT_HD inline V expm1_of(V x) {
  using scalar_t = typename Bits<V>::scalar_t;
  constexpr scalar_t kLarge = 40;  // beyond it exp is so large that -1 is lost
  const SplitExp<V> exp(Bits<V>::copysign(bounded_magnitude(x, kLarge), x));
  const V value = exp.power * exp.fraction + (exp.power - scalar_t(1));
  return select(x > kLarge, exp_of(x), value);
}

// A NaN stays a NaN, as in torch.
template <typename V>
[[gnu::always_inline]] FASTBPTT_HD inline V maximum(V a, V b) {
  return select((a < b) | (b != b), b, a);
}
template <typename V>
[[gnu::always_inline]] FASTBPTT_HD inline V minimum(V a, V b) {
  return select((b < a) | (b != b), b, a);
}

// Each number brought into [-bound, bound].
template <typename V, typename scalar_t>
[[gnu::always_inline]] FASTBPTT_HD inline V clipped(V x, scalar_t bound) {
  return minimum(maximum(x, number<V>(-bound)), number<V>(bound));
}

}  // namespace
}  // namespace fastbptt
