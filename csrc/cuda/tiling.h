// How a persistent kernel divides a recurrence: W_hh among the blocks of a cluster, a block's part of
// it among warps, and the lanes among clusters.
//
// The product of a step is y = W x for each lane of a tile. Forward, W has the rows of W_hh, all gates
// of the block's units, and x is the state. Backward, W has the rows of W_hh^T, the block's units, and
// x is d, gate after gate. Both are divided into tiles of which a warp multiplies one at a time.
#pragma once

#include <cstdint>

#include "cuda/grid.h"
#include "host_device.h"

namespace fastbptt {

constexpr int kMaxWarps = 16;
constexpr int kTileLanes = 8;    // of a tensor core's product
constexpr int kUnitGroup = 8;    // a block's units are a multiple: 16 bytes of 16-bit numbers
constexpr int kMaxPasses = 2;    // (unit, lane) pairs of a thread
constexpr int kPlaceSteps = 16;  // steps whose places are computed at a time

// Rows of tiles of W that a warp has.
constexpr int kRowTiles = 2;
constexpr int kTileBytes = 16 * kWarp;

// What multiplies.
enum class Arithmetic { kTensor16, kTf32, kFma };

struct TileShape {
  int rows, columns;  // of W
  int x_bytes;        // of a number of x
  // Tiles of each row that a warp keeps in registers, four a tile: 64 registers a thread, and fewer
  // where float32 numbers take up more of what is left. Other tiles are in shared memory.
  int held;
};

FASTBPTT_HD constexpr TileShape tile_shape(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::kTensor16 ? TileShape{16, 16, 2, 8}
         : arithmetic == Arithmetic::kTf32   ? TileShape{16, 8, 4, 8}
                                             : TileShape{32, 4, 4, 6};
}

// What the division depends on.
struct Divided {
  Arithmetic arithmetic;
  int64_t H;
  int row_gates, column_gates;  // of W: G and 1 forward, 1 and G backward
  int place_bytes;              // of a lane's step
};

// Offsets in a block's shared memory, in bytes; the barriers come first.
struct SharedLayout {
  int x, biases, sums, places, weights, bytes;
  int x_stride;    // numbers from lane to lane: no two rows of a matrix in the same banks
  int sum_stride;  // likewise
};

// Of a cell with G gates.
constexpr int kFwdPlaceBytes = 16, kBwdPlaceBytes = 40;
inline Divided forward_product(Arithmetic arithmetic, int64_t H, int G) {
  return {arithmetic, H, G, 1, kFwdPlaceBytes};
}
inline Divided backward_product(Arithmetic arithmetic, int64_t H, int G) {
  return {arithmetic, H, 1, G, kBwdPlaceBytes};
}

struct Tiling {
  int cluster;                  // blocks that share W
  int units;                    // of a block
  int lanes;                    // of a cluster, at most kTileLanes
  int gate_columns;             // columns of a gate, padded
  int row_warps, column_warps;  // row_warps * column_warps warps multiply
  int row_tiles, column_tiles;  // of each; column_tiles is even
  int extra_tiles;              // of column_tiles, in shared memory
  int warps;
  int pair_rows;  // lanes that the block's threads have a unit of in a pass
  SharedLayout shared;

  int threads() const { return warps * kWarp; }
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline SharedLayout shared_layout(const Divided& d, const Tiling& t) {
  const TileShape shape = tile_shape(d.arithmetic);
  SharedLayout result{};
  result.x_stride = t.column_warps * t.column_tiles * shape.columns + 16 / shape.x_bytes;
  result.sum_stride = t.row_warps * t.row_tiles * shape.rows + 4;
  result.x = 128;
  result.biases = result.x + 2 * t.lanes * result.x_stride * shape.x_bytes;
  result.sums = result.biases + d.row_gates * t.units * 4;
  result.places = result.sums + t.column_warps * kTileLanes * result.sum_stride * 4;
  result.weights = result.places + 2 * kPlaceSteps * kTileLanes * d.place_bytes;
  result.weights = int(round_up(result.weights, 16));
  const int extra = t.row_warps * t.column_warps * t.row_tiles * t.extra_tiles;
  result.bytes = result.weights + extra * kTileBytes;
  return result;
}

// Cycles of an SM that the product of a step takes, from counts. What is multiplied: a sub-partition,
// of which there are 4, issues the multiply-adds of a warp's tile in 32 cycles, and a tensor core
// works for 8 on one; but a warp waits some 33 for each result that it adds to, of which it has two.
// What is read: 128 bytes of shared memory a cycle.
inline int64_t product_cycles(const Divided& d, const Tiling& t) {
  const bool is_fma = d.arithmetic == Arithmetic::kFma;
  const int64_t warps = t.row_warps * t.column_warps, tiles = t.row_tiles * t.column_tiles;
  const int64_t issue = ceil_div(warps, 4) * tiles * (is_fma ? 4 * t.lanes : 8);
  const int64_t chain = is_fma ? 0 : 33 * t.column_tiles / 2;
  // A tile's columns of all lanes: 256 bytes, or numbers that all threads of a warp read at once.
  const int64_t x = warps * t.column_tiles * (is_fma ? t.lanes : 2);
  const int64_t weights = warps * t.row_tiles * t.extra_tiles * kTileBytes / 128;
  const int64_t sums = 2 * t.column_warps * d.row_gates * t.units * t.lanes * 4 / 128;
  return (issue > chain ? issue : chain) + x + weights + sums;
}

// Those of a whole step. Assumed, until measured: two barriers of a block take 60; the exchange in a
// cluster, a store to another multiprocessor, counted there and waited for, 400 and 25 for each block;
// and a pass over the pairs as long as a cell's chain of dependent operations, with two nonlinearities
// one after another but in an Elman cell.
inline int64_t step_cycles(const Divided& d, const Tiling& t) {
  const int64_t passes = ceil_div(t.lanes, t.pair_rows);
  const int64_t chain = d.row_gates * d.column_gates == 1 ? 150 : 300;
  return product_cycles(d, t) + 60 + passes * chain + (t.cluster > 1 ? 400 + 25 * t.cluster : 0);
}

// The fastest division among so many blocks, in so much shared memory; without warps if there is none.
inline Tiling divide(const Divided& d, int cluster, int lanes, int64_t shared_bytes) {
  const TileShape shape = tile_shape(d.arithmetic);
  Tiling best{};
  const int64_t units = round_up(ceil_div(d.H, cluster), kUnitGroup);
  if (units * ceil_div(lanes, kMaxPasses) > kMaxWarps * kWarp) return best;
  const int64_t gate_columns = round_up(cluster * units, 2 * shape.columns);
  const int64_t rows = ceil_div(d.row_gates * units, shape.rows);
  const int64_t columns = d.column_gates * gate_columns / shape.columns;
  int64_t best_cycles = 0;
  for (int row_tiles = 1; row_tiles <= kRowTiles; ++row_tiles) {
    const int64_t row_warps = ceil_div(rows, row_tiles);
    for (int64_t column_warps = 1; row_warps * column_warps <= kMaxWarps; ++column_warps) {
      const int64_t column_tiles = round_up(ceil_div(columns, column_warps), 2);
      if ((column_warps - 1) * column_tiles >= columns) continue;  // a warp would have none
      Tiling t{};
      t.cluster = cluster;
      t.units = int(units);
      t.lanes = lanes;
      t.gate_columns = int(gate_columns);
      t.row_warps = int(row_warps);
      t.column_warps = int(column_warps);
      t.row_tiles = row_tiles;
      t.column_tiles = int(column_tiles);
      t.extra_tiles = column_tiles > shape.held ? int(column_tiles) - shape.held : 0;
      // A thread has one pair, or where there are too many threads for that, two.
      const int64_t wished = ceil_div(units * lanes, kWarp), products = row_warps * column_warps;
      t.warps = int(wished > products ? wished : products);
      if (t.warps > kMaxWarps) t.warps = kMaxWarps;
      t.pair_rows = t.threads() / t.units;
      t.shared = shared_layout(d, t);
      if (t.shared.bytes > shared_bytes) continue;
      const int64_t cycles = product_cycles(d, t);
      if (best.warps > 0 && cycles >= best_cycles) continue;
      best = t;
      best_cycles = cycles;
    }
  }
  return best;
}

}  // namespace fastbptt
