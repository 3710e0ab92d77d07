// Loops whose counter the compiler knows, for NVRTC, for nvcc and for the test-only emulation.
#pragma once

namespace fastbptt {
namespace {

// A number that is known to the compiler.
template <int number>
struct Index {
  __device__ constexpr operator int() const { return number; }
};

// fn(Index<0>()), ..., fn(Index<count - 1>()).
template <int count, int begin = 0, typename Fn>
__device__ __forceinline__ void unrolled(Fn&& fn) {
  if constexpr (begin < count) {
    fn(Index<begin>());
    unrolled<count, begin + 1>(fn);
  }
}

}  // namespace
}  // namespace fastbptt
