// The stretches of time that a pass runs, from the layout of a batch and the truncation.
#pragma once

#include <algorithm>
#include <vector>

#include "params.h"

namespace fastbptt {

// The length of each sequence, [B].
inline std::vector<int64_t> sequence_lengths(const Layout& layout) {
  std::vector<int64_t> lengths(layout.B, layout.T);
  if (!layout.batch_sizes) return lengths;
  for (int64_t b = 0, t = layout.T; b < layout.B; ++b) {
    while (layout.batch_sizes[t - 1] <= b) --t;
    lengths[b] = t;
  }
  return lengths;
}

// One lane for each chunk of `chunk` steps of each sequence, or for each whole sequence if `chunk`
// is 0. Chunks begin at t = 0, chunk, 2 chunk, ... in both directions.
inline std::vector<Lane> make_lanes(const Layout& layout, int direction, int64_t chunk) {
  const std::vector<int64_t> lengths = sequence_lengths(layout);
  if (chunk == 0) chunk = layout.T;
  std::vector<Lane> lanes;
  for (int64_t begin = 0; begin < layout.T; begin += chunk) {
    for (int64_t b = 0; b < layout.B; ++b) {
      if (begin >= lengths[b]) continue;
      const int64_t end = std::min(begin + chunk, lengths[b]);
      const bool first = begin == 0, last = end == lengths[b];
      lanes.push_back(direction > 0 ? Lane{begin, b, end - begin, first, last}
                                    : Lane{end - 1, b, end - begin, last, first});
    }
  }
  std::stable_sort(lanes.begin(), lanes.end(),
                   [](const Lane& a, const Lane& b) { return a.steps > b.steps; });
  return lanes;
}

}  // namespace fastbptt
