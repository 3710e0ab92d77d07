// Matrix products, a panel at a time.
#pragma once

#include "cpu/unpacked.h"

namespace fastbptt {
namespace {

// Values of K that a tile takes at once where K is long: that much of a panel stays in the
// second-level cache while a group of rows passes over it.
constexpr int64_t kDepth = 512;
// Rows whose sums are kept meanwhile.
constexpr int64_t kGroupRows = 96;

// Computes a[r] B for the rows [begin, end) of one panel and hands the sums of each row to
// fn(r, acc). `a` is where row 0 stands.
template <typename scalar_t, typename Fn>
inline void panel_product(const Operand<scalar_t>* a, int64_t lda, const Packed<scalar_t>& b,
                          int64_t panel, int64_t K, int64_t begin, int64_t end, Fn&& fn) {
  constexpr int W = kLanes<scalar_t>;
  const int64_t vecs = b.vecs_in(panel), height = tile_rows<scalar_t>(vecs);
  alignas(64) char storage[kGroupRows * kMaxVecs * kVecBytes];
  auto* acc = reinterpret_cast<Accumulator<scalar_t>*>(storage);
  if (b.unpacked && K > 0) {
    return b.block_order ? strided_product(a, lda, b, panel, begin, end, fn)
                         : dot_product(a, lda, b, panel, begin, end, fn);
  }
  const int64_t group_rows = kGroupRows / height * height;
  for_each_tile(begin, end, K > kDepth ? group_rows : height, [&](int64_t group, int64_t count) {
    int64_t k = 0;
    do {
      const int64_t depth = min(kDepth, K - k);
      for_each_tile(group, group + count, height, [&](int64_t first, int64_t rows) {
        run_tile<scalar_t, Left::kByRow>(rows, vecs, a + first * lda + k, lda,
                                         b.panel(panel) + k * vecs * W, depth,
                                         acc + (first - group) * vecs * W, k > 0);
      });
      k += kDepth;
    } while (k < K);
    for (int64_t i = 0; i < count; ++i) fn(group + i, acc + i * vecs * W);
  });
}

// Computes a[r] B for some rows and panels and hands each result to fn(r, unit, count, sum), a vector at a
// time; B has one gate. Rows are taken in blocks that stay in the second-level cache while the
// panels pass over them.
template <typename scalar_t, typename Fn>
void gemm_rows(const Operand<scalar_t>* a, int64_t lda, const Packed<scalar_t>& b, Range rows_in,
               Range panels, Fn&& fn) {
  constexpr int W = kLanes<scalar_t>;
  const int64_t block = max(kGroupRows, (256 << 10) / int64_t(sizeof(*a)) / min(b.K, kDepth));
  for (int64_t first = rows_in.begin; first < rows_in.end; first += block) {
    const int64_t last = min(rows_in.end, first + block);
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      panel_product(a, lda, b, p, b.K, first, last,
                    [&](int64_t r, const Accumulator<scalar_t>* acc) {
                      for_each_unit_vec(b, p, [&](int64_t v, int64_t unit, auto count) {
                        fn(r, unit, count, load(acc + v * W));
                      });
                    });
    }
  }
}

}  // namespace
}  // namespace fastbptt
