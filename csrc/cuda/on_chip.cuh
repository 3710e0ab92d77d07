// A block's part of W, in registers and shared memory, and the exchange of x: what both passes of a
// persistent kernel are made of.
//
// A step, of all blocks of a cluster, which has a tile of lanes:
//   wait()      until x of the step is there
//   multiply()  a warp's tiles of W with x; its sums go to shared memory
//   sync_block()
//   the cell    a thread takes a unit of one lane or two: sum() adds up the warps' sums in a fixed order
//   push()      what it computed goes to x of the next step, in all blocks
//   end_step()
// x has two buffers by turns. Where a cluster is one block, end_step() is a block's barrier. Otherwise
// an mbarrier for each buffer counts the bytes that come in. Why that is enough: a thread pushes to
// the next step's buffer, which held the x of the step before, after its wait() and a sync_block().
// By then the blocks have sent it their x of this step, after all of their threads had multiplied
// with the one before. The sums are safe likewise: wait() lasts until every thread of the block has
// pushed, which it does after its sum(). And no block ends before it has received all that is sent to
// it, since at the last step nobody sends.
#pragma once

#include "cuda/product.cuh"

namespace fastbptt {
namespace {

// Place: what the lanes' steps have, computed for kPlaceSteps steps at a time: its loads, each of which
// waits for another, are then waited for once in so many steps.
template <typename Product, typename Place, bool kTransposed>
struct OnChip {
  using scalar_t = typename Product::scalar_t;
  using x_t = typename Product::x_t;
  static constexpr TileShape kShape = tile_shape(Product::kArithmetic);
  static constexpr int kGroup = 16 / int(sizeof(x_t));  // units that are sent together
  using Group = Packed<uint32_t, 4>;

  const Tiling& tiling;
  unsigned char* const shared = dynamic_shared();
  const int rank = cluster_rank();
  int warp = threadIdx.x / kWarp;
  // The thread's pairs: its unit of the block, and lanes row, row + tiling.pair_rows.
  int row = threadIdx.x / tiling.units;
  int unit = threadIdx.x - row * tiling.units;
  uint32_t w[kShape.held][kRowTiles][4];

  __device__ explicit OnChip(const Tiling& tiling) : tiling(tiling) {}

  // --- Who has what --------------------------------------------------------------------------------

  __device__ int64_t cluster_index() const { return blockIdx.x / tiling.cluster; }
  __device__ int first_unit() const { return rank * tiling.units; }
  __device__ int own_unit() const { return first_unit() + unit; }
  __device__ int lane_of(int pass) const { return row + pass * tiling.pair_rows; }
  // Whether any thread has a pair in this pass, and whether the thread has.
  __device__ bool has_pass(int pass) const { return pass * tiling.pair_rows < tiling.lanes; }
  __device__ bool has_pair(int pass) const {
    return row < tiling.pair_rows && lane_of(pass) < tiling.lanes;
  }

  __device__ bool multiplies() const { return warp < tiling.row_warps * tiling.column_warps; }
  __device__ int row_warp() const { return warp % tiling.row_warps; }
  __device__ int column_warp() const { return warp / tiling.row_warps; }
  __device__ int first_row() const { return row_warp() * tiling.row_tiles * kShape.rows; }
  __device__ int first_column() const {
    return column_warp() * tiling.column_tiles * kShape.columns;
  }

  // --- Shared memory -------------------------------------------------------------------------------

  __device__ Barrier* barrier(int64_t step) const {
    return reinterpret_cast<Barrier*>(shared) + step % 2;
  }
  __device__ x_t* x(int64_t step) const {
    return reinterpret_cast<x_t*>(shared + tiling.shared.x) +
           step % 2 * tiling.lanes * tiling.shared.x_stride;
  }
  __device__ float* biases() const {
    return reinterpret_cast<float*>(shared + tiling.shared.biases);
  }
  __device__ float* sums() const { return reinterpret_cast<float*>(shared + tiling.shared.sums); }
  __device__ Place& place(int64_t step, int lane) const {
    return reinterpret_cast<Place*>(
        shared + tiling.shared.places)[step % (2 * kPlaceSteps) * kTileLanes + lane];
  }
  // A tile beyond the registers, four of a thread's at a time.
  __device__ Group& tile_in_shared(int column_tile, int row_tile) const {
    const int row = warp * tiling.row_tiles + row_tile;
    const int tile = row * tiling.extra_tiles + column_tile - kShape.held;
    return reinterpret_cast<Group*>(shared +
                                    tiling.shared.weights)[tile * kWarp + threadIdx.x % kWarp];
  }

  // --- Before the first step -----------------------------------------------------------------------

  // initial(lane, column): x of step 0, zero in columns of padding. bias(row): added to y.
  template <typename Initial, typename Bias, typename PlaceOf>
  __device__ void start(const Weights<scalar_t, kTransposed>& weights, Initial&& initial,
                        Bias&& bias, PlaceOf&& place_of) {
    if (tiling.cluster > 1 && threadIdx.x == 0) {
      barrier_init(barrier(0), 1);
      barrier_init(barrier(1), 1);
      fence_barrier_init();
    }
    const int numbers = tiling.lanes * tiling.shared.x_stride;
    for (int i = threadIdx.x; i < numbers; i += blockDim.x) {
      const int lane = i / tiling.shared.x_stride;
      x(0)[i] = Product::to_x(initial(lane, i - lane * tiling.shared.x_stride));
      x(1)[i] = Product::to_x(0);
    }
    const int used_rows = (kTransposed ? 1 : weights.gates) * tiling.units;
    for (int i = threadIdx.x; i < used_rows; i += blockDim.x) biases()[i] = bias(i);
    compute_places(0, place_of);
    if (multiplies()) load_weights(weights);
    if (tiling.cluster > 1) {
      sync_cluster();
    } else {
      sync_block();
    }
  }

  __device__ void load_weights(const Weights<scalar_t, kTransposed>& weights) {
    FASTBPTT_UNROLL
    for (int n = 0; n < kShape.held; ++n) {
      FASTBPTT_UNROLL
      for (int m = 0; m < kRowTiles; ++m) load_tile(weights, n, m, w[n][m]);
      sync_warp();  // or the compiler has more loads under way than there are registers
    }
    for (int n = kShape.held; n < tiling.column_tiles; ++n) {
      for (int m = 0; m < tiling.row_tiles; ++m) {
        uint32_t tile[4];
        load_tile(weights, n, m, tile);
        tile_in_shared(n, m) = {tile[0], tile[1], tile[2], tile[3]};
      }
    }
  }

  __device__ void load_tile(const Weights<scalar_t, kTransposed>& weights, int n, int m,
                            uint32_t (&tile)[4]) const {
    const int thread = threadIdx.x % kWarp;
    const int column = first_column() + n * kShape.columns;
    const int gate = column / tiling.gate_columns;
    const bool exists = n < tiling.column_tiles && m < tiling.row_tiles;
    FASTBPTT_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int64_t of_row =
          exists ? weights.row(first_row() + m * kShape.rows + Product::row(thread, i)) : -1;
      const int64_t unit = column - gate * tiling.gate_columns + Product::column(thread, i);
      const float low = weights.at(of_row, weights.column(gate, unit));
      const bool has_two = Product::kPerRegister == 2;
      const float high = has_two ? weights.at(of_row, weights.column(gate, unit + 1)) : 0.0f;
      tile[i] = Product::pack(low, high);
    }
  }

  // The places of the kPlaceSteps steps from `first` on; a barrier has to follow.
  template <typename PlaceOf>
  __device__ void compute_places(int64_t first, PlaceOf&& place_of) const {
    for (int i = threadIdx.x; i < kPlaceSteps * tiling.lanes; i += blockDim.x) {
      const int64_t step = first + i / tiling.lanes;
      const int lane = i % tiling.lanes;
      place(step, lane) = place_of(step, lane);
    }
  }

  // --- A step --------------------------------------------------------------------------------------

  __device__ void wait(int64_t step) {
    warp = opaque(warp), row = opaque(row), unit = opaque(unit);
    if (tiling.cluster > 1 && step > 0) barrier_wait(barrier(step), int((step - 1) / 2 % 2));
  }

  __device__ void multiply(int64_t step) const {
    if (!multiplies()) return;
    TileSums tile_sums[kRowTiles] = {};
    const x_t* const from = x(step) + first_column();
    FASTBPTT_UNROLL
    for (int n = 0; n < kShape.held; n += 2) {
      if (n >= tiling.column_tiles) continue;
      fastbptt::multiply<Product>(tile_sums, w[n], w[n + 1], tiling.row_tiles,
                                  from + n * kShape.columns, tiling.shared.x_stride, tiling.lanes);
    }
    for (int n = kShape.held; n < tiling.column_tiles; n += 2) {
      uint32_t tiles[2][kRowTiles][4] = {};
      FASTBPTT_UNROLL
      for (int i = 0; i < 2 * kRowTiles; ++i) {
        if (i % kRowTiles >= tiling.row_tiles) continue;
        const Group group = tile_in_shared(n + i / kRowTiles, i % kRowTiles);
        FASTBPTT_UNROLL
        for (int j = 0; j < 4; ++j) tiles[i / kRowTiles][i % kRowTiles][j] = group.values[j];
      }
      fastbptt::multiply<Product>(tile_sums, tiles[0], tiles[1], tiling.row_tiles,
                                  from + n * kShape.columns, tiling.shared.x_stride, tiling.lanes);
    }
    float* const to = sums() + column_warp() * kTileLanes * tiling.shared.sum_stride + first_row();
    FASTBPTT_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      if (m >= tiling.row_tiles) continue;
      for_each_sum<Product>(tile_sums[m], [&](int of_row, int lane, float value) {
        to[lane * tiling.shared.sum_stride + m * kShape.rows + of_row] = value;
      });
    }
  }

  // y of a row of W and a lane.
  __device__ float sum(int of_row, int lane) const {
    const float* from = sums() + lane * tiling.shared.sum_stride + of_row;
    float total = *from;
    for (int i = 1; i < tiling.column_warps; ++i) {
      from += kTileLanes * tiling.shared.sum_stride;
      total += *from;
    }
    return total + biases()[of_row];
  }

  // To be called once before a step's pushes: how many bytes come in for x of the step.
  __device__ void announce(int64_t step, int column_gates) const {
    if (tiling.cluster == 1 || threadIdx.x > 0) return;
    const int numbers = tiling.cluster * tiling.units * tiling.lanes * column_gates;
    barrier_arrive_expect_bytes(barrier(step), numbers * int(sizeof(x_t)));
  }

  // Puts the value of the thread's pair into x of a step, in all blocks. Collective over the warp.
  __device__ void push(int64_t step, int pass, int gate, float value) const {
    const int lane = lane_of(pass), column = gate * tiling.gate_columns + first_unit() + unit;
    const bool has = has_pair(pass);
    if (tiling.cluster == 1) {
      if (has) x(step)[lane * tiling.shared.x_stride + column] = Product::to_x(value);
      return;
    }
    const Group group = gather(value);
    if (!has) return;
    // Each of the group's threads sends it to other blocks.
    const int member = unit % kGroup;
    auto* const to =
        reinterpret_cast<Group*>(x(step) + lane * tiling.shared.x_stride + column - member);
    for (int peer = member; peer < tiling.cluster; peer += kGroup) {
      store_async(map_shared(to, peer), group, map_shared(barrier(step), peer));
    }
  }

  // The numbers of kGroup threads beside each other, for each of them.
  static __device__ Group gather(float value) {
    uint32_t word;
    int mask = 1;
    if constexpr (sizeof(x_t) == 2) {
      const float other = shuffle_xor(value, 1);
      const bool is_high = threadIdx.x & 1;
      word = Product::pack(is_high ? other : value, is_high ? value : other);
      mask = 2;
    } else {
      word = bits_of_float(Product::to_x(value));
    }
    const uint32_t second = shuffle_xor(word, mask);
    const bool is_second = threadIdx.x & unsigned(mask);
    const uint32_t low = is_second ? second : word, high = is_second ? word : second;
    const uint32_t other_low = shuffle_xor(low, 2 * mask), other_high = shuffle_xor(high, 2 * mask);
    if (threadIdx.x & unsigned(2 * mask)) return {other_low, other_high, low, high};
    return {low, high, other_low, other_high};
  }

  __device__ void end_step() const {
    if (tiling.cluster == 1) sync_block();
  }
};

}  // namespace
}  // namespace fastbptt
