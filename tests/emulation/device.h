// The emulation's bodies of csrc/cuda/device.cuh, which says what they mean.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda/numbers.h"
#include "emulation/runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace fastbptt {

inline double to_acc(double x) { return x; }
inline float to_acc(float x) { return x; }
inline float to_acc(half_t x) { return x; }
inline float to_acc(bfloat16_t x) { return x; }

template <typename scalar_t>
inline scalar_t from_acc(Accumulator<scalar_t> x) {
  return scalar_t(x);
}

inline float exp2_approx(float x) { return std::exp2(x); }

// As inexact as the GPU's may be: 2^-11 of the value.
inline float tanh_approx(float x) {
  int exponent;
  const float mantissa = std::frexp(std::tanh(x), &exponent);
  return std::ldexp(std::nearbyint(mantissa * 2048.0f) / 2048.0f, exponent);
}

// The float beyond 1/x that is not the nearest: an ulp from it, as the GPU's may be.
inline float reciprocal_approx(float x) {
  const double exact = 1.0 / x;
  const float nearest = float(exact);
  return std::nextafter(nearest, nearest < exact ? INFINITY : -INFINITY);
}

template <typename T>
T opaque(T x) {
  return x;
}

inline unsigned char* dynamic_shared() { return emulation::this_thread().block->shared; }

using SharedBase = unsigned char*;
inline SharedBase shared_base() { return dynamic_shared(); }
template <typename T>
T* shared_at(SharedBase base, int offset) {
  return reinterpret_cast<T*>(base + offset);
}

inline void sync_first(int threads, emulation::Site site = emulation::Site::here()) {
  emulation::sync_first(threads, site);
}
inline void sync_block(emulation::Site site = emulation::Site::here()) {
  emulation::sync_block(site);
}

inline void sync_warp(emulation::Site site = emulation::Site::here()) {
  const char nothing = 0;
  emulation::warp_exchange("sync_warp", &nothing, 0, [](emulation::Warp&) {}, site);
}

namespace emulation {

template <typename T>
T shuffle_from(T v, int lane, const char* what, const Site& site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a number of 4 or 8 bytes");
  struct {
    T v;
    int lane;
  } in{v, lane}, from;
  const void* out = warp_exchange(
      what, &in, sizeof in,
      [](Warp& warp) {
        decltype(in) own;
        for (int i = 0; i < kWarp; ++i) {
          std::memcpy(&own, warp.in[i], sizeof own);
          std::memcpy(warp.out[i], warp.in[own.lane & (kWarp - 1)], sizeof(T));
        }
      },
      site);
  std::memcpy(&from.v, out, sizeof(T));
  return from.v;
}

}  // namespace emulation

template <typename T>
T shuffle(T v, int src, emulation::Site site = emulation::Site::here()) {
  return emulation::shuffle_from(v, src, "shuffle", site);
}

template <typename T>
T shuffle_xor(T v, int mask, emulation::Site site = emulation::Site::here()) {
  const int lane = emulation::this_thread().lane();
  return emulation::shuffle_from(v, lane ^ mask, "shuffle_xor", site);
}

template <typename T>
T shuffle_down(T v, int delta, emulation::Site site = emulation::Site::here()) {
  const int lane = emulation::this_thread().lane();
  return emulation::shuffle_from(v, lane + delta < kWarp ? lane + delta : lane, "shuffle_down",
                                 site);
}

}  // namespace fastbptt
