// Products with weights as they lie in memory, for so few rows that packing would cost more.
//
// By the transpose of a row-major matrix a product is dot products along its rows: each sum runs in
// the lanes of a vector, and W of them are added up together in the end. By the matrix itself it is
// that of a tile whose panel has the matrix's own stride.
#pragma once

#include "cpu/pack.h"

namespace fastbptt {
namespace {

// Rows and columns whose sums are in registers at once, and rows that share what is read of a matrix.
template <typename scalar_t>
constexpr int kDotColumns = kLanes<scalar_t> < 4 ? kLanes<scalar_t> : 4;
constexpr int kDotRows = kAccumulators / 4;
constexpr int64_t kUnpackedRows = 24;

// sums[i][c] = the products of row i of `a` and row c of `w`, in the lanes of a vector. Pairs lie side
// by side along k already; where they cannot be multiplied as such, `w` is widened instead.
template <typename scalar_t, int rows, int columns>
[[gnu::always_inline]] inline void dot_tile(const Operand<scalar_t>* a, int64_t lda,
                                            const scalar_t* w, int64_t K,
                                            Vec<scalar_t> (*out)[kLanes<scalar_t>]) {
  using V = Vec<scalar_t>;
  constexpr int depth = kPackedLanes<Operand<scalar_t>>;
  V sums[rows][columns] = {};
  const auto read = [](const auto* p, auto count) __attribute__((always_inline)) {
    if constexpr (depth == kLanes<scalar_t>) {
      return load_first(p, count);
    } else {
      return load_lanes(p, count);
    }
  };
  const auto add = [&](int64_t k, auto count) __attribute__((always_inline)) {
    V x[rows];
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) x[i] = read(a + i * lda + k, count);
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) {
      const V y = read(w + c * K + k, count);
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) sums[i][c] = add_product<scalar_t>(sums[i][c], x[i], y);
    }
  };
  int64_t k = 0;
  for (; k + depth <= K; k += depth) add(k, Whole<depth>());
  if (k < K) add(k, Part<depth>(K - k));
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) out[i][c] = sums[i][c];
  }
}

// As above for any number of rows.
template <typename scalar_t, int columns>
void dot_rows(int64_t rows, const Operand<scalar_t>* a, int64_t lda, const scalar_t* w, int64_t K,
              Vec<scalar_t> (*out)[kLanes<scalar_t>]) {
  for_each_tile(0, rows, kDotRows, [&](int64_t first, int64_t count) {
    const Operand<scalar_t>* from = a + first * lda;
#define FASTBPTT_ROWS(n)                                            \
  case n:                                                           \
    if constexpr (n <= kDotRows) {                                  \
      dot_tile<scalar_t, n, columns>(from, lda, w, K, out + first); \
    }                                                               \
    break;
    switch (count) {
      FASTBPTT_ROWS(1)
      FASTBPTT_ROWS(2)
      FASTBPTT_ROWS(3)
      FASTBPTT_ROWS(4)
      FASTBPTT_ROWS(5)
      FASTBPTT_ROWS(6)
    }
#undef FASTBPTT_ROWS
  });
}

// acc[i][vec] = a[i] B for at most kUnpackedRows rows and one panel of B, the transpose of what is not
// packed.
template <typename scalar_t>
[[gnu::noinline]] void dot_product(const Operand<scalar_t>* a, int64_t lda,
                                   const Packed<scalar_t>& b, int64_t panel, int64_t rows,
                                   Accumulator<scalar_t>* acc) {
  using V = Vec<scalar_t>;
  constexpr int W = kLanes<scalar_t>;
  const int64_t vecs = b.vecs_in(panel);
  for_each_unit_vec(b, panel, [&](int64_t v, int64_t unit, int64_t count) {
    for (int64_t g = 0; g < b.gates; ++g) {
      const scalar_t* w = b.unpacked + (g * b.units + unit) * b.K;
      V sums[kUnpackedRows][W];
      int64_t c = 0;
      const auto dot = [&](auto columns) {
        constexpr int n = decltype(columns)::value;
        for (; c + n <= count; c += n) {
          dot_rows<scalar_t, n>(rows, a, lda, w + c * b.K, b.K,
                                reinterpret_cast<V(*)[W]>(&sums[0][c]));
        }
      };
      dot(std::integral_constant<int, kDotColumns<scalar_t>>());
      dot(std::integral_constant<int, 1>());
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t lane = count; lane < W; ++lane) sums[i][lane] = V{};
        transpose_block<scalar_t>(sums[i]);
        V sum{};
        for (const V& part : sums[i]) sum += part;
        store(acc + (i * vecs + v * b.gates + g) * W, sum);
      }
    }
  });
}

// acc[i][v] (+)= sum over k of a[i][k] * w[k][v]. The last vector of a row of w has `count` elements.
template <typename scalar_t, int rows, int vecs, typename Count>
void strided_tile(const Operand<scalar_t>* a, int64_t lda, const scalar_t* w, int64_t ldw,
                  int64_t K, bool accumulate, Accumulator<scalar_t>* acc, int64_t ldacc,
                  Count count) {
  using V = Vec<scalar_t>;
  constexpr int W = kLanes<scalar_t>;
  constexpr int parts = rows * vecs >= kInFlight ? 1 : 2;
  constexpr int64_t kAhead = 16;  // rows of w, each of which may be in another page
  for (int64_t k = 0; k < K;) {
    const int64_t end = min(K, k + kSumLength);
    V sums[parts][rows][vecs] = {};
    const auto add = [&](V(&sum)[rows][vecs], int64_t k) __attribute__((always_inline)) {
      const scalar_t* from = w + k * ldw;
      V b[vecs];
#pragma GCC unroll 8
      for (int v = 0; v < vecs; ++v) {
        __builtin_prefetch(from + kAhead * ldw + v * W);
        b[v] = v + 1 < vecs ? load(from + v * W) : load_first(from + v * W, count);
      }
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
        const V x = Bits<V>::broadcast(load_one(a + i * lda + k));
#pragma GCC unroll 8
        for (int v = 0; v < vecs; ++v) sum[i][v] += x * b[v];
      }
    };
    for (; k + parts <= end; k += parts) {
#pragma GCC unroll 2
      for (int part = 0; part < parts; ++part) add(sums[part], k + part);
    }
    if constexpr (parts > 1) {
      if (k < end) add(sums[0], k++);
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < vecs; ++v) {
        V sum = sums[0][i][v];
        if constexpr (parts > 1) sum += sums[1][i][v];
        Accumulator<scalar_t>* to = acc + i * ldacc + v * W;
        store(to, accumulate ? load(to) + sum : sum);
      }
    }
    accumulate = true;
  }
}

template <typename scalar_t>
constexpr int64_t strided_rows_at_once(int vecs) {
  return min(6, tile_rows<scalar_t>(vecs));
}

template <typename scalar_t, int vecs, typename Count>
void strided_rows(int64_t rows, const Operand<scalar_t>* a, int64_t lda, const scalar_t* w,
                  int64_t ldw, int64_t K, bool accumulate, Accumulator<scalar_t>* acc,
                  int64_t ldacc, Count count) {
#define FASTBPTT_ROWS(n)                                                                 \
  case n:                                                                                \
    if constexpr (n <= tile_rows<scalar_t>(vecs)) {                                      \
      strided_tile<scalar_t, n, vecs>(a, lda, w, ldw, K, accumulate, acc, ldacc, count); \
    }                                                                                    \
    break;
  switch (rows) {
    FASTBPTT_ROWS(1)
    FASTBPTT_ROWS(2)
    FASTBPTT_ROWS(3)
    FASTBPTT_ROWS(4)
    FASTBPTT_ROWS(5)
    FASTBPTT_ROWS(6)
  }
#undef FASTBPTT_ROWS
}

// As dot_product, where B is the matrix itself, with its blocks of rows in the order that b says.
template <typename scalar_t>
[[gnu::noinline]] void strided_product(const Operand<scalar_t>* a, int64_t lda,
                                       const Packed<scalar_t>& b, int64_t panel, int64_t num_rows,
                                       Accumulator<scalar_t>* acc) {
  constexpr int W = kLanes<scalar_t>;
  const int64_t block = b.K / b.num_blocks, vecs = b.vecs_in(panel);
  int64_t v = 0;
  const auto run = [&](auto width, auto count) {
    constexpr int kWidth = decltype(width)::value;
    for_each_tile(
        0, num_rows, strided_rows_at_once<scalar_t>(kWidth), [&](int64_t i, int64_t rows) {
          for (int j = 0; j < b.num_blocks; ++j) {
            const scalar_t* w =
                b.unpacked + b.block_order[j] * block * b.units + b.first_unit(panel) + v * W;
            strided_rows<scalar_t, kWidth>(rows, a + i * lda + j * block, lda, w, b.units, block,
                                           j > 0, acc + (i * vecs + v) * W, vecs * W, count);
          }
        });
    v += kWidth;
  };
  const int64_t units = b.units - b.first_unit(panel), whole = min(vecs, units / W);
  while (v + 4 <= whole) run(std::integral_constant<int, 4>(), Whole<W>());
  while (v + 2 <= whole) run(std::integral_constant<int, 2>(), Whole<W>());
  while (v + 1 <= whole) run(std::integral_constant<int, 1>(), Whole<W>());
  if (v < vecs) run(std::integral_constant<int, 1>(), Part<W>(units - v * W));
}

}  // namespace
}  // namespace fastbptt
