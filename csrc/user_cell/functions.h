// What a user's cell is written in, beside what cells.h and the value type have: for vectors.
#pragma once

#include <cmath>

#include "cpu/vec.h"
#include "user_cell/operations.h"

namespace fastbptt {
namespace {

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

}  // namespace
}  // namespace fastbptt
