// Sums over time of outer products: the gradients of weights and biases.
#pragma once

#include "cpu/schedule.h"

namespace fastbptt {
namespace {

template <typename scalar_t>
void convert(scalar_t* to, const Accumulator<scalar_t>* from, Range elements) {
  for (int64_t i = elements.begin; i < elements.end; i += kLanes<scalar_t>) {
    store_first(to + i, load_first(from + i, elements.end - i), elements.end - i);
  }
}

// The sums that become the weights' gradients. Where those have 16 bits the sums are kept apart from
// them, and rounded when they are complete; else they are the same.
template <typename scalar_t>
struct WeightGradients {
  using acc_t = Accumulator<scalar_t>;
  acc_t *w_ih, *w_hh, *b_ih, *b_hh, *w_hr;  // as in BwdParams

  WeightGradients() = default;
  WeightGradients(const BwdParams<scalar_t>& p, int64_t gates, Arena* arena) {
    for_each(p, gates, [&](acc_t** sum, scalar_t* result, int64_t count) {
      if constexpr (kIsRounded<scalar_t>) {
        *sum = arena->take<acc_t>(result ? count : 0);
      } else {
        *sum = result;
      }
    });
  }

  // Rounds a share of each.
  void finish(const BwdParams<scalar_t>& p, int64_t gates, const Worker& worker) {
    for_each(p, gates, [&](acc_t** sum, scalar_t* result, int64_t count) {
      if (result) convert(result, *sum, share(count, worker.id, worker.count));
    });
  }

 private:
  template <typename Fn>
  void for_each(const BwdParams<scalar_t>& p, int64_t gates, Fn&& fn) {
    fn(&w_ih, p.d_w_ih, gates * p.H * p.I);
    fn(&w_hh, p.d_w_hh, gates * p.H * p.R);
    fn(&b_ih, p.d_b_ih, gates * p.H);
    fn(&b_hh, p.d_b_hh, gates * p.H);
    fn(&w_hr, p.d_w_hr, p.R * p.H);
  }
};

// Elements of scratch that a thread needs for `OuterProduct::add` of so many rows.
template <typename operand_t>
constexpr int64_t outer_product_scratch(int64_t rows) {
  constexpr int P = kPair<operand_t>;
  return min(kBlockRows, ceil_div(rows, P) * P) * kPanelVecs * kLanes<operand_t>;
}

// One side of the products: d, [num_rows, gates * units] with row stride `stride`; its j-th group
// of columns belongs to rows order[j] * units ... of the result. The products are those of numbers
// stored as operand_t: where that is less than what d has, d is rounded.
template <typename operand_t>
struct OuterProduct {
  using acc_t = Accumulator<operand_t>;
  using V = Vec<operand_t>;
  static constexpr int W = kLanes<operand_t>, P = kPair<operand_t>;

  const acc_t* d;
  int64_t stride;
  int64_t num_rows;
  int gates;
  const int* order;
  int64_t units;
  bool accumulate;   // add to the result rather than fill it
  operand_t* pairs;  // [kBlockRows / 2, stride, 2] for d as pairs of rows, or null: not needed

  // dw[order[j] * units + m][n] (+)= sum over r of d[r][j * units + m] row_at(r)[n] for the units m
  // in `range`; a null row is zero. Rows may be stored as any type.
  template <typename RowAt>
  void add(acc_t* dw, int64_t columns, Range range, operand_t* scratch, RowAt&& row_at) const {
    if (num_rows <= kFewRows) return add_few(dw, columns, range, row_at);
    const Packed<operand_t> shape{scratch, kBlockRows, columns, 1, kPanelVecs, nullptr};
    alignas(64) char storage[kMaxTile];
    acc_t* acc = reinterpret_cast<acc_t*>(storage);
    for_each_tile(0, num_rows, kBlockRows, [&](int64_t first, int64_t rows) {
      const int64_t depth = ceil_div(rows, P) * P;
      if constexpr (P > 1) pair_rows(first, rows, range);
      for (int64_t q = 0; q < shape.panels(); ++q) {
        const int64_t vecs = shape.vecs_in(q);
        for (int64_t k = 0; k < depth; k += P) {
          const auto* row = row_at(first + k);
          const auto* next = P > 1 && k + 1 < rows ? row_at(first + k + 1) : nullptr;
          for_each_unit_vec(shape, q, [&](int64_t v, int64_t column, auto count) {
            V x = row ? load_first(row + column, count) : V{};
            if constexpr (P > 1) {
              const V second = next ? load_first(next + column, count) : V{};
              x = pairs_of(round_to<operand_t>(x), round_to<operand_t>(second));
            }
            store_lanes(scratch + (k * vecs + v * P) * W, x);
          });
        }
        for (int j = 0; j < gates; ++j) {
          acc_t* to = dw + order[j] * units * columns;
          for_each_tile(
              range.begin, range.end, tile_rows<operand_t>(vecs), [&](int64_t m, int64_t height) {
                const int64_t column = j * units + m;
                // The sums so far come from a farther cache while the tile runs.
                for (int64_t i = 0; i < height; ++i) {
                  const acc_t* row = to + (m + i) * columns + shape.first_unit(q);
                  for (int64_t v = 0; v < vecs; ++v) __builtin_prefetch(row + v * W);
                }
                if constexpr (P > 1) {
                  run_tile<operand_t, Left::kByColumn>(height, vecs, pairs + 2 * column, 2 * stride,
                                                       scratch, depth, acc);
                } else {
                  run_tile<operand_t, Left::kByColumn>(height, vecs, d + first * stride + column,
                                                       stride, scratch, depth, acc);
                }
                for (int64_t i = 0; i < height; ++i) {
                  acc_t* row = to + (m + i) * columns;
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
  void add_sums(acc_t* sums, Range range) const {
    for (int j = 0; j < gates; ++j) {
      for (int64_t m = range.begin; m < range.end; m += W) {
        const int64_t count = min(W, range.end - m);
        acc_t* to = sums + order[j] * units + m;
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

 private:
  // So few that the time goes into writing the result: along its own rows, a few at once.
  static constexpr int64_t kFewRows = 8;

  template <typename RowAt>
  void add_few(acc_t* dw, int64_t columns, Range range, RowAt&& row_at) const {
    constexpr int64_t kAtOnce = 4;
    decltype(row_at(0)) rows[kFewRows];
    for (int64_t r = 0; r < num_rows; ++r) rows[r] = row_at(r);
    for (int j = 0; j < gates; ++j) {
      for (int64_t m = range.begin; m < range.end; m += kAtOnce) {
        const int64_t height = min(kAtOnce, range.end - m);
        const acc_t* factors = d + j * units + m;
        acc_t* to = dw + (order[j] * units + m) * columns;
        for (int64_t n = 0; n < columns; n += W) {
          V sums[kAtOnce] = {};
          for (int64_t r = 0; r < num_rows; ++r) {
            if (!rows[r]) continue;
            const V x = load_first(rows[r] + n, columns - n);
            for (int64_t i = 0; i < height; ++i) {
              sums[i] += x * round_to<operand_t>(Bits<V>::broadcast(factors[r * stride + i]));
            }
          }
          for (int64_t i = 0; i < height; ++i) {
            acc_t* element = to + i * columns + n;
            if (accumulate) sums[i] += load_first(element, columns - n);
            store_first(element, sums[i], columns - n);
          }
        }
      }
    }
  }

  // Fills the range's columns of `pairs` from some rows of d; the last row's partner may be zero.
  void pair_rows(int64_t first, int64_t rows, Range range) const {
    for (int64_t k = 0; k < rows; k += P) {
      for (int j = 0; j < gates; ++j) {
        for (int64_t m = range.begin; m < range.end; m += W) {
          const int64_t column = j * units + m, count = min(W, range.end - m);
          const acc_t* row = d + (first + k) * stride + column;
          const V one = round_to<operand_t>(load_first(row, count));
          const V two = k + 1 < rows ? round_to<operand_t>(load_first(row + stride, count)) : V{};
          store_first(reinterpret_cast<acc_t*>(pairs + k * stride + 2 * column), pairs_of(one, two),
                      count);
        }
      }
    }
  }
};

}  // namespace
}  // namespace fastbptt
