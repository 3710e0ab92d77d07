// What cells.h asks of a value type, for numbers one by one. NVRTC reads this too, which has no headers of
// the standard library, and what is used of them by itself.
#pragma once

#ifndef __CUDACC_RTC__
#include <cmath>
#include <cstring>
#endif

#include "cells.h"

namespace fastbptt {
namespace {

// Functions of a number, as overloaded by its type.
namespace math {
#ifdef __CUDACC_RTC__
#define FASTBPTT_FUNCTION(name) using ::name
#else
#define FASTBPTT_FUNCTION(name) using std::name
#endif
FASTBPTT_FUNCTION(copysign);
FASTBPTT_FUNCTION(cos);
FASTBPTT_FUNCTION(erf);
FASTBPTT_FUNCTION(fabs);
FASTBPTT_FUNCTION(log);
FASTBPTT_FUNCTION(log1p);
FASTBPTT_FUNCTION(memcpy);
FASTBPTT_FUNCTION(pow);
FASTBPTT_FUNCTION(sin);
FASTBPTT_FUNCTION(sqrt);
#undef FASTBPTT_FUNCTION
}  // namespace math

template <typename scalar, typename bits, int mantissa>
struct ScalarBits {
  using scalar_t = scalar;

  FASTBPTT_HD static scalar broadcast(scalar x) { return x; }
  FASTBPTT_HD static scalar divide(scalar a, scalar b) { return a / b; }
  FASTBPTT_HD static scalar abs(scalar x) { return math::fabs(x); }
  FASTBPTT_HD static scalar copysign(scalar magnitude, scalar sign) {
    return math::copysign(magnitude, sign);
  }
  // 2^n where `shifted` is n + kRound: n stands in the low bits of its mantissa.
  FASTBPTT_HD static scalar exp2_of_shifted(scalar shifted) {
    const scalar one = 1;
    bits n, exponent;
    math::memcpy(&n, &shifted, sizeof n);
    math::memcpy(&exponent, &one, sizeof one);
    exponent += n << mantissa;
    scalar power;
    math::memcpy(&power, &exponent, sizeof power);
    return power;
  }
};

using FloatBits = ScalarBits<float, unsigned, 23>;
using DoubleBits = ScalarBits<double, unsigned long long, 52>;

}  // namespace
}  // namespace fastbptt
