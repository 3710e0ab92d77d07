// The arithmetic of the cells, written once over a value type V: a vector register on the CPU, a
// scalar elsewhere. V supplies + - * /, comparisons, ?: on their results, and Bits<V>.
#pragma once

namespace fastbptt {
namespace {  // compiled once per instruction set: nothing here may be merged across them

// The bit operations on a value type: scalar_t, broadcast, abs, copysign, exp2_of_shifted.
template <typename V>
struct Bits;

// Constants of exp's argument reduction x = n ln2 + r, |r| <= ln2 / 2. kLn2High has so few digits
// that n * kLn2High is exact. kTanhLimit: beyond it tanh rounds to 1. kExpLimit: exp(-kExpLimit) is
// still a normal number.
template <typename scalar_t>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float kLog2e = 0x1.715476p+0f;
  static constexpr float kLn2High = 0x1.62e4p-1f;
  static constexpr float kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kRound = 0x1.8p+23f;  // adding it leaves the nearest integer in low bits
  static constexpr float kTanhLimit = 10.0f;
  static constexpr float kExpLimit = 87.0f;
  static constexpr int kTerms = 7;  // r^8/8! is below half an ulp of r
};

template <>
struct ExpConstants<double> {
  static constexpr double kLog2e = 0x1.71547652b82fep+0;
  static constexpr double kLn2High = 0x1.62e42feep-1;
  static constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr double kRound = 0x1.8p+52;
  static constexpr double kTanhLimit = 20.0;
  static constexpr double kExpLimit = 708.0;
  static constexpr int kTerms = 13;
};

// exp(x) - 1 = 2^n (exp(r) - 1) + (2^n - 1), accurate relative to itself also near zero. The series
// exp(r) - 1 = r + r^2/2! + r^3/3! + ... is summed by Horner's rule. |x| must be at most kExpLimit,
// or NaN.
template <typename V>
inline V expm1(V x) {
  using scalar_t = typename Bits<V>::scalar_t;
  using C = ExpConstants<scalar_t>;
  const V shifted = x * C::kLog2e + C::kRound;
  const V n = shifted - C::kRound;
  const V r = (x - n * C::kLn2High) - n * C::kLn2Low;
  double factorial = 1;
  for (int k = 2; k <= C::kTerms; ++k) factorial *= k;
  V sum = Bits<V>::broadcast(scalar_t(1 / factorial));
#pragma GCC unroll 16
  for (int k = C::kTerms; k > 2; --k) {
    factorial /= k;
    sum = sum * r + scalar_t(1 / factorial);
  }
  const V p = r + r * r * sum;
  const V scale = Bits<V>::exp2_of_shifted(shifted);
  return scale * p + (scale - scalar_t(1));
}

// tanh(x) = sign(x) e / (e + 2) with e = exp(2|x|) - 1 >= 0: no cancellation anywhere.
template <typename V>
inline V tanh(V x) {
  using scalar_t = typename Bits<V>::scalar_t;
  const V limit = Bits<V>::broadcast(ExpConstants<scalar_t>::kTanhLimit);
  V magnitude = Bits<V>::abs(x);
  magnitude = limit < magnitude ? limit : magnitude;  // in this order a NaN stays a NaN
  const V e = expm1(magnitude + magnitude);
  return Bits<V>::copysign(e / (e + scalar_t(2)), x);
}

// The nonlinearities phi of the Elman cell: h = phi(pre), and phi'(pre) from h alone.
struct Tanh {
  template <typename V>
  static V value(V pre) {
    return tanh(pre);
  }
  template <typename V>
  static V derivative(V h) {
    return 1 - h * h;
  }
};

struct Relu {
  template <typename V>
  static V value(V pre) {
    return pre < 0 ? V{} : pre;  // a NaN stays a NaN, as in torch
  }
  template <typename V>
  static V derivative(V h) {
    return h <= 0 ? V{} : V{} + 1;  // a NaN lets the gradient through, as in torch
  }
};

struct Identity {
  template <typename V>
  static V value(V pre) {
    return pre;
  }
  template <typename V>
  static V derivative(V) {
    return V{} + 1;
  }
};

}  // namespace
}  // namespace fastbptt
