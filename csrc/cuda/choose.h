// Which kernel runs a recurrence.
//
//   stepwise  a library product and a kernel a step: any size and dtype, LSTM projections too
//   resident  one block keeps W_hh, and its tile of the batch, for all steps
//   cluster   2 to 16 blocks of a cluster share W_hh (sm_90)
//
// A step of a persistent kernel takes about a microsecond, one of the stepwise kernels several, since
// it has two launches at least. So a persistent kernel is chosen where one fits and the batch does not
// come in too many waves.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/tiling.h"

namespace fastbptt {

enum class Kernel { kAuto, kStepwise, kResident, kCluster };

// Of the environment, read at every call.
inline Kernel wished_kernel() {
  const char* const value = std::getenv("FASTBPTT_CUDA_KERNEL");
  if (!value || !*value || !std::strcmp(value, "auto")) return Kernel::kAuto;
  if (!std::strcmp(value, "stepwise")) return Kernel::kStepwise;
  if (!std::strcmp(value, "resident")) return Kernel::kResident;
  if (!std::strcmp(value, "cluster")) return Kernel::kCluster;
  throw std::runtime_error(
      "FASTBPTT_CUDA_KERNEL must be auto, stepwise, resident or cluster, got \"" +
      std::string(value) + "\"");
}

constexpr int kMaxCluster = 16;  // more than 8 may not be there: resident_clusters() says so
// Of clusters one after another: with more, the steps of a wave each take longer in all than those of
// a library's product, which is efficient for so large a batch.
constexpr int64_t kMostWaves = 8;

// Lanes of a cluster: as few as let all clusters run at once, since a step takes less time for fewer;
// else as many as a tensor core multiplies at a time.
inline int lanes_of_cluster(int64_t lanes, int cluster, int64_t multiprocessors) {
  for (int each = 1; each < kTileLanes; each *= 2) {
    if (ceil_div(lanes, each) * cluster <= multiprocessors) return each;
  }
  return kTileLanes;
}

// A division, or one without warps. fits(tiling): whether the device can run it.
//
// The fastest by the estimate of tiling.h that does fit. More blocks have more registers to keep W_hh
// in, where it is read in no time, and less each to multiply; but where there is more than one, their
// exchange takes about as long as the product of one that is full.
template <typename Fits>
Tiling choose_tiling(const Divided& d, int64_t lanes, Kernel kernel, const DeviceLimits& limits,
                     Fits&& fits) {
  struct Candidate {
    Tiling tiling;
    int64_t cycles;
  } candidates[5];  // clusters of 1, 2, 4, 8, 16
  int count = 0;
  const int least = kernel == Kernel::kCluster ? 2 : 1;
  const int most = kernel == Kernel::kResident || limits.capability < 90 ? 1 : kMaxCluster;
  for (int cluster = least; cluster <= most; cluster *= 2) {
    const int64_t at_once = limits.multiprocessors / cluster;
    const int each = lanes_of_cluster(lanes, cluster, limits.multiprocessors);
    const Tiling tiling = divide(d, cluster, each, limits.shared_bytes);
    if (tiling.warps == 0 || at_once == 0) continue;
    const int64_t waves = ceil_div(ceil_div(lanes, each), at_once);
    if (kernel == Kernel::kAuto && waves > kMostWaves) continue;
    candidates[count++] = {tiling, waves * step_cycles(d, tiling)};
  }
  std::sort(candidates, candidates + count,
            [](const Candidate& a, const Candidate& b) { return a.cycles < b.cycles; });
  for (int i = 0; i < count; ++i) {
    if (fits(candidates[i].tiling)) return candidates[i].tiling;
  }
  return {};
}

}  // namespace fastbptt
