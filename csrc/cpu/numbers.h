// The types that numbers are stored in, and those that they are computed and summed in.
#pragma once

#include <cstdint>

namespace fastbptt {

struct half_t {  // IEEE's binary16
  uint16_t bits;
};
struct bfloat16_t {  // the upper half of a float
  uint16_t bits;
};

template <typename scalar_t>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename scalar_t>
using Accumulator = typename AccumulatorOf<scalar_t>::type;

// Whether storing a number rounds it.
template <typename scalar_t>
constexpr bool kIsRounded = sizeof(scalar_t) < sizeof(Accumulator<scalar_t>);

}  // namespace fastbptt
