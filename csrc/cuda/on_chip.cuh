// A block's part of W, in registers and shared memory, and what else it keeps there for all steps: what
// the persistent kernels are made of. exchange.cuh says what blocks tell each other.
//
// A pair is a unit of the block and a lane; the first threads compute one each. What goes between
// global and shared memory is carried by the threads from the other end of the block, a stretch of
// neighbouring pairs each, while the pairs are computed: inputs some steps ahead, results one behind.
//
// A step is short enough for every instruction to count: branches, the kernel's arguments and chains of
// addresses take far longer than arithmetic. So what does not change is found before the first step.
#pragma once

#include "cuda/product.cuh"
#include "cuda/step_memory.cuh"

namespace fastbptt {
namespace {

// Step: of step.cuh; Place: what a lane's steps have, computed for kPlaceSteps steps at a time: its
// loads, each of which waits for another, are then waited for once in so many steps.
template <typename Product, typename Step, typename Place, bool kTransposed>
struct OnChip : StepMemory<Step, Place, kRing, 2 * kPlaceSteps> {
  using Base = StepMemory<Step, Place, kRing, 2 * kPlaceSteps>;
  using Base::inputs, Base::results, Base::place, Base::tiling;
  using typename Base::Group;
  using scalar_t = typename Product::scalar_t;
  using x_t = typename Product::x_t;
  static constexpr TileShape kShape = tile_shape(Product::kArithmetic);
  static constexpr int kGroup = 16 / int(sizeof(x_t));  // numbers that are taken together

  // Found once, since a division takes as long as a tile; see begin_step().
  int team = int(blockIdx.x) / this->tiling.team();
  // Of the thread's pair: its lane, or one that there is not.
  int lane = int(threadIdx.x) / this->tiling.units;
  int carried = -1;  // what the thread carries, packed: see carried_pair()
  // Where the warp's product reads of x (bytes; -1: it has none) and puts its sums, and where the
  // pair's begin.
  int product_x, product_sums, own_sums;
  int tiles = this->tiling.row_tiles << 16 | this->tiling.column_tiles;  // the product's
  uint32_t w[kShape.held][4];

  __device__ explicit OnChip(const Tiling& tiling) : Base(tiling) {
    const int warp = threadIdx.x / kWarp;
    const int column_warp = warp / tiling.row_warps, row_warp = warp % tiling.row_warps;
    const int x_numbers = column_warp * tiling.column_tiles * kShape.columns +
                          x_offset<Product>(tiling.shared.x_stride, tiling.lanes);
    product_x =
        column_warp < tiling.column_warps ? tiling.shared.x + x_numbers * int(sizeof(x_t)) : -1;
    product_sums = tiling.shared.sums +
                   4 * ((column_warp + kBiases) * tiling.lanes * tiling.shared.sum_stride +
                        row_warp * tiling.row_tiles * kShape.rows +
                        sums_offset<Product>(tiling.shared.sum_stride));
    own_sums = tiling.shared.sums + 4 * (lane * tiling.shared.sum_stride + unit());
  }

  // Of H units, so many beside each other at a time; see Step::is_aligned.
  __device__ void share_carrying(int64_t H, int stretch) {
    const int pair = (int(blockDim.x) - 1 - int(threadIdx.x)) * stretch, lane = pair / tiling.units;
    const bool exists = lane < tiling.lanes && first_unit() + pair - lane * tiling.units < H;
    carried = exists ? stretch << 24 | lane << 16 | pair : -1;
  }

  // To be called at each step: what is made of a thread's numbers is made where it is used, and does not
  // stay over all steps in registers that W needs.
  __device__ void begin_step() {
    team = opaque(team);
    lane = opaque(lane);
    carried = opaque(carried);
    product_x = opaque(product_x);
    product_sums = opaque(product_sums);
    own_sums = opaque(own_sums);
    tiles = opaque(tiles);
  }

  // --- Who has what --------------------------------------------------------------------------------

  __device__ static int rank() { return cluster_rank(); }
  __device__ int block() const { return int(blockIdx.x) - team * tiling.team(); }
  __device__ int first_unit() const { return block() * tiling.units; }
  __device__ int unit() const { return int(threadIdx.x) - lane * tiling.units; }
  __device__ int own_unit() const { return first_unit() + unit(); }
  __device__ int first_row_unit() const {
    return kTransposed ? (block() - rank()) * tiling.units : first_unit();
  }
  __device__ int first_column_unit() const {
    return kTransposed ? rank() * tiling.column_units : 0;
  }
  // A stretch of pairs of one lane, from carried_pair() on.
  __device__ int carried_pair() const { return carried & 0xffff; }
  __device__ int carried_lane() const { return carried >> 16 & 0xff; }
  __device__ int carried_unit() const {
    return first_unit() + carried_pair() - carried_lane() * tiling.units;
  }
  __device__ int carried_bytes() const { return (carried >> 24) * int(sizeof(scalar_t)); }
  __device__ bool has_pair() const { return lane < tiling.lanes; }
  // Whether a thread of the warp has one.
  __device__ bool has_pairs() const { return int(threadIdx.x & ~31u) < tiling.pairs(); }

  // --- Shared memory -------------------------------------------------------------------------------

  __device__ x_t* x(int buffer) const {
    return this->template at<x_t>(tiling.shared.x) + buffer * x_numbers();
  }
  __device__ int x_numbers() const { return tiling.lanes * tiling.shared.x_stride; }
  // Forward, before the warps' sums stand the biases: what all of them begin with.
  static constexpr int kBiases = kTransposed ? 0 : 1;
  __device__ float* sums() const { return this->template at<float>(tiling.shared.sums); }
  // A tile beyond the registers, four of a thread's at a time.
  __device__ Group& tile_in_shared(int extra_tile, int row_tile) const {
    const int row = int(threadIdx.x) / kWarp * tiling.row_tiles + row_tile;
    const int tile = row * tiling.extra_tiles + extra_tile;
    return this->template at<Group>(tiling.shared.weights)[tile * kWarp + threadIdx.x % kWarp];
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

  // --- Places, inputs and results --------------------------------------------------------------------

  // Whether the warp works behind the others, on what is carried and on places.
  __device__ bool is_behind(int stretch) const {
    const int from_end = int(blockDim.x - 1) - int(threadIdx.x | 31u);
    return from_end < tiling.pairs() / stretch || from_end < kPlaceSteps * tiling.lanes;
  }

  // The places of kPlaceSteps steps from `first` on, by those who are behind; a barrier has to follow.
  template <typename PlaceOf>
  __device__ void compute_places(int first, PlaceOf&& place_of) const {
    for (int i = int(blockDim.x - 1 - threadIdx.x); i < kPlaceSteps * tiling.lanes;
         i += blockDim.x) {
      const int step = i / tiling.lanes, lane = i - step * tiling.lanes;
      place(first + step, lane) = place_of(first + step, lane);
    }
  }

  // Begins to copy what the thread carries of a step's inputs; for_each(fn) as Step::for_each_input.
  template <typename ForEach>
  __device__ void fetch(int step, ForEach&& for_each) const {
    const auto to = [&](int i) { return inputs(step, i) + carried_pair(); };
    const int bytes = carried_bytes();
    if (bytes == 16) {
      for_each([&](int i, const scalar_t* from) { copy_async<16>(to(i), from, from != nullptr); });
    } else if (bytes == 4) {
      for_each([&](int i, const scalar_t* from) { copy_async<4>(to(i), from, from != nullptr); });
    } else {
      for_each([&](int i, const scalar_t* from) { *to(i) = from ? *from : from_acc<scalar_t>(0); });
    }
  }
  // Stores what the thread carries of a step's results; for_each(fn) as Step::for_each_result.
  template <typename ForEach>
  __device__ void store(int step, ForEach&& for_each) const {
    const int bytes = carried_bytes();
    if (bytes == 16) {
      for_each([&](int i, scalar_t* to) { copy_result<Group>(step, i, to); });
    } else if (bytes == 4) {
      for_each([&](int i, scalar_t* to) { copy_result<uint32_t>(step, i, to); });
    } else {
      for_each([&](int i, scalar_t* to) { *to = results(step, i)[carried_pair()]; });
    }
  }
  template <typename T>
  __device__ void copy_result(int step, int i, scalar_t* to) const {
    *reinterpret_cast<T*>(to) = *reinterpret_cast<const T*>(results(step, i) + carried_pair());
  }

  // --- The product -----------------------------------------------------------------------------------

  // Of x in the buffer, into sums; a barrier has to follow.
  __device__ void multiply(int buffer) const {
    if (product_x < 0) return;
    const x_t* const from = this->template at<x_t>(product_x) + buffer * x_numbers();
    if (tiles >> 16 == 2) {
      multiply_rows<2>(from);
    } else {
      multiply_rows<1>(from);
    }
  }

  template <int kRows>
  __device__ void multiply_rows(const x_t* from) const {
    float* const to = this->template at<float>(product_sums);
    if constexpr (Product::kArithmetic != Arithmetic::kFma) {
      multiply_lanes<kRows, TileSums>(from, tiling.lanes, to);
    } else if (tiling.lanes == 1) {
      multiply_lanes<kRows, LaneSums<1>>(from, 1, to);
    } else {
      multiply_lanes<kRows, LaneSums<kTileLanes>>(from, tiling.lanes, to);
    }
  }

  template <int kRows, typename Sums>
  __device__ void multiply_lanes(const x_t* from, int lanes, float* to) const {
    Sums sums = {};
    multiply_held<kRows, 0>(sums, from, lanes);
    store_sums<kRows>(sums, lanes, to, tiling.shared.sum_stride);
  }

  // The tiles in registers, one, two or four pairs of columns at a time: a branch takes as long as a
  // pair, and so does one that is not there but has to be passed over.
  template <int kRows, int kPair, typename Sums>
  __device__ void multiply_held(Sums& sums, const x_t* from, int lanes) const {
    constexpr int kPairs = kShape.held / kRows / 2, kStep = kPair == 0 ? 1 : kPair;
    constexpr int kEnd = kPair + kStep < kPairs ? kPair + kStep : kPairs;
    if constexpr (kPair < kPairs) {
      if (2 * kPair >= (tiles & 0xffff)) return;
      FASTBPTT_UNROLL
      for (int n = kPair; n < kEnd; ++n) {
        fastbptt::multiply<Product, kRows>(sums, &w[2 * n * kRows], from + 2 * n * kShape.columns,
                                           tiling.shared.x_stride, lanes, n);
      }
      multiply_held<kRows, kEnd>(sums, from, lanes);
    } else {
      multiply_extra<kRows>(sums, from, lanes);
    }
  }

  // Those in shared memory.
  template <int kRows, typename Sums>
  __device__ void multiply_extra(Sums& sums, const x_t* from, int lanes) const {
    constexpr int kHeld = kShape.held / kRows;
#pragma unroll 1
    for (int n = kHeld; n < (tiles & 0xffff); n += 2) {
      uint32_t extra[2 * kRows][4];
      FASTBPTT_UNROLL
      for (int i = 0; i < 2 * kRows; ++i) {
        const Group group = tile_in_shared(n - kHeld + i / kRows, i % kRows);
        FASTBPTT_UNROLL
        for (int j = 0; j < 4; ++j) extra[i][j] = group.values[j];
      }
      fastbptt::multiply<Product, kRows>(sums, extra, from + n * kShape.columns,
                                         tiling.shared.x_stride, lanes, 0);
    }
  }

  // The warps' sums of n rows of W, `apart` from each other, added up in a fixed order.
  template <int n>
  __device__ void sums_of(int apart, float (&totals)[n]) const {
    const float* from = this->template at<float>(own_sums);
    const int stride = tiling.lanes * tiling.shared.sum_stride;
    // Of two warps, or biases and two, no load waits for another, nor for a branch.
    const int warps = tiling.column_warps;
    FASTBPTT_UNROLL
    for (int g = 0; g < n; ++g) totals[g] = from[g * apart];
    FASTBPTT_UNROLL
    for (int g = 0; g < n && kBiases > 0; ++g) totals[g] += from[stride + g * apart];
    from += (1 + kBiases) * stride;
    FASTBPTT_UNROLL
    for (int g = 0; g < n; ++g) totals[g] += warps > 1 ? from[g * apart] : 0.0f;
#pragma unroll 1
    for (int i = 2; i < warps; i += 2) {
      from += stride;
      const float* const second = from + stride;
      FASTBPTT_UNROLL
      for (int g = 0; g < n; ++g) {
        totals[g] += from[g * apart] + (i + 1 < warps ? second[g * apart] : 0.0f);
      }
      from = second;
    }
  }
};

}  // namespace
}  // namespace fastbptt
