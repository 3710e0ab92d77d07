// What cells.h asks of a value type, for numbers one by one.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cells.h"
#include "cuda/device.cuh"

namespace fastbptt {
namespace {

template <typename scalar, typename bits, int mantissa>
struct ScalarBits {
  using scalar_t = scalar;

  FASTBPTT_HD static scalar broadcast(scalar x) { return x; }
  // a / b. For float the device's own takes as long as the rest of a tanh, so it is a product with a
  // reciprocal instead, and a Newton step that makes it about as exact. b is neither 0 nor infinite.
  FASTBPTT_HD static scalar divide(scalar a, scalar b) {
#if defined(__CUDA_ARCH__) || defined(FASTBPTT_EMULATED)
    if constexpr (sizeof(scalar) == 4) {
      const scalar reciprocal = reciprocal_approx(b), quotient = a * reciprocal;
      return std::fma(std::fma(-quotient, b, a), reciprocal, quotient);
    }
#endif
    return a / b;
  }
  FASTBPTT_HD static scalar abs(scalar x) { return std::fabs(x); }
  FASTBPTT_HD static scalar copysign(scalar magnitude, scalar sign) {
    return std::copysign(magnitude, sign);
  }
  // 2^n where `shifted` is n + kRound: n stands in the low bits of its mantissa.
  FASTBPTT_HD static scalar exp2_of_shifted(scalar shifted) {
    const scalar one = 1;
    bits n, exponent;
    std::memcpy(&n, &shifted, sizeof n);
    std::memcpy(&exponent, &one, sizeof one);
    exponent += n << mantissa;
    scalar power;
    std::memcpy(&power, &exponent, sizeof power);
    return power;
  }
};

template <>
struct Bits<float> : ScalarBits<float, uint32_t, 23> {};
template <>
struct Bits<double> : ScalarBits<double, uint64_t, 52> {};

}  // namespace
}  // namespace fastbptt
