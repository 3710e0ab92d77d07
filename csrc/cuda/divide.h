// The division of a block's product among its warps.
#pragma once

#include "cuda/step_model.h"

namespace fastbptt {

// So many pairs of tiles as on_chip.cuh multiplies without a branch between them.
inline int64_t whole_pairs(int64_t pairs, int64_t held) {
  int64_t whole = 1;
  while (whole < pairs) whole *= 2;
  return pairs < held ? std::min(whole, held) : pairs;
}

// The fastest with so many blocks, in so much shared memory; without warps if there is none.
inline Tiling divide(const Divided& d, const Blocks2d& blocks, bool is_grid, int64_t shared_bytes) {
  const TileShape shape = tile_shape(d.arithmetic);
  Tiling best{};
  Tiling t{};
  t.clusters = blocks.clusters;
  t.cluster = blocks.cluster;
  t.units = blocks.units;
  t.lanes = blocks.lanes;
  t.is_grid = is_grid;
  t.row_units = d.is_backward ? t.cluster * t.units : t.units;
  t.column_units = d.is_backward ? t.clusters * t.units : t.team() * t.units;
  const int64_t gate_columns = round_up(t.column_units, 2 * shape.columns);
  t.gate_columns = int(gate_columns);
  const int64_t rows = ceil_div(int64_t(d.row_gates()) * t.row_units, shape.rows);
  const int64_t columns = d.column_gates() * gate_columns / shape.columns;
  int64_t best_cycles = 0;
  for (int row_tiles = 1; row_tiles <= kRowTiles; ++row_tiles) {
    const int64_t row_warps = ceil_div(rows, row_tiles);
    for (int64_t column_warps = 1; row_warps * column_warps <= kMaxWarps; ++column_warps) {
      const int held = shape.held / row_tiles;
      const int64_t column_tiles = 2 * whole_pairs(ceil_div(columns, 2 * column_warps), held / 2);
      if ((column_warps - 1) * column_tiles >= columns) continue;  // a warp would have none
      t.row_warps = int(row_warps);
      t.column_warps = int(column_warps);
      t.row_tiles = row_tiles;
      t.column_tiles = int(column_tiles);
      t.extra_tiles = column_tiles > held ? int(column_tiles) - held : 0;
      // Those who carry are, if there are warps enough, not those who compute pairs.
      const int64_t pairs = ceil_div(t.pairs(), kWarp), products = row_warps * column_warps;
      const int64_t carry = ceil_div(t.pairs() * shape.x_bytes / 16, kWarp);
      if (pairs > kMaxWarps) continue;
      t.warps = int(std::min<int64_t>(std::max(pairs + carry, products), kMaxWarps));
      const int chunks = t.column_units * shape.x_bytes / 16;
      t.copy_rows = t.threads() / chunks;
      t.copy_chunks = t.threads() % chunks;
      t.send_warps = int(ceil_div(t.units / 4 * t.lanes, kWarp));
      if (t.send_warps > t.warps) continue;
      t.shared = shared_layout(d, t);
      if (t.shared.bytes > shared_bytes) continue;
      const int64_t cycles = step_cycles(d, t);
      if (best.warps > 0 && cycles >= best_cycles) continue;
      best = t;
      best_cycles = cycles;
    }
  }
  return best;
}

}  // namespace fastbptt
