// The product of a step with W on the chip, tile by tile, in each of the arithmetics.
//
// A tile of W is four registers of each thread of a warp: two 16-bit numbers in each, or one of 32
// bits. The tensor cores take tiles as they are, the rows of W for the product's rows, and the lanes
// of x for its eight columns. x is in shared memory, a row for each lane.
#pragma once

#include <cstring>

#include "cuda/device.cuh"
#include "cuda/tiling.h"

namespace fastbptt {
namespace {

__device__ __forceinline__ uint32_t bits_of_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
__device__ __forceinline__ float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// What a thread of the tensor cores sums, of two rows of tiles or else for two pairs of columns in turn.
using TileSums = float[kRowTiles][2][4];

// What one of plain sums, for so many lanes: of its row of two rows of tiles, or else of every other tile.
template <int lanes>
struct LaneSums {
  float of[kRowTiles][lanes];
};

}  // namespace

// half_t or bfloat16_t.
template <typename number>
struct TensorCores {
  using scalar_t = number;  // as stored
  using x_t = number;
  static constexpr Arithmetic kArithmetic = Arithmetic::kTensor16;
  static constexpr int kPerRegister = 2;

  // Where register i of the thread stands in a tile of W: its row, and its first column.
  static __device__ __forceinline__ int row(int thread, int i) { return thread / 4 + 8 * (i % 2); }
  static __device__ __forceinline__ int column(int thread, int i) {
    return 2 * (thread % 4) + 8 * (i / 2);
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    return pack_pair<number>(low, high);
  }
  static __device__ __forceinline__ x_t to_x(float value) { return from_acc<x_t>(value); }
  static __device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&w)[4],
                                                      const uint32_t (&x)[2]) {
    mma_m16n8k16<number>(sums, w, x);
  }
};

struct Tf32Cores {
  using scalar_t = float;
  using x_t = float;
  static constexpr Arithmetic kArithmetic = Arithmetic::kTf32;
  static constexpr int kPerRegister = 1;

  static __device__ __forceinline__ int row(int thread, int i) { return thread / 4 + 8 * (i % 2); }
  static __device__ __forceinline__ int column(int thread, int i) {
    return thread % 4 + 4 * (i / 2);
  }
  static __device__ __forceinline__ uint32_t pack(float value, float) {
    return round_to_tf32(value);
  }
  static __device__ __forceinline__ x_t to_x(float value) {
    return float_of_bits(round_to_tf32(value));
  }
  static __device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&w)[4],
                                                      const uint32_t (&x)[2]) {
    mma_m16n8k8(sums, w, x);
  }
};

// float32 as it is. A thread has a row of the tile, and all threads read the same of x.
struct PlainFma {
  using scalar_t = float;
  using x_t = float;
  static constexpr Arithmetic kArithmetic = Arithmetic::kFma;
  static constexpr int kPerRegister = 1;

  static __device__ __forceinline__ int row(int thread, int) { return thread; }
  static __device__ __forceinline__ int column(int, int i) { return i; }
  static __device__ __forceinline__ uint32_t pack(float value, float) {
    return bits_of_float(value);
  }
  static __device__ __forceinline__ x_t to_x(float value) { return value; }
};

namespace {

// Where a warp's thread begins to read of x: numbers from the first lane's first column.
template <typename Product>
__device__ __forceinline__ int x_offset(int x_stride, int lanes) {
  if constexpr (Product::kArithmetic == Arithmetic::kFma) return 0;
  // Matrices of 8 lanes by 16 bytes, two for each tile. Lanes that are not there read the first one's
  // numbers: no other lane's sums depend on them.
  const int thread = threadIdx.x % kWarp, lane = thread % kTileLanes;
  return (lane < lanes ? lane : 0) * x_stride +
         thread / kTileLanes * (16 / int(sizeof(typename Product::x_t)));
}

// Adds to sums the products of two tiles beside each other, the `pair`-th, for each of kRows rows of
// tiles. w: those of the first, then of the second; x: from x_offset on.
template <typename Product, int kRows>
__device__ __forceinline__ void multiply(TileSums& sums, const uint32_t (*w)[4],
                                         const typename Product::x_t* x, int, int, int pair) {
  uint32_t matrices[4];
  load_matrix_x4(matrices, x);
  const uint32_t x0[2] = {matrices[0], matrices[1]}, x1[2] = {matrices[2], matrices[3]};
  // Four sums, of two rows or else of two pairs, do not wait for each other.
  FASTBPTT_UNROLL
  for (int m = 0; m < kRows; ++m) {
    float (&own)[2][4] = sums[kRows == 1 ? pair % kRowTiles : m];
    Product::multiply_add(own[0], w[m], x0);
    Product::multiply_add(own[1], w[kRows + m], x1);
  }
}

// The same of float32 as it is. x: the first lane's row, with so much to the next one's.
template <typename Product, int kRows, int kLanes>
__device__ __forceinline__ void multiply(LaneSums<kLanes>& sums, const uint32_t (*w)[4],
                                         const float* x, int x_stride, int lanes, int) {
  constexpr int kColumns = tile_shape(Arithmetic::kFma).columns;
  FASTBPTT_UNROLL
  for (int lane = 0; lane < kLanes; ++lane) {
    if (kLanes > 1 && lane >= lanes) continue;
    const auto* const from = reinterpret_cast<const Packed<float, kColumns>*>(x + lane * x_stride);
    const auto x0 = from[0], x1 = from[1];
    FASTBPTT_UNROLL
    for (int m = 0; m < kRows; ++m) {
      FASTBPTT_UNROLL
      for (int j = 0; j < kColumns; ++j) {
        sums.of[m][lane] += float_of_bits(w[m][j]) * x0.values[j];
        // One that waits for none of these, of another tile if there is no other row.
        if (kRows == 1) sums.of[1][lane] += float_of_bits(w[1][j]) * x1.values[j];
      }
    }
    FASTBPTT_UNROLL
    for (int m = 0; m < kRows && kRows > 1; ++m) {
      FASTBPTT_UNROLL
      for (int j = 0; j < kColumns; ++j) {
        sums.of[m][lane] += float_of_bits(w[kRows + m][j]) * x1.values[j];
      }
    }
  }
}

// The thread's first row and lane of a tile's sums: where it puts them, with so much from lane to lane.
template <typename Product>
__device__ __forceinline__ int sums_offset(int stride) {
  const int thread = threadIdx.x % kWarp;
  if constexpr (Product::kArithmetic == Arithmetic::kFma) return thread;
  return 2 * (thread % 4) * stride + thread / 4;
}

// Stores the sums of kRows rows of tiles, from the thread's first row and lane on, for the lanes that
// there are.
template <int kRows>
__device__ __forceinline__ void store_sums(const TileSums& sums, int lanes, float* to, int stride) {
  const int own_lanes = lanes - 2 * int(threadIdx.x % 4);
  FASTBPTT_UNROLL
  for (int m = 0; m < kRows; ++m) {
    FASTBPTT_UNROLL
    for (int i = 0; i < 4; ++i) {
      float sum = sums[m][0][i] + sums[m][1][i];
      if (kRows == 1) sum += sums[1][0][i] + sums[1][1][i];
      if (i % 2 < own_lanes) to[i % 2 * stride + m * 16 + 8 * (i / 2)] = sum;
    }
  }
}
template <int kRows, int kLanes>
__device__ __forceinline__ void store_sums(const LaneSums<kLanes>& sums, int lanes, float* to,
                                           int stride) {
  FASTBPTT_UNROLL
  for (int lane = 0; lane < kLanes; ++lane) {
    FASTBPTT_UNROLL
    for (int m = 0; m < kRows; ++m) {
      if (kLanes > 1 && lane >= lanes) continue;
      const float other = kRows == 1 ? sums.of[1][lane] : 0.0f;
      to[lane * stride + m * kWarp] = sums.of[m][lane] + other;
    }
  }
}

// The block's part of W_hh, or of its transpose, of any size: what is beyond it is zeros.
template <typename scalar_t, bool kTransposed>
struct Weights {
  const scalar_t* w_hh;  // [G*H, H]
  int64_t H;
  int gates;
  int first_row_unit, row_units;  // of each of the rows' gates
  int first_column_unit, column_units;

  // Offsets of a row, and of a column of a gate; -1 if there is none.
  __device__ __forceinline__ int64_t row(int i) const {
    const int gate = i / row_units;
    const int64_t unit = first_row_unit + i - gate * row_units;
    if (unit >= H || gate >= (kTransposed ? 1 : gates)) return -1;
    return kTransposed ? unit : (gate * H + unit) * H;
  }
  __device__ __forceinline__ int64_t column(int gate, int i) const {
    const int64_t unit = first_column_unit + i;
    if (i >= column_units || unit >= H || gate >= (kTransposed ? gates : 1)) return -1;
    return kTransposed ? (gate * H + unit) * H : unit;
  }
  __device__ __forceinline__ float at(int64_t row, int64_t column) const {
    return row < 0 || column < 0 ? 0.0f : to_acc(w_hh[row + column]);
  }
};

}  // namespace
}  // namespace fastbptt
