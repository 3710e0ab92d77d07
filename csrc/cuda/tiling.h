// How a persistent kernel divides a recurrence: W_hh among the blocks of a team, a block's part of it
// among warps, and the lanes among teams.
//
// A team is one cluster, or of a grid kernel several. Its blocks compute the cells of so many units
// each. The product of a step is y = W x for each lane.
//
//   forward   A block's rows of W are those of W_hh for its units, all gates; x is the state, of all
//             units. Every block's new state goes to all of the team's.
//   backward  W is of W_hh^T. A cluster's rows are its blocks' units. Their columns, d of all gates, are
//             divided among the blocks of the cluster, and what each of them sums, a part of y, goes to
//             the block that has the unit. Where a team is one cluster, a block's columns are those of
//             its own units, and d stays where it is.
//
// A thread computes one pair of a unit and a lane at most; and from the other end of the block, threads
// carry inputs and results between global and shared memory meanwhile.
#pragma once

#include <cstdint>

#include "cuda/grid.h"
#include "host_device.h"

namespace fastbptt {

constexpr int kMaxWarps = 16;
constexpr int kMaxCluster = 16;  // more than 8 may not be there: the device says so
constexpr int kTileLanes = 8;    // of a tensor core's product
constexpr int kUnitGroup = 8;    // a block's units are a multiple: 16 bytes of 16-bit numbers
constexpr int kPlaceSteps = 8;   // steps whose places are computed at a time
constexpr int kAhead = 3;        // steps by which what a step reads of memory is fetched ahead
constexpr int kRing = kAhead + 1;
// A place is computed before a barrier, and then fetched by.
static_assert(kPlaceSteps > kAhead + 1 && kAhead >= 2);

// Rows of tiles of W that a warp has, at most.
constexpr int kRowTiles = 2;
constexpr int kTileBytes = 16 * kWarp;

// What multiplies.
enum class Arithmetic { kTensor16, kTf32, kFma };

struct TileShape {
  int rows, columns;  // of W
  int x_bytes;        // of a number of x
  // Tiles that a warp keeps in registers, four each: 64 registers a thread, and fewer where float32
  // numbers take up more of what is left. Other tiles are in shared memory.
  int held;
};

FASTBPTT_HD constexpr TileShape tile_shape(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::kTensor16 ? TileShape{16, 16, 2, 16}
         : arithmetic == Arithmetic::kTf32   ? TileShape{16, 8, 4, 16}
                                             : TileShape{32, 4, 4, 12};
}

// What the division depends on.
struct Divided {
  Arithmetic arithmetic;
  int64_t H;
  int gates;
  bool is_backward;
  int place_bytes;  // of a lane's step
  int inputs;       // numbers that a unit's step reads of memory
  int results;      // that it writes there

  // Forward, and backward. place_bytes: of step.cuh's places with float32 sums.
  template <typename Cell>
  static Divided forward(Arithmetic arithmetic, int64_t H) {
    const int states = Cell::kHasCellState ? 2 : 1;
    return {arithmetic, H, Cell::kGates, false, 16, Cell::kGates, states + Cell::kSaved};
  }
  template <typename Cell>
  static Divided backward(Arithmetic arithmetic, int64_t H) {
    const int kept = Cell::kSaved == 0 ? 1 : Cell::kSaved + (Cell::kHasCellState ? 2 : 1);
    return {arithmetic, H, Cell::kGates, true, 40, kept + 1, Cell::kColumns};
  }

  int row_gates() const { return is_backward ? 1 : gates; }
  int column_gates() const { return is_backward ? gates : 1; }
};

// How many blocks there are for it.
struct Blocks2d {
  int clusters;  // of a team
  int cluster;   // blocks of a cluster
  int units;     // of a block
  int lanes;     // of a team, at most kTileLanes
};

// Offsets in a block's shared memory, in bytes; the barriers come first.
struct SharedLayout {
  int x, sums, partials, inputs, results, places, addresses, weights, bytes;
  int x_stride;    // numbers from lane to lane: no two rows of a matrix in the same banks
  int sum_stride;  // likewise
  int x_buffers;
};

constexpr int kBarrierBytes = 128;
constexpr int kFlagStride = 32;  // from a team's flag to the next one's: a line of the cache

struct Tiling {
  int clusters, cluster, units, lanes;  // as in Blocks2d
  bool is_grid;                         // x goes through global memory
  int row_units, column_units;          // of which the block has rows and columns of W
  int gate_columns;                     // columns of a gate, padded
  int row_warps, column_warps;          // row_warps * column_warps warps multiply
  int row_tiles, column_tiles;          // of each; column_tiles is even
  int extra_tiles;                      // of column_tiles, in shared memory
  int warps;
  int copy_rows, copy_chunks;  // of a grid's x, from one 16 bytes that a thread copies to the next
  int send_warps;              // that send one owner the sums of its units
  int lane_units, sharers;  // of a lane kernel, units and sharers of its LaneShape; 0 of the others
  SharedLayout shared;

  FASTBPTT_HD int threads() const { return warps * kWarp; }
  FASTBPTT_HD int team() const { return clusters * cluster; }  // blocks
  FASTBPTT_HD int pairs() const { return lanes * units; }      // of a block
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline SharedLayout shared_layout(const Divided& d, const Tiling& t) {
  const TileShape shape = tile_shape(d.arithmetic);
  SharedLayout result{};
  // A cluster's blocks write each other's x while others still read the one before.
  const bool is_pushed = !t.is_grid && !d.is_backward && t.cluster > 1;
  result.x_buffers = is_pushed ? 2 : 1;
  result.x_stride = t.column_warps * t.column_tiles * shape.columns + 16 / shape.x_bytes;
  result.sum_stride = t.row_warps * t.row_tiles * shape.rows + 4;
  const int places = 2 * kPlaceSteps * t.lanes;
  const int partials = d.is_backward && t.cluster > 1 ? 2 * t.cluster * t.pairs() : 0;
  result.x = kBarrierBytes;
  result.sums = result.x + result.x_buffers * t.lanes * result.x_stride * shape.x_bytes;
  const int sums = t.column_warps + (d.is_backward ? 0 : 1);  // and biases
  result.partials = result.sums + sums * t.lanes * result.sum_stride * 4;
  result.inputs = result.partials + partials * 4;
  result.results = result.inputs + kRing * d.inputs * t.pairs() * shape.x_bytes;
  result.places = result.results + 2 * d.results * t.pairs() * shape.x_bytes;
  result.weights = int(round_up(result.places + places * d.place_bytes, 16));
  const int extra = t.row_warps * t.column_warps * t.row_tiles * t.extra_tiles;
  result.bytes = result.weights + extra * kTileBytes;
  return result;
}

}  // namespace fastbptt
