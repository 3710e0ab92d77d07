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

// Where products go, as in BwdParams.
template <typename number_t>
struct WeightPointers {
  number_t *w_ih, *w_hh, *b_ih, *b_hh, *w_hr;
};

// The sums that become the weights' gradients. Where those have 16 bits the sums are kept apart from
// them, and rounded when they are complete, but for a pass of so few rows that one product makes
// them; else they are the same.
template <typename scalar_t>
struct WeightGradients : WeightPointers<Accumulator<scalar_t>> {
  using acc_t = Accumulator<scalar_t>;
  bool are_apart = false;

  WeightGradients() = default;
  WeightGradients(const BwdParams<scalar_t>& p, int64_t gates, Arena* arena)
      : are_apart(kIsRounded<scalar_t> && (p.overlapping || lane_rows(p) > kBlockRows)) {
    for_each(p, gates, [&](acc_t** sum, scalar_t* result, int64_t count) {
      if constexpr (kIsRounded<scalar_t>) {
        *sum = arena->take<acc_t>(are_apart && result ? count : 0);
      } else {
        *sum = result;
      }
    });
  }

  // Calls fn with where products go.
  template <typename Fn>
  void visit(const BwdParams<scalar_t>& p, Fn&& fn) const {
    if constexpr (kIsRounded<scalar_t>) {
      if (!are_apart) {
        return fn(WeightPointers<scalar_t>{p.d_w_ih, p.d_w_hh, p.d_b_ih, p.d_b_hh, p.d_w_hr});
      }
    }
    fn(static_cast<const WeightPointers<acc_t>&>(*this));
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
    fn(&this->w_ih, p.d_w_ih, gates * p.H * p.I);
    fn(&this->w_hh, p.d_w_hh, gates * p.H * p.R);
    fn(&this->b_ih, p.d_b_ih, gates * p.H);
    fn(&this->b_hh, p.d_b_hh, gates * p.H);
    fn(&this->w_hr, p.d_w_hr, p.R * p.H);
  }
};

// Products of a block of rows of d, [num_rows, groups * units] with row stride `stride`, where
// num_rows <= kBlockRows. d is packed once for all of them, as numbers stored as operand_t: where
// that is less than what d has, d is rounded.
template <typename operand_t>
struct OuterProduct {
  using acc_t = Accumulator<operand_t>;
  using V = Vec<operand_t>;
  static constexpr int W = kLanes<operand_t>, P = kPair<operand_t>;

  const acc_t* d;  // its rows may be read for a vector beyond their columns
  int64_t stride;
  int64_t num_rows;
  int64_t units;
  bool accumulate;    // add to the results rather than fill them
  int64_t max_depth;  // depth_of the most rows
  operand_t* packed;  // [groups * units, max_depth] d, by tiles; a thread reads its own units alone
  operand_t* scratch;  // [scratch_size(max_depth)] the thread's own

  static constexpr int64_t depth_of(int64_t rows) { return min(kBlockRows, ceil_div(rows, P) * P); }
  static constexpr int64_t scratch_size(int64_t max_depth) { return max_depth * kPanelVecs * W; }

  // Packs the units in `range` of some groups.
  void pack(int groups, Range range) const {
    if (num_rows <= kFewRows) return;
    const int64_t depth = depth_of(num_rows);
    for (int j = 0; j < groups; ++j) {
      for_each_group(range, [&](Range group) {
        for_each_left_tile(group, [&](int64_t m, int64_t height) {
          const acc_t* from = d + j * units + m;
          acc_t* to = reinterpret_cast<acc_t*>(packed + (j * units + m) * max_depth);
          // Where the tile has room a whole vector is stored, and the next row covers the excess.
          int64_t room = depth / P * height;
          for (int64_t k = 0; k < num_rows; k += P, to += height, room -= height) {
            for (int64_t i = 0; i < height; i += W) {
              V x = load(from + k * stride + i);
              if constexpr (P > 1) {
                const V next = k + 1 < num_rows ? load(from + (k + 1) * stride + i) : V{};
                x = pairs_of(round_to<operand_t>(x), round_to<operand_t>(next));
              }
              store_first(to + i, x, room - i);
            }
          }
        });
      });
    }
  }

  // dw[order[j] * units + m][n] (+)= sum over r of d[r][(first_group + j) * units + m] row_at(r)[n]
  // for the units m in `range`; a null row is zero. Rows and results may be stored as any type.
  template <typename result_t, typename RowAt>
  void add(result_t* dw, int64_t columns, int first_group, int gates, const int* order, Range range,
           RowAt&& row_at) const {
    decltype(row_at(0)) rows[kBlockRows];
    for (int64_t r = 0; r < num_rows; ++r) rows[r] = row_at(r);
    num_rows <= kFewRows ? add_few(dw, columns, first_group, gates, order, range, rows)
                         : add_rows(dw, columns, first_group, gates, order, range, rows);
  }

  // sums[order[j] * units + m] (+)= sum over r of d[r][(first_group + j) * units + m] for the units m
  // in `range`.
  template <typename result_t>
  void add_sums(result_t* sums, int first_group, int gates, const int* order, Range range) const {
    static_assert(kBlockRows <= kSumLength);
    for (int j = 0; j < gates; ++j) {
      const acc_t* from = d + (first_group + j) * units;
      for (int64_t m = range.begin; m < range.end; m += W) {
        const int64_t count = min(W, range.end - m);
        result_t* to = sums + order[j] * units + m;
        V sum{};
        for (int64_t r = 0; r < num_rows; ++r) sum += load(from + r * stride + m);
        if (accumulate) sum += load_first(to, count);
        store_first(to, sum, count);
      }
    }
  }

 private:
  // So few that the time goes into writing the result: in the order in which it lies.
  static constexpr int64_t kFewRows = 8;

  template <typename result_t, typename number_t>
  [[gnu::noinline]] void add_few(result_t* dw, int64_t columns, int first_group, int gates,
                                 const int* order, Range range, const number_t* const* rows) const {
    constexpr int kAtOnce = 4;
    for (int j = 0; j < gates; ++j) {
      for (int64_t m = range.begin; m < range.end; ++m) {
        const acc_t* factors = d + (first_group + j) * units + m;
        result_t* to = dw + (order[j] * units + m) * columns;
        int64_t n = 0;
        for (; n + kAtOnce * W <= columns; n += kAtOnce * W) {
          add_few_vecs<kAtOnce>(to, n, Whole<W>(), factors, rows);
        }
        for (; n + W <= columns; n += W) add_few_vecs<1>(to, n, Whole<W>(), factors, rows);
        if (n < columns) add_few_vecs<1>(to, n, Part<W>(columns - n), factors, rows);
      }
    }
  }

  // to[n] (+)= sum over r of factors[r] rows[r][n] for some vectors from n on
  template <int vecs, typename result_t, typename number_t, typename Count>
  [[gnu::always_inline]] void add_few_vecs(result_t* to, int64_t n, Count count,
                                           const acc_t* factors,
                                           const number_t* const* rows) const {
    V even[vecs] = {}, odd[vecs] = {};  // shorter sums are more accurate
    const auto add_row = [&](V(&sums)[vecs], int64_t r) __attribute__((always_inline)) {
      if (!rows[r]) return;
      const V factor = round_to<operand_t>(Bits<V>::broadcast(factors[r * stride]));
#pragma GCC unroll 8
      for (int v = 0; v < vecs; ++v) sums[v] += load_first(rows[r] + n + v * W, count) * factor;
    };
    for (int64_t r = 0; r + 1 < num_rows; r += 2) {
      add_row(even, r);
      add_row(odd, r + 1);
    }
    if (num_rows % 2 == 1) add_row(even, num_rows - 1);
#pragma GCC unroll 8
    for (int v = 0; v < vecs; ++v) {
      result_t* element = to + n + v * W;
      V sum = even[v] + odd[v];
      if (accumulate) sum += load_first(element, count);
      store_first(element, sum, count);
    }
  }

  template <typename result_t, typename number_t>
  [[gnu::noinline]] void add_rows(result_t* dw, int64_t columns, int first_group, int gates,
                                  const int* order, Range range,
                                  const number_t* const* rows) const {
    for (int64_t n = 0; n < columns; n += kPanelVecs * W) {
      const Packed<operand_t> right{scratch, num_rows, min(kPanelVecs * W, columns - n), 1,
                                    kPanelVecs};
      pack_rows(right, n, rows);
      for (int j = 0; j < gates; ++j) {
        const operand_t* left = packed + (first_group + j) * units * max_depth;
        result_t* to = dw + order[j] * units * columns + n;
        for_each_group(range, [&](Range group) {
          for (int64_t v = 0; v < right.unit_vecs(); v += kStripVecs) {
            for_each_left_tile(group, [&](int64_t m, int64_t height) {
              add_tile(right, v, left + m * max_depth, height, to + m * columns + v * W, columns);
            });
          }
        });
      }
    }
  }

  // Units whose packed columns stay in the cache while the strips of a panel pass over them.
  template <typename Fn>
  static void for_each_group(Range range, Fn&& fn) {
    for_each_tile(range.begin, range.end, kGroupRows,
                  [&](int64_t first, int64_t count) { fn(Range{first, first + count}); });
  }
  template <typename Fn>
  static void for_each_left_tile(Range group, Fn&& fn) {
    for_each_tile(group.begin, group.end, tile_rows<operand_t>(kStripVecs), fn);
  }

  // Packs the rows' columns from `begin` on into one panel.
  template <typename number_t>
  void pack_rows(const Packed<operand_t>& to, int64_t begin, const number_t* const* rows) const {
    for (int64_t first = 0; first < to.unit_vecs(); first += kStripVecs) {
      const int64_t width = to.strip_vecs(0, first);
      operand_t* strip = to.strip(0, first);
      for (int64_t k = 0; k < num_rows; k += P) {
        const number_t* row = rows[k];
        const number_t* next = P > 1 && k + 1 < num_rows ? rows[k + 1] : nullptr;
        for (int64_t v = 0; v < width; ++v, strip += P * W) {
          const int64_t column = (first + v) * W, count = to.units - column;
          V x = row ? load_first(row + begin + column, count) : V{};
          if constexpr (P > 1) {
            const V second = next ? load_first(next + begin + column, count) : V{};
            x = pairs_of(round_to<operand_t>(x), round_to<operand_t>(second));
          }
          store_lanes(strip, x);
        }
      }
    }
  }

  // c (+)= a tile's product with the strip of `right` that begins with vector v.
  template <typename result_t>
  void add_tile(const Packed<operand_t>& right, int64_t v, const operand_t* left, int64_t height,
                result_t* c, int64_t ldc) const {
    const int64_t width = right.strip_vecs(0, v), columns = right.units - v * W;
    const operand_t* strip = right.strip(0, v);
    // The sums so far come from a farther cache while the tile runs.
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t u = 0; u < width; ++u) __builtin_prefetch(c + i * ldc + u * W);
    }
    if constexpr (std::is_same_v<result_t, acc_t>) {
      if (columns >= width * W) {
        run_tile<operand_t, Left::kPacked>(height, width, left, 0, strip, right.depth(), accumulate,
                                           c, ldc);
        return;
      }
    }
    alignas(64) char storage[kAccumulators * kVecBytes];
    acc_t* sums = reinterpret_cast<acc_t*>(storage);
    run_tile<operand_t, Left::kPacked>(height, width, left, 0, strip, right.depth(), false, sums,
                                       width * W);
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t u = 0; u < width; ++u) {
        result_t* to = c + i * ldc + u * W;
        V sum = load(sums + (i * width + u) * W);
        if (accumulate) sum += load_first(to, columns - u * W);
        store_first(to, sum, columns - u * W);
      }
    }
  }
};

}  // namespace
}  // namespace fastbptt
