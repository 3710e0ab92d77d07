// Sums over time of outer products: the gradients of weights and biases.
#pragma once

#include "cpu/schedule.h"

namespace fastbptt {
namespace {

// Elements of scratch that a thread needs for `OuterProduct::add`.
template <typename scalar_t>
constexpr int64_t outer_product_scratch() {
  return kBlockRows * kPanelVecs * kLanes<scalar_t>;
}

// One side of the products: d, [num_rows, gates * units] with row stride `stride`; its j-th group
// of columns belongs to rows order[j] * units ... of the result.
template <typename scalar_t>
struct OuterProduct {
  const scalar_t* d;
  int64_t stride;
  int64_t num_rows;
  int gates;
  const int* order;
  int64_t units;
  bool accumulate;  // add to the result rather than fill it

  using V = Vec<scalar_t>;
  static constexpr int W = kLanes<scalar_t>;

  // dw[order[j] * units + m][n] (+)= sum over r of d[r][j * units + m] row_at(r)[n] for the units m
  // in `range`; a null row is zero.
  template <typename RowAt>
  void add(scalar_t* dw, int64_t columns, Range range, scalar_t* scratch, RowAt&& row_at) const {
    const Packed<scalar_t> shape{scratch, kBlockRows, columns, 1, kPanelVecs, nullptr};
    alignas(64) char storage[kMaxTile];
    scalar_t* acc = reinterpret_cast<scalar_t*>(storage);
    for_each_tile(0, num_rows, kBlockRows, [&](int64_t first, int64_t depth) {
      for (int64_t q = 0; q < shape.panels(); ++q) {
        const int64_t vecs = shape.vecs_in(q);
        for (int64_t k = 0; k < depth; ++k) {
          const scalar_t* row = row_at(first + k);
          for_each_unit_vec(shape, q, [&](int64_t v, int64_t column, auto count) {
            store(scratch + (k * vecs + v) * W, row ? load_first(row + column, count) : V{});
          });
        }
        for (int j = 0; j < gates; ++j) {
          const scalar_t* from = d + first * stride + j * units;
          scalar_t* to = dw + order[j] * units * columns;
          for_each_tile(range.begin, range.end, tile_rows(vecs), [&](int64_t m, int64_t height) {
            run_tile<scalar_t, Left::kByColumn>(height, vecs, from + m, stride, scratch, depth,
                                                acc);
            for (int64_t i = 0; i < height; ++i) {
              scalar_t* row = to + (m + i) * columns;
              for_each_unit_vec(shape, q, [&](int64_t v, int64_t column, auto count) {
                V sum = load(acc + (i * vecs + v) * W);
                if (accumulate || first > 0) sum += load_first(row + column, count);
                store_first(row + column, sum, count);
              });
            }
          });
        }
      }
    });
  }

  // sums[order[j] * units + m] (+)= sum over r of d[r][j * units + m] for the units m in `range`.
  void add_sums(scalar_t* sums, Range range) const {
    for (int j = 0; j < gates; ++j) {
      for (int64_t m = range.begin; m < range.end; m += W) {
        const int64_t count = min(W, range.end - m);
        scalar_t* to = sums + order[j] * units + m;
        V sum{};
        for_each_tile(0, num_rows, kSumLength, [&](int64_t first, int64_t rows) {
          V part{};
          for (int64_t r = first; r < first + rows; ++r) {
            part += load_first(d + r * stride + j * units + m, count);
          }
          sum += part;
        });
        if (accumulate) sum += load_first(to, count);
        store_first(to, sum, count);
      }
    }
  }
};

}  // namespace
}  // namespace fastbptt
