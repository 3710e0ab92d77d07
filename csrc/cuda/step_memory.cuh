// What a block of a persistent kernel has in shared memory of its steps' inputs, results and places.
#pragma once

#include "cuda/device.cuh"
#include "cuda/scalar.cuh"
#include "cuda/tiling.h"

namespace fastbptt {
namespace {

// Numbers of a step's inputs and results, beside each other, that a thread may take at a time.
template <typename Step>
__device__ int stretch_of(const typename Step::Params& p) {
  constexpr int kSize = int(sizeof(typename Step::scalar_t));
  return Step::is_aligned(p, 16) ? 16 / kSize : Step::is_aligned(p, 4) ? 4 / kSize : 1;
}

// Of pairs: a unit of the block, and a lane. kSteps, kPlaces: steps whose inputs, and whose places, are
// there.
template <typename Step, typename Place, int kSteps, int kPlaces>
struct StepMemory {
  using scalar_t = typename Step::scalar_t;
  using Group = Packed<uint32_t, 4>;

  const Tiling& tiling;
  const SharedBase shared = opaque(shared_base());

  __device__ explicit StepMemory(const Tiling& tiling) : tiling(tiling) {}

  template <typename T>
  __device__ T* at(int offset) const {
    return shared_at<T>(shared, offset);
  }
  // Input i of the step's pairs, and result i.
  __device__ scalar_t* inputs(int step, int i) const {
    const int first = step % kSteps * Step::kInputs;
    return at<scalar_t>(tiling.shared.inputs) + (first + i) * tiling.pairs();
  }
  __device__ scalar_t* results(int step, int i) const {
    return at<scalar_t>(tiling.shared.results) + (step % 2 * Step::kResults + i) * tiling.pairs();
  }
  __device__ Place& place(int step, int lane) const {
    return at<Place>(tiling.shared.places)[step % kPlaces * tiling.lanes + lane];
  }

  __device__ typename Step::Inputs inputs_of(int step, int pair) const {
    const scalar_t* from = inputs(step, 0) + pair;
    typename Step::Inputs result;
    FASTBPTT_UNROLL
    for (int i = 0; i < Step::kInputs; ++i) result.values[i] = from[i * tiling.pairs()];
    return result;
  }
  // What is_kept(i) says of the i-th.
  template <typename IsKept>
  __device__ void keep_results(int step, int pair, const typename Step::Results& kept,
                               IsKept&& is_kept) const {
    scalar_t* const to = results(step, 0) + pair;
    FASTBPTT_UNROLL
    for (int i = 0; i < Step::kResults; ++i) {
      if (is_kept(i)) to[i * tiling.pairs()] = from_acc<scalar_t>(kept.values[i]);
    }
  }
  __device__ void keep_results(int step, int pair, const typename Step::Results& kept) const {
    keep_results(step, pair, kept, [](int) { return true; });
  }
};

}  // namespace
}  // namespace fastbptt
