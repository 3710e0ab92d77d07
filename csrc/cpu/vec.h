// The vector register of one instruction set, on the compiler's vector extension. The including
// file has defined FASTBPTT_VEC_BYTES and chosen the target; another processor needs another width
// and, where it has them, masked loads.
#pragma once

#include <cstdint>

#include "cells.h"

namespace fastbptt {
namespace {

constexpr int kVecBytes = FASTBPTT_VEC_BYTES;

template <typename scalar_t>
struct VecTypes;

template <>
struct VecTypes<float> {
  typedef float vec __attribute__((vector_size(kVecBytes)));
  typedef uint32_t bits __attribute__((vector_size(kVecBytes)));
  static constexpr int kMantissa = 23;
  static constexpr uint32_t kSign = 0x80000000u;
};

template <>
struct VecTypes<double> {
  typedef double vec __attribute__((vector_size(kVecBytes)));
  typedef uint64_t bits __attribute__((vector_size(kVecBytes)));
  static constexpr int kMantissa = 52;
  static constexpr uint64_t kSign = 0x8000000000000000u;
};

template <typename scalar_t>
using Vec = typename VecTypes<scalar_t>::vec;

template <typename scalar_t>
constexpr int kLanes = kVecBytes / int(sizeof(scalar_t));

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename scalar_t>
inline Vec<scalar_t> load(const scalar_t* p) {
  Vec<scalar_t> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <typename scalar_t>
inline void store(scalar_t* p, Vec<scalar_t> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// The first n lanes of a vector, 0 < n < kLanes. Memory of the others is not touched.
template <typename scalar_t>
struct Part {
#if defined(__AVX512F__)
  uint32_t mask;
  explicit Part(int64_t n) : mask((1u << n) - 1) {}
  operator int64_t() const { return __builtin_popcount(mask); }
#else
  int64_t n;
  explicit Part(int64_t n) : n(n) {}
  operator int64_t() const { return n; }
#endif
};

// Stands for such a count where all of a vector's elements are there: no mask, and no branch that
// might need one.
template <typename scalar_t>
struct Whole {
  operator int64_t() const { return kLanes<scalar_t>; }
};

// The elements that are there; the rest is zero.
template <typename scalar_t>
inline Vec<scalar_t> load_first(const scalar_t* p, Whole<scalar_t>) {
  return load(p);
}

template <typename scalar_t>
inline Vec<scalar_t> load_first(const scalar_t* p, Part<scalar_t> part) {
#if defined(__AVX512F__)
  if constexpr (sizeof(scalar_t) == 4) {
    return _mm512_maskz_loadu_ps(__mmask16(part.mask), p);
  } else {
    return _mm512_maskz_loadu_pd(__mmask8(part.mask), p);
  }
#else
  Vec<scalar_t> v{};
  for (int i = 0; i < kLanes<scalar_t>; ++i) {
    if (i < part.n) v[i] = p[i];
  }
  return v;
#endif
}

// n > 0 may be more than there are lanes.
template <typename scalar_t>
inline Vec<scalar_t> load_first(const scalar_t* p, int64_t n) {
  return n >= kLanes<scalar_t> ? load(p) : load_first(p, Part<scalar_t>(n));
}

template <typename scalar_t>
inline void store_first(scalar_t* p, Vec<scalar_t> v, Whole<scalar_t>) {
  store(p, v);
}

template <typename scalar_t>
inline void store_first(scalar_t* p, Vec<scalar_t> v, Part<scalar_t> part) {
#if defined(__AVX512F__)
  if constexpr (sizeof(scalar_t) == 4) {
    _mm512_mask_storeu_ps(p, __mmask16(part.mask), v);
  } else {
    _mm512_mask_storeu_pd(p, __mmask8(part.mask), v);
  }
#else
  for (int i = 0; i < kLanes<scalar_t>; ++i) {
    if (i < part.n) p[i] = v[i];
  }
#endif
}

template <typename scalar_t>
inline void store_first(scalar_t* p, Vec<scalar_t> v, int64_t n) {
  n >= kLanes<scalar_t> ? store(p, v) : store_first(p, v, Part<scalar_t>(n));
}

// What cells.h asks of a value type.
template <typename scalar>
struct VecBits {
  using scalar_t = scalar;
  using V = Vec<scalar>;
  using Types = VecTypes<scalar>;
  using bits = typename Types::bits;

  // x - 0 is x for every x, -0 too, so that it costs nothing; x + 0 is an addition.
  static V broadcast(scalar x) { return x - V{}; }
  static V abs(V x) { return (V)((bits)x & ~Types::kSign); }
  static V copysign(V magnitude, V sign) {
    return (V)((bits)magnitude | ((bits)sign & Types::kSign));
  }
  // 2^n where `shifted` is n + kRound: n stands in the low bits of its mantissa.
  static V exp2_of_shifted(V shifted) {
    return (V)(((bits)shifted << Types::kMantissa) + (bits)broadcast(1));
  }
};

template <>
struct Bits<Vec<float>> : VecBits<float> {};
template <>
struct Bits<Vec<double>> : VecBits<double> {};

}  // namespace
}  // namespace fastbptt
