// The arithmetic of the cells, written once over a value type V: a vector register on the CPU, a
// scalar on a GPU, or a dual number over either (dual.h), of which a cell's derivative comes. V supplies
// + - *, comparisons, `select` on their results, and a register or scalar / and Bits<V> too.
#pragma once

#include "host_device.h"

namespace fastbptt {
namespace {  // compiled once per instruction set: nothing here may be merged across them

// The operations on a value type that are its own: scalar_t, broadcast, abs, copysign, divide,
// exp2_of_shifted.
template <typename V>
struct Bits;

// a where the comparison `is_so` holds, else b.
template <typename Flags, typename V>
[[gnu::always_inline]] FASTBPTT_HD inline V select(Flags is_so, V a, V b) {
  return is_so ? a : b;
}

// Constants of exp's argument reduction x = n ln2 + r, |r| <= ln2 / 2. kLn2High has so few digits
// that n * kLn2High is exact. kTanhLimit: beyond it tanh rounds to 1. kExpLimit: exp(-kExpLimit)
// comes out as 0, since its power of two has the exponent field 0.
template <typename scalar_t>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float kLog2e = 0x1.715476p+0f;
  static constexpr float kLn2High = 0x1.62e4p-1f;
  static constexpr float kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kRound = 0x1.8p+23f;  // adding it leaves the nearest integer in low bits
  static constexpr float kTanhLimit = 10.0f;
  static constexpr float kExpLimit = 88.0f;
  static constexpr int kTerms = 7;  // r^8/8! is below half an ulp of r
};

template <>
struct ExpConstants<double> {
  static constexpr double kLog2e = 0x1.71547652b82fep+0;
  static constexpr double kLn2High = 0x1.62e42feep-1;
  static constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr double kRound = 0x1.8p+52;
  static constexpr double kTanhLimit = 20.0;
  static constexpr double kExpLimit = 709.0;
  static constexpr int kTerms = 13;
};

// exp(x) = 2^n (1 + fraction) with fraction = exp(r) - 1 = r + r^2/2! + r^3/3! + ..., by Horner's
// rule. |x| must be at most kExpLimit, or NaN.
template <typename V>
struct SplitExp {
  V power, fraction;

  FASTBPTT_HD [[gnu::always_inline]] explicit SplitExp(V x) {
    using scalar_t = typename Bits<V>::scalar_t;
    using C = ExpConstants<scalar_t>;
    const V shifted = x * C::kLog2e + C::kRound;
    const V n = shifted - C::kRound;
    const V r = (x - n * C::kLn2High) - n * C::kLn2Low;
    double factorial = 1;
    for (int k = 2; k <= C::kTerms; ++k) factorial *= k;
    V sum = Bits<V>::broadcast(scalar_t(1 / factorial));
    FASTBPTT_UNROLL
    for (int k = C::kTerms; k > 2; --k) {
      factorial /= k;
      sum = sum * r + scalar_t(1 / factorial);
    }
    fraction = r + r * r * sum;
    power = Bits<V>::exp2_of_shifted(shifted);
  }
};

// min(|x|, limit); a NaN stays a NaN.
template <typename V, typename scalar_t>
FASTBPTT_HD inline V bounded_magnitude(V x, scalar_t limit) {
  const V bound = Bits<V>::broadcast(limit), magnitude = Bits<V>::abs(x);
  return bound < magnitude ? bound : magnitude;
}

// tanh(x) = sign(x) e / (e + 2) with e = exp(2|x|) - 1 = power * fraction + (power - 1) >= 0, which
// is accurate relative to itself also near zero.
template <typename V>
[[gnu::always_inline]] FASTBPTT_HD inline V tanh(V x) {
  using scalar_t = typename Bits<V>::scalar_t;
  const V magnitude = bounded_magnitude(x, ExpConstants<scalar_t>::kTanhLimit);
  const SplitExp<V> exp(magnitude + magnitude);
  const V e = exp.power * exp.fraction + (exp.power - scalar_t(1));
  return Bits<V>::copysign(Bits<V>::divide(e, e + scalar_t(2)), x);
}

// sigmoid(x) = 1 / (1 + e) for x >= 0 and e / (1 + e) for x < 0, with e = exp(-|x|) <= 1.
template <typename V>
[[gnu::always_inline]] FASTBPTT_HD inline V sigmoid(V x) {
  using scalar_t = typename Bits<V>::scalar_t;
  const SplitExp<V> exp(-bounded_magnitude(x, ExpConstants<scalar_t>::kExpLimit));
  const V e = exp.power * exp.fraction + exp.power;
  return Bits<V>::divide(x < 0 ? e : Bits<V>::broadcast(1), e + scalar_t(1));
}

// The cells. For one unit and step,
//   forward   takes `pre`, the input's part of each gate's pre-activation with its biases, and
//             `rec`, the recurrent part; gives the new state and what the backward pass needs.
//   backward  takes the gradient dh of the new state (and for LSTM dc, that of the cell state) and
//             gives those of the pre-activations, in columns of d. Columns 0 .. kGates - 1 are what
//             W_ih saw, in the order of kInputGate; the kGates columns from kFirstRecurrent on are
//             what W_hh saw, in torch's order. `carry` is what reaches the previous step other than
//             through W_hh: of the state for GRU, of the cell state for LSTM.
// What a cell has no use for is left out of the call by `if constexpr` on these constants. `act` gives
// forward its activations: of the k-th kept, or of phi.
struct CellTraits {
  static constexpr int kGates = 1;           // gates of a unit
  static constexpr int kSaved = 0;           // activations kept for the backward pass, or 0
  static constexpr int kColumns = 1;         // of d
  static constexpr int kFirstRecurrent = 0;  // column
  static constexpr int kInputGate[4] = {0, 1, 2, 3};
  static constexpr bool kHasCellState = false;  // LSTM's c
  static constexpr bool kHasCarry = false;
  static constexpr bool kRecurrentBias = false;  // the last gate's b_hh stays with `rec`
};

// Activations as they are computed.
struct Evaluate {
  template <typename V>
  [[gnu::always_inline]] FASTBPTT_HD static V sigmoid(int, V pre) {
    return fastbptt::sigmoid(pre);
  }
  template <typename V>
  [[gnu::always_inline]] FASTBPTT_HD static V tanh(int, V pre) {
    return fastbptt::tanh(pre);
  }
  template <typename Phi, typename V>
  [[gnu::always_inline]] FASTBPTT_HD static V phi(V pre) {
    return Phi::value(pre);
  }
};

// The nonlinearities phi of the Elman cell: h = phi(pre), and phi'(pre) from h alone.
struct Tanh {
  template <typename V>
  FASTBPTT_HD static V value(V pre) {
    return tanh(pre);
  }
  template <typename V>
  FASTBPTT_HD static V derivative(V h) {
    return 1 - h * h;
  }
};

struct Relu {
  template <typename V>
  FASTBPTT_HD static V value(V pre) {
    return select(pre < 0, V{}, pre);  // a NaN stays a NaN, as in torch
  }
  template <typename V>
  FASTBPTT_HD static V derivative(V h) {
    return select(h <= 0, V{}, V{} + 1);  // a NaN lets the gradient through, as in torch
  }
};

struct Identity {
  template <typename V>
  FASTBPTT_HD static V value(V pre) {
    return pre;
  }
  template <typename V>
  FASTBPTT_HD static V derivative(V) {
    return V{} + 1;
  }
};

// h = phi(pre + rec). Elman, "Finding structure in time", 1990.
template <typename Phi>
struct Elman : CellTraits {
  template <typename V, typename Act = Evaluate>
  FASTBPTT_HD static V forward(const V* pre, const V* rec, V, V*, Act act = {}) {
    return act.template phi<Phi>(pre[0] + rec[0]);
  }
  template <typename V>
  FASTBPTT_HD static void backward(V dh, V h, V* d) {
    d[0] = dh * Phi::derivative(h);
  }
};

// r, z = sigmoid(pre + rec);  n = tanh(pre_n + r rec_n);  h = (1 - z) n + z h'
// with rec_n = W_hn h' + b_hn. Cho et al., "Learning phrase representations using RNN
// encoder-decoder", 2014, with the reset gate after the product as in torch and cuDNN.
struct Gru : CellTraits {
  static constexpr int kGates = 3;
  static constexpr int kSaved = 4;    // r, z, n, rec_n
  static constexpr int kColumns = 4;  // d of n as W_ih saw it, r, z, n as W_hh saw it
  static constexpr int kFirstRecurrent = 1;
  static constexpr int kInputGate[4] = {2, 0, 1, -1};
  static constexpr bool kHasCarry = true;
  static constexpr bool kRecurrentBias = true;

  template <typename V, typename Act = Evaluate>
  FASTBPTT_HD static V forward(const V* pre, const V* rec, V h_before, V* saved, Act act = {}) {
    const V r = act.sigmoid(0, pre[0] + rec[0]), z = act.sigmoid(1, pre[1] + rec[1]);
    const V n = act.tanh(2, pre[2] + r * rec[2]);
    saved[0] = r, saved[1] = z, saved[2] = n, saved[3] = rec[2];
    return n + z * (h_before - n);
  }
  template <typename V>
  FASTBPTT_HD static void backward(V dh, const V* saved, V h_before, V* d, V* carry) {
    const V r = saved[0], z = saved[1], n = saved[2], rec_n = saved[3];
    const V dn = dh * (1 - z) * (1 - n * n);
    d[0] = dn;
    d[1] = dn * rec_n * r * (1 - r);
    d[2] = dh * (h_before - n) * z * (1 - z);
    d[3] = dn * r;
    *carry = dh * z;
  }
};

// i, f, o = sigmoid(pre + rec);  g = tanh(pre_g + rec_g);  c = f c' + i g;  h = o tanh(c).
// Hochreiter and Schmidhuber, "Long short-term memory", 1997; Gers et al., "Learning to forget",
// 2000. Gate order i, f, g, o.
struct Lstm : CellTraits {
  static constexpr int kGates = 4;
  static constexpr int kSaved = 4;
  static constexpr int kColumns = 4;
  static constexpr bool kHasCellState = true;
  static constexpr bool kHasCarry = true;

  // Inlined: the arguments of a call would pass through memory.
  template <typename V, typename Act = Evaluate>
  [[gnu::always_inline]] FASTBPTT_HD static V forward(const V* pre, const V* rec, V c_before,
                                                      V* saved, V* c, Act act = {}) {
    const V i = act.sigmoid(0, pre[0] + rec[0]), f = act.sigmoid(1, pre[1] + rec[1]);
    const V g = act.tanh(2, pre[2] + rec[2]), o = act.sigmoid(3, pre[3] + rec[3]);
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
    *c = f * c_before + i * g;
    return o * tanh(*c);
  }
  template <typename V>
  [[gnu::always_inline]] FASTBPTT_HD static void backward(V dh, V dc, const V* saved, V c_before,
                                                          V c, V* d, V* carry) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V tanh_c = tanh(c);
    dc += dh * o * (1 - tanh_c * tanh_c);
    d[0] = dc * g * i * (1 - i);
    d[1] = dc * c_before * f * (1 - f);
    d[2] = dc * i * (1 - g * g);
    d[3] = dh * tanh_c * o * (1 - o);
    *carry = dc * f;
  }
};

}  // namespace
}  // namespace fastbptt
