// When a product is one of few rows, and how it is launched.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "few_rows.h"

namespace fastbptt {

// Whether a product of so many rows with a matrix of so many numbers takes, on an H100, no longer than the
// library's, at 8 to 16 rows as little as a twentieth: measured for matrices of 128 x 128 to 8192 x 2048.
inline bool are_few_rows(int64_t rows, int64_t numbers) {
  constexpr int64_t kAlways = 16, kMost = 128, kMultiplyAdds = int64_t{1} << 27;
  return 0 < rows && rows <= kMost && (rows <= kAlways || numbers <= kMultiplyAdds / rows);
}

struct FewRowsLaunch {
  int vector, tile;  // which of kProductVectors and kProductTiles
  int64_t blocks_x, blocks_y, threads, shared_bytes;
  int kernel() const { return vector * int(std::size(kProductTiles)) + tile; }
};

inline FewRowsLaunch launch_of(const FewRowsProduct& p) {
  constexpr int64_t kThreads = 32;  // of a warp
  constexpr int64_t kFewBlocks = 128;
  // Of an H100, whose threads then have all the registers that they want; and numbers of a matrix that its
  // cache does not hold, which to load takes more warps than to multiply.
  constexpr int64_t kWarpsAtOnce[] = {2112, 1056, 1056}, kCached = 1 << 23, kLoadingWarps = 4;
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const auto fits = [&](int vector) {
    const auto is_multiple = [&](int64_t numbers) { return numbers % vector == 0; };
    const auto is_aligned = [&](const float* pointer) {
      return reinterpret_cast<uintptr_t>(pointer) % (size_t(vector) * sizeof(float)) == 0;
    };
    return is_multiple(p.depth) && is_multiple(p.ld_rows) && is_multiple(p.ld_weight) &&
           is_aligned(p.rows) && is_aligned(p.weight);
  };
  const auto blocks_of = [&](int tile) {
    return ceil_div(p.columns, kProductTiles[tile].columns) *
           ceil_div(p.count, kProductTiles[tile].rows);
  };
  FewRowsLaunch launch{};
  while (!fits(kProductVectors[launch.vector])) ++launch.vector;
  launch.tile = p.count <= 4 ? 0 : p.count <= 8 || blocks_of(2) < kFewBlocks ? 1 : 2;
  const ProductTile tile = kProductTiles[launch.tile];
  launch.blocks_x = ceil_div(p.columns, tile.columns);
  launch.blocks_y = ceil_div(p.count, tile.rows);

  // As many warps share the depth as run at once, and no more than it takes for as many turns.
  const int64_t least = int64_t{p.columns} * p.depth > kCached ? kLoadingWarps : 1;
  const int64_t turns = ceil_div(p.depth, kProductVectors[launch.vector] * kThreads);
  const int64_t wanted =
      std::clamp<int64_t>(kWarpsAtOnce[launch.tile] / blocks_of(launch.tile), least, kProductWarps);
  const int64_t warps = ceil_div(turns, ceil_div(turns, wanted));
  launch.threads = warps * kThreads;
  launch.shared_bytes = warps * tile.rows * tile.columns * int64_t(sizeof(float));
  return launch;
}

}  // namespace fastbptt
