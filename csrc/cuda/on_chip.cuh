// A block's part of W, in registers and shared memory, and what else it keeps there for all steps: what
// the persistent kernels are made of. exchange.cuh says what blocks tell each other.
//
// A turn is a step of a group of lanes. A pair is a unit of the block and a lane of the group; a thread
// takes the pairs of one unit, pass after pass. What a pair reads of memory is fetched some turns
// ahead, by copies that run beside the product. A pair's carry stays in shared memory.
#pragma once

#include "cuda/product.cuh"

namespace fastbptt {
namespace {

// Step: of step.cuh; Place: what a lane's steps have, computed for kPlaceSteps steps at a time: its
// loads, each of which waits for another, are then waited for once in so many steps.
template <typename Product, typename Step, typename Place, bool kTransposed>
struct OnChip {
  using scalar_t = typename Product::scalar_t;
  using x_t = typename Product::x_t;
  static constexpr TileShape kShape = tile_shape(Product::kArithmetic);
  static constexpr int kGroup = 16 / int(sizeof(x_t));  // units that are sent together
  using Group = Packed<uint32_t, 4>;

  const Tiling& tiling;
  unsigned char* const shared = dynamic_shared();
  const int rank = cluster_rank();
  // By opaque() they are divided for once.
  const int team = opaque(int(blockIdx.x) / tiling.team());
  const int block = opaque(int(blockIdx.x) - team * tiling.team());
  // Of the thread's pairs, packed to take one register: see row() and unit().
  int pair = int(threadIdx.x) / tiling.units << 16 | int(threadIdx.x) % tiling.units;
  // Where the warp's product reads of x (-1: it has none) and puts its sums: found once, since a
  // division takes as long as a tile.
  int product_x, product_sums;
  uint32_t w[kShape.held][4];

  __device__ explicit OnChip(const Tiling& tiling) : tiling(tiling) {
    const int warp = threadIdx.x / kWarp;
    const int column_warp = warp / tiling.row_warps, row_warp = warp % tiling.row_warps;
    product_x = column_warp < tiling.column_warps
                    ? column_warp * tiling.column_tiles * kShape.columns +
                          x_offset<Product>(tiling.shared.x_stride, tiling.lanes)
                    : -1;
    product_sums = column_warp * tiling.lanes * tiling.shared.sum_stride +
                   row_warp * tiling.row_tiles * kShape.rows +
                   sums_offset<Product>(tiling.shared.sum_stride);
  }

  // --- Who has what --------------------------------------------------------------------------------

  // The thread's pairs are of its unit of the block, and of lanes row, row + tiling.pair_rows, ...
  __device__ int row() const { return pair >> 16; }
  __device__ int unit() const { return pair & 0xffff; }
  __device__ int first_unit() const { return block * tiling.units; }
  __device__ int own_unit() const { return first_unit() + unit(); }
  __device__ int first_row_unit() const {
    return kTransposed ? (block - rank) * tiling.units : first_unit();
  }
  __device__ int first_column_unit() const { return kTransposed ? rank * tiling.column_units : 0; }
  __device__ int lane_of(int pass) const { return row() + pass * tiling.pair_rows; }
  __device__ bool has_pair(int pass) const {
    return row() < tiling.pair_rows && lane_of(pass) < tiling.lanes;
  }

  __device__ int turn_of(int step, int group) const { return (step << tiling.group_bits) + group; }
  __device__ int step_of(int turn) const { return turn >> tiling.group_bits; }
  __device__ int group_of(int turn) const { return turn & (tiling.groups - 1); }

  // --- Shared memory -------------------------------------------------------------------------------

  template <typename T>
  __device__ T* at(int offset) const {
    return reinterpret_cast<T*>(shared + offset);
  }
  __device__ x_t* x(int buffer) const {
    return at<x_t>(tiling.shared.x) + buffer * tiling.lanes * tiling.shared.x_stride;
  }
  __device__ float* biases() const { return at<float>(tiling.shared.biases); }
  __device__ float* sums(int group) const {
    const int buffer = tiling.shared.sum_buffers == 1 ? 0 : group;
    return at<float>(tiling.shared.sums) +
           buffer * tiling.column_warps * tiling.lanes * tiling.shared.sum_stride;
  }
  __device__ float& carried(int group, int lane) const {
    return at<float>(tiling.shared.carried)[(group * tiling.lanes + lane) * tiling.units + unit()];
  }
  __device__ scalar_t& input(int turn, int i, int lane) const {
    const int slot = turn % kRing * Step::kInputs + i;
    return at<scalar_t>(tiling.shared.inputs)[(slot * tiling.lanes + lane) * tiling.units + unit()];
  }
  __device__ Place& place(int group, int step, int lane) const {
    const int slot = group * 2 * kPlaceSteps + step % (2 * kPlaceSteps);
    return at<Place>(tiling.shared.places)[slot * tiling.lanes + lane];
  }
  // A tile beyond the registers, four of a thread's at a time.
  __device__ Group& tile_in_shared(int extra_tile, int row_tile) const {
    const int row = int(threadIdx.x) / kWarp * tiling.row_tiles + row_tile;
    const int tile = row * tiling.extra_tiles + extra_tile;
    return at<Group>(tiling.shared.weights)[tile * kWarp + threadIdx.x % kWarp];
  }

  // --- W -------------------------------------------------------------------------------------------

  __device__ void load_weights(const scalar_t* w_hh, int64_t H, int gates) {
    if (product_x < 0) return;
    const Weights<scalar_t, kTransposed> weights{w_hh,
                                                 H,
                                                 gates,
                                                 first_row_unit(),
                                                 tiling.row_units,
                                                 first_column_unit(),
                                                 tiling.column_units};
    const int two_rows = tiling.row_tiles - 1;
    FASTBPTT_UNROLL
    for (int i = 0; i < kShape.held; ++i) {
      load_tile(weights, i >> two_rows, i & two_rows, w[i]);
      if (i % 2) sync_warp();  // or the compiler has more loads under way than there are registers
    }
    const int held = kShape.held >> two_rows;
    for (int n = held; n < tiling.column_tiles; ++n) {
      for (int m = 0; m < tiling.row_tiles; ++m) {
        uint32_t tile[4];
        load_tile(weights, n, m, tile);
        tile_in_shared(n - held, m) = {tile[0], tile[1], tile[2], tile[3]};
      }
    }
  }

  __device__ void load_tile(const Weights<scalar_t, kTransposed>& weights, int n, int m,
                            uint32_t (&tile)[4]) const {
    const int thread = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int first_row = (warp % tiling.row_warps * tiling.row_tiles + m) * kShape.rows;
    const int column = (warp / tiling.row_warps * tiling.column_tiles + n) * kShape.columns;
    const int gate = column / tiling.gate_columns;
    const bool exists = n < tiling.column_tiles;
    FASTBPTT_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int64_t of_row = exists ? weights.row(first_row + Product::row(thread, i)) : -1;
      const int unit = column - gate * tiling.gate_columns + Product::column(thread, i);
      const float low = weights.at(of_row, weights.column(gate, unit));
      const bool has_two = Product::kPerRegister == 2;
      const float high = has_two ? weights.at(of_row, weights.column(gate, unit + 1)) : 0.0f;
      tile[i] = Product::pack(low, high);
    }
  }

  // --- Places and inputs -----------------------------------------------------------------------------

  // The places of a group's kPlaceSteps steps from `first` on; a barrier has to follow.
  template <typename PlaceOf>
  __device__ void compute_places(int group, int first, PlaceOf&& place_of) const {
    for (int i = threadIdx.x; i < kPlaceSteps * tiling.lanes; i += blockDim.x) {
      const int step = i / tiling.lanes, lane = i - step * tiling.lanes;
      place(group, first + step, lane) = place_of(first + step, group * tiling.lanes + lane);
    }
  }

  // Begins to copy what the thread's pair reads in a turn; for_each as in Step::for_each_input. In
  // pairs: a thread copies its neighbour's too, since no copy is of fewer than four bytes.
  template <typename ForEach>
  __device__ void fetch_pair(int turn, int lane, bool in_pairs, ForEach&& for_each) const {
    const bool copies = sizeof(scalar_t) == 4 || in_pairs;
    if (copies && unit() % (4 / int(sizeof(scalar_t))) != 0) return;
    for_each([&](int i, const scalar_t* from) {
      scalar_t* const to = &input(turn, i, lane);
      if (copies) {
        copy_async<4>(to, from, from != nullptr);
      } else {
        *to = from ? *from : from_acc<scalar_t>(0);
      }
    });
  }
  __device__ typename Step::Inputs inputs(int turn, int lane) const {
    typename Step::Inputs result;
    FASTBPTT_UNROLL
    for (int i = 0; i < Step::kInputs; ++i) result.values[i] = input(turn, i, lane);
    return result;
  }

  // --- The product -----------------------------------------------------------------------------------

  // To be called at each turn, before what it waits for: where its product reads (bytes; -1: nowhere)
  // and writes, found while the wait goes on. What depends on a thread's numbers is computed where it
  // is used, and not kept in registers over all steps.
  struct Turn {
    int x,
        sums;   // x, of a multiple of 16 bytes, has in its lowest bit whether rows of tiles are two
    int lanes;  // as of lanes_beyond
  };
  __device__ Turn begin_turn(int buffer, int group) {
    pair = opaque(pair);
    const int x_numbers = buffer * tiling.lanes * tiling.shared.x_stride + product_x;
    const int x = tiling.shared.x + x_numbers * int(sizeof(x_t));
    return {opaque(product_x < 0 ? -1 : x | (tiling.row_tiles - 1)),
            opaque(int(sums(group) - at<float>(0)) + product_sums),
            opaque(lanes_beyond<Product>(tiling.lanes))};
  }

  __device__ void multiply(const Turn& turn) const {
    if (turn.x < 0) return;
    if (turn.x & 1) {
      multiply_rows<2>(at<x_t>(turn.x - 1), turn);
    } else {
      multiply_rows<1>(at<x_t>(turn.x), turn);
    }
  }

  template <int kRows>
  __device__ void multiply_rows(const x_t* from, const Turn& turn) const {
    constexpr int kHeld = kShape.held / kRows;
    TileSums tile_sums[kRowTiles] = {};
    FASTBPTT_UNROLL
    for (int n = 0; n < kHeld; n += 2) {
      if (n > 0 && n >= tiling.column_tiles) continue;
      fastbptt::multiply<Product, kRows>(tile_sums, &w[n * kRows], from + n * kShape.columns,
                                         tiling.shared.x_stride, tiling.lanes);
    }
#pragma unroll 1
    for (int n = kHeld; n < tiling.column_tiles; n += 2) {
      uint32_t tiles[2 * kRows][4];
      FASTBPTT_UNROLL
      for (int i = 0; i < 2 * kRows; ++i) {
        const Group group = tile_in_shared(n - kHeld + i / kRows, i % kRows);
        FASTBPTT_UNROLL
        for (int j = 0; j < 4; ++j) tiles[i][j] = group.values[j];
      }
      fastbptt::multiply<Product, kRows>(tile_sums, tiles, from + n * kShape.columns,
                                         tiling.shared.x_stride, tiling.lanes);
    }
    float* const to = at<float>(0) + turn.sums;
    FASTBPTT_UNROLL
    for (int m = 0; m < kRows; ++m) {
      for_each_sum<Product>(tile_sums[m], turn.lanes, [&](int of_row, int lane, float value) {
        to[lane * tiling.shared.sum_stride + m * kShape.rows + of_row] = value;
      });
    }
  }

  // The warps' sums of n rows of W, `apart` from each other, added up in a fixed order.
  template <int n>
  __device__ void sums_of(int group, int of_row, int apart, int lane, float (&totals)[n]) const {
    const float* from = sums(group) + lane * tiling.shared.sum_stride + of_row;
    const int stride = tiling.lanes * tiling.shared.sum_stride;
    FASTBPTT_UNROLL
    for (int g = 0; g < n; ++g) totals[g] = from[g * apart];
#pragma unroll 2
    for (int i = 1; i < tiling.column_warps; ++i) {
      from += stride;
      FASTBPTT_UNROLL
      for (int g = 0; g < n; ++g) totals[g] += from[g * apart];
    }
  }
};

}  // namespace
}  // namespace fastbptt
