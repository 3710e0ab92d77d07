// The vector register of one instruction set, on the compiler's vector extension. The including
// file has defined FASTBPTT_VEC_BYTES and chosen the target; another processor needs another width
// and, where it has them, masked loads. What the target has is said by FASTBPTT_AVX512, _F16C, _NEON,
// and _AVX512_BF16 or _NEON_BF16, since FASTBPTT_TARGET does not define the compiler's own macros
// in C++.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cells.h"
#include "cpu/numbers.h"

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

// The register that numbers stored as scalar_t are computed in.
template <typename scalar_t>
using Vec = typename VecTypes<Accumulator<scalar_t>>::vec;

template <typename scalar_t>
constexpr int kLanes = kVecBytes / int(sizeof(Accumulator<scalar_t>));

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// --- 16-bit numbers ------------------------------------------------------------------------------

using FloatBits = VecTypes<float>::bits;
typedef uint16_t HalfBits __attribute__((vector_size(kVecBytes / 2)));

template <typename scalar_t>
inline Vec<float> widen(HalfBits bits) {
  if constexpr (std::is_same_v<scalar_t, bfloat16_t>) {
    // Of __builtin_convertvector GCC 12 makes two halves that it puts together.
#if defined(FASTBPTT_AVX512)
    const FloatBits wide = (FloatBits)_mm512_maskz_cvtepu16_epi32(__mmask16(-1), (__m256i)bits);
#elif defined(FASTBPTT_F16C)
    const FloatBits wide = (FloatBits)_mm256_cvtepu16_epi32((__m128i)bits);
#elif defined(FASTBPTT_NEON)
    const FloatBits wide = (FloatBits)vmovl_u16((uint16x4_t)bits);
#else
    const FloatBits wide = __builtin_convertvector(bits, FloatBits);
#endif
    return (Vec<float>)(wide << 16);
  } else {
#if defined(FASTBPTT_AVX512)
    return _mm512_maskz_cvtph_ps(__mmask16(-1), (__m256i)bits);  // all; without a mask GCC 12 warns
#elif defined(FASTBPTT_F16C)
    return _mm256_cvtph_ps((__m128i)bits);
#elif defined(FASTBPTT_NEON)
    return (Vec<float>)vcvt_f32_f16((float16x4_t)bits);
#endif
  }
}

// To the nearest, ties to even. NaN stays NaN.
template <typename scalar_t>
inline HalfBits narrow(Vec<float> x) {
  if constexpr (std::is_same_v<scalar_t, bfloat16_t>) {
#if defined(FASTBPTT_AVX512_BF16)
    return (HalfBits)_mm512_cvtneps_pbh(x);  // flushes denormal numbers to zero
#elif defined(FASTBPTT_NEON_BF16)
    return (HalfBits)vcvt_bf16_f32((float32x4_t)x);
#else
    const FloatBits bits = (FloatBits)x, upper = bits >> 16;
    const FloatBits rounded = (bits + (0x7fff + (upper & 1))) >> 16;
    return __builtin_convertvector(x != x ? upper | 0x40 : rounded, HalfBits);
#endif
  } else {
#if defined(FASTBPTT_AVX512)
    return (HalfBits)_mm512_maskz_cvtps_ph(__mmask16(-1), x,
                                           _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(FASTBPTT_F16C)
    return (HalfBits)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(FASTBPTT_NEON)
    return (HalfBits)vcvt_f16_f32((float32x4_t)x);
#endif
  }
}

// What x comes out as when it has been stored.
template <typename scalar_t>
inline Vec<scalar_t> round_to(Vec<scalar_t> x) {
  if constexpr (kIsRounded<scalar_t>) {
    return widen<scalar_t>(narrow<scalar_t>(x));
  } else {
    return x;
  }
}

// sum plus the products of both bfloat16 of each lane. Denormal numbers are taken for zero.
#if defined(FASTBPTT_AVX512_BF16)
#define FASTBPTT_MULTIPLIES_PAIRS
inline Vec<float> add_products_of_pairs(Vec<float> sum, FloatBits x, FloatBits y) {
  return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y);
}
#elif defined(FASTBPTT_NEON_BF16)
#define FASTBPTT_MULTIPLIES_PAIRS
inline Vec<float> add_products_of_pairs(Vec<float> sum, FloatBits x, FloatBits y) {
  return (Vec<float>)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)x, (bfloat16x8_t)y);
}
#endif

// --- Loads and stores ----------------------------------------------------------------------------

template <typename scalar_t>
inline Vec<scalar_t> load(const scalar_t* p) {
  if constexpr (kIsRounded<scalar_t>) {
    HalfBits bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return widen<scalar_t>(bits);
  } else {
    Vec<scalar_t> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
}

template <typename scalar_t>
inline void store(scalar_t* p, Vec<scalar_t> v) {
  if constexpr (kIsRounded<scalar_t>) {
    const HalfBits bits = narrow<scalar_t>(v);
    __builtin_memcpy(p, &bits, sizeof bits);
  } else {
    __builtin_memcpy(p, &v, sizeof v);
  }
}

// The first n lanes of a vector, 0 < n < lanes. Memory of the others is not touched.
template <int lanes>
struct Part {
#ifdef FASTBPTT_AVX512
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
template <int lanes>
struct Whole {
  constexpr operator int64_t() const { return lanes; }
};

// The elements that are there; the rest is zero.
template <typename scalar_t>
inline Vec<scalar_t> load_first(const scalar_t* p, Whole<kLanes<scalar_t>>) {
  return load(p);
}

template <typename scalar_t>
inline Vec<scalar_t> load_first(const scalar_t* p, Part<kLanes<scalar_t>> part) {
#ifdef FASTBPTT_AVX512
  if constexpr (sizeof(scalar_t) == 2) {
    return widen<scalar_t>((HalfBits)_mm256_maskz_loadu_epi16(__mmask16(part.mask), p));
  } else if constexpr (sizeof(scalar_t) == 4) {
    return _mm512_maskz_loadu_ps(__mmask16(part.mask), p);
  } else {
    return _mm512_maskz_loadu_pd(__mmask8(part.mask), p);
  }
#else
  if constexpr (kIsRounded<scalar_t>) {
    HalfBits bits{};
    for (int i = 0; i < kLanes<scalar_t>; ++i) {
      if (i < part.n) bits[i] = p[i].bits;
    }
    return widen<scalar_t>(bits);
  } else {
    Vec<scalar_t> v{};
    for (int i = 0; i < kLanes<scalar_t>; ++i) {
      if (i < part.n) v[i] = p[i];
    }
    return v;
  }
#endif
}

// n > 0 may be more than there are lanes.
template <typename scalar_t>
inline Vec<scalar_t> load_first(const scalar_t* p, int64_t n) {
  return n >= kLanes<scalar_t> ? load(p) : load_first(p, Part<kLanes<scalar_t>>(n));
}

template <typename scalar_t>
inline void store_first(scalar_t* p, Vec<scalar_t> v, Whole<kLanes<scalar_t>>) {
  store(p, v);
}

template <typename scalar_t>
inline void store_first(scalar_t* p, Vec<scalar_t> v, Part<kLanes<scalar_t>> part) {
#ifdef FASTBPTT_AVX512
  if constexpr (sizeof(scalar_t) == 2) {
    _mm256_mask_storeu_epi16(p, __mmask16(part.mask), (__m256i)narrow<scalar_t>(v));
  } else if constexpr (sizeof(scalar_t) == 4) {
    _mm512_mask_storeu_ps(p, __mmask16(part.mask), v);
  } else {
    _mm512_mask_storeu_pd(p, __mmask8(part.mask), v);
  }
#else
  if constexpr (kIsRounded<scalar_t>) {
    const HalfBits bits = narrow<scalar_t>(v);
    for (int i = 0; i < kLanes<scalar_t>; ++i) {
      if (i < part.n) p[i].bits = bits[i];
    }
  } else {
    for (int i = 0; i < kLanes<scalar_t>; ++i) {
      if (i < part.n) p[i] = v[i];
    }
  }
#endif
}

template <typename scalar_t>
inline void store_first(scalar_t* p, Vec<scalar_t> v, int64_t n) {
  n >= kLanes<scalar_t> ? store(p, v) : store_first(p, v, Part<kLanes<scalar_t>>(n));
}

// One number, as it is computed with.
template <typename scalar_t>
inline Accumulator<scalar_t> load_one(const scalar_t* p) {
  if constexpr (kIsRounded<scalar_t>) {
    return load_first(p, 1)[0];
  } else {
    return *p;
  }
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
  static V divide(V a, V b) { return a / b; }
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
