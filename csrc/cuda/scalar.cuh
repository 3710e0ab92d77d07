// What cells.h asks of a value type, for numbers one by one.
#pragma once

#include <cmath>
#include <type_traits>

#include "cells.h"
#include "cuda/device.cuh"
#include "scalar.h"

namespace fastbptt {
namespace {

struct FastFloatBits : FloatBits {
  // a / b. The device's own takes as long as the rest of a tanh, so it is a product with a reciprocal
  // instead, and a Newton step that makes it about as exact. b is neither 0 nor infinite.
  FASTBPTT_HD static float divide(float a, float b) {
#if defined(__CUDA_ARCH__) || defined(FASTBPTT_EMULATED)
    const float reciprocal = reciprocal_approx(b), quotient = a * reciprocal;
    return std::fma(std::fma(-quotient, b, a), reciprocal, quotient);
#else
    return a / b;
#endif
  }
};

// Activations for results of 16 bits, which are rounded far more than by these: relative errors are of
// some 2^-22, tanh's near 0 too. In place of cells.h's Evaluate; a third of its instructions.
struct Approximate {
  static constexpr float kLog2E = 1.442695041f;

  FASTBPTT_HD static float sigmoid(int, float pre) {
#if defined(__CUDA_ARCH__) || defined(FASTBPTT_EMULATED)
    return reciprocal_approx(1 + exp2_approx(-kLog2E * pre));
#else
    return fastbptt::sigmoid(pre);  // nobody calls it there
#endif
  }
  FASTBPTT_HD static float tanh(int, float pre) {
#if defined(__CUDA_ARCH__) || defined(FASTBPTT_EMULATED)
    // 1 - 2 / (1 + e^2x), which near 0 cancels: there x - x^3 / 3, whose next term is of 2^-26.
    const float away = std::fma(-2.0f, reciprocal_approx(1 + exp2_approx(2 * kLog2E * pre)), 1.0f);
    const float near = std::fma(pre * pre, pre * (-1.0f / 3), pre);
    return std::fabs(pre) < 0.02f ? near : away;
#else
    return fastbptt::tanh(pre);
#endif
  }
  template <typename Phi>
  FASTBPTT_HD static float phi(float pre) {
    if constexpr (std::is_same_v<Phi, Tanh>) return tanh(0, pre);
    return Phi::value(pre);
  }
};

template <typename scalar_t>
using Activations = std::conditional_t<sizeof(scalar_t) == 2, Approximate, Evaluate>;

template <>
struct Bits<float> : FastFloatBits {};
template <>
struct Bits<double> : DoubleBits {};

}  // namespace
}  // namespace fastbptt
