// Matrix products, a panel at a time.
#pragma once

#include "cpu/unpacked.h"

namespace fastbptt {
namespace {

// Values of K that a tile takes at once where K is long: that much of a strip stays in the
// first-level cache, or with AVX-512 in the second, while a group of rows passes over it.
constexpr int64_t kDepth = 256;
// Rows whose sums are kept meanwhile.
constexpr int64_t kGroupRows = 96;
// And fewer in a panel that is wider than others, since a unit's gates are never parted.
constexpr int64_t rows_at_once(int64_t vecs) {
  return vecs <= kPanelVecs ? kGroupRows : max(1, kGroupRows * kPanelVecs / vecs);
}
constexpr int64_t kMostGates = 128;
static_assert(kMostGates <= kGroupRows * kPanelVecs);

// Bytes of a matrix that stays in the second-level caches of the threads that share it; and how many tiles
// have to read a strip for it to pay that they ask for the next. Strips of AVX-512 are too long for that.
constexpr int64_t kNearBytes = 1 << 20;
constexpr int64_t kAskingTiles = 8;

// What follows the strip at vector v of a panel in the order in which products read it, `depth` values
// of K at a time: the panel's next, or its first, deeper. Behind the last it is only an address.
template <typename scalar_t>
inline const char* next_strip(const Packed<scalar_t>& b, int64_t panel, int64_t v, int64_t k,
                              int64_t depth) {
  const bool is_last = v + kStripVecs >= b.vecs_in(panel);
  const int64_t next = is_last ? 0 : v + kStripVecs, from = is_last ? k + depth : k;
  const scalar_t* strip = b.strip(panel, next);
  return reinterpret_cast<const char*>(strip +
                                       from * b.strip_vecs(panel, next) * Packed<scalar_t>::W);
}

// acc[i][vec] (+)= sum of a[i][n] b[k + n][vec] over n < depth, for some rows and the vectors of a
// panel. k is a whole number of pairs.
template <typename scalar_t>
inline void multiply_panel(const Operand<scalar_t>* a, int64_t lda, int64_t rows,
                           const Packed<scalar_t>& b, int64_t panel, int64_t k, int64_t depth,
                           bool accumulate, Accumulator<scalar_t>* acc, int64_t ldacc) {
  constexpr int W = kLanes<scalar_t>;
  const int64_t vecs = b.vecs_in(panel);
  const bool asks_ahead = kStripVecs == 2 && rows >= kAskingTiles * tile_rows<scalar_t>(2) &&
                          b.size() * int64_t(sizeof(scalar_t)) > kNearBytes;
  for (int64_t v = 0; v < vecs; v += kStripVecs) {
    const int64_t width = b.strip_vecs(panel, v);
    const scalar_t* strip = b.strip(panel, v) + k * width * W;
    // The first tile that reads a strip would wait for it, and the longer the busier the last cache is.
    const char* next = asks_ahead ? next_strip(b, panel, v, k, depth) : nullptr;
    for_each_tile(0, rows, tile_rows<scalar_t>(width), [&](int64_t first, int64_t height) {
      if (next) {
        const int64_t bytes = depth * width * W * int64_t(sizeof(scalar_t));
        const int64_t of_row = ceil_div(bytes, 64 * rows) * 64;
        const int64_t end = min(bytes, (first + height) * of_row);
        for (int64_t at = first * of_row; at < end; at += 64) __builtin_prefetch(next + at, 0, 2);
      }
      run_tile<scalar_t, Left::kByRow>(height, width, a + first * lda, lda, strip, depth,
                                       accumulate, acc + first * ldacc + v * W, ldacc);
    });
  }
}

// Computes a[r] B for the rows [begin, end) of one panel and hands the sums of each row to
// fn(r, acc). `a` is where row 0 stands.
template <typename scalar_t, typename Fn>
inline void panel_product(const Operand<scalar_t>* a, int64_t lda, const Packed<scalar_t>& b,
                          int64_t panel, int64_t K, int64_t begin, int64_t end, Fn&& fn) {
  constexpr int W = kLanes<scalar_t>;
  const int64_t vecs = b.vecs_in(panel);
  alignas(64) char storage[kGroupRows * kPanelVecs * kVecBytes];
  auto* acc = reinterpret_cast<Accumulator<scalar_t>*>(storage);
  const bool is_packed = !b.unpacked || K == 0;
  for_each_tile(begin, end, is_packed ? rows_at_once(vecs) : min(kUnpackedRows, rows_at_once(vecs)),
                [&](int64_t first, int64_t rows) {
                  const Operand<scalar_t>* group = a + first * lda;
                  if (!is_packed && b.block_order) {
                    strided_product(group, lda, b, panel, rows, acc);
                  } else if (!is_packed) {
                    dot_product(group, lda, b, panel, rows, acc);
                  } else {
                    int64_t k = 0;
                    do {
                      multiply_panel(group + k, lda, rows, b, panel, k, min(kDepth, K - k), k > 0,
                                     acc, vecs * W);
                      k += kDepth;
                    } while (k < K);
                  }
                  for (int64_t i = 0; i < rows; ++i) fn(first + i, acc + i * vecs * W);
                });
}

// Calls fn(panel, first row, last row) for blocks of rows that stay in the second-level cache while
// the panels pass over them.
template <typename scalar_t, typename Fn>
inline void for_each_block(const Packed<scalar_t>& b, Range rows, Range panels, Fn&& fn) {
  constexpr int64_t kElements = (256 << 10) / int64_t(sizeof(Operand<scalar_t>));
  const int64_t block = max(kGroupRows, kElements / min(b.K, kDepth));
  for (int64_t first = rows.begin; first < rows.end; first += block) {
    const int64_t last = min(rows.end, first + block);
    for (int64_t p = panels.begin; p < panels.end; ++p) fn(p, first, last);
  }
}

// Computes a[r] B for some rows and panels and hands each result to fn(r, unit, count, sum), a vector
// at a time; B has one gate.
template <typename scalar_t, typename Fn>
void gemm_rows(const Operand<scalar_t>* a, int64_t lda, const Packed<scalar_t>& b, Range rows,
               Range panels, Fn&& fn) {
  constexpr int W = kLanes<scalar_t>;
  for_each_block(b, rows, panels, [&](int64_t p, int64_t first, int64_t last) {
    panel_product(a, lda, b, p, b.K, first, last, [&](int64_t r, const Accumulator<scalar_t>* acc) {
      for_each_unit_vec(b, p, [&](int64_t v, int64_t unit, auto count) {
        fn(r, unit, count, load(acc + v * W));
      });
    });
  });
}

// The same into memory, c[r][unit] with rows `ldc` apart.
template <typename scalar_t>
void gemm_into(const Operand<scalar_t>* a, int64_t lda, const Packed<scalar_t>& b, Range rows,
               Range panels, Accumulator<scalar_t>* c, int64_t ldc) {
  constexpr int W = kLanes<scalar_t>;
  for_each_block(b, rows, panels, [&](int64_t p, int64_t first, int64_t last) {
    const int64_t unit = b.first_unit(p);
    if (b.unpacked || b.K == 0 || unit + b.unit_vecs_in(p) * W > b.units) {
      return panel_product(a, lda, b, p, b.K, first, last,
                           [&](int64_t r, const Accumulator<scalar_t>* acc) {
                             for_each_unit_vec(b, p, [&](int64_t v, int64_t unit, auto count) {
                               store_first(c + r * ldc + unit, load(acc + v * W), count);
                             });
                           });
    }
    for_each_tile(first, last, kGroupRows, [&](int64_t r, int64_t count) {
      for (int64_t k = 0; k < b.K; k += kDepth) {
        multiply_panel(a + r * lda + k, lda, count, b, p, k, min(kDepth, b.K - k), k > 0,
                       c + r * ldc + unit, ldc);
      }
    });
  });
}

}  // namespace
}  // namespace fastbptt
