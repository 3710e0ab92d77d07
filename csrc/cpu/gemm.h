// Matrix products on packed panels: the micro-kernel that the time loops and the products around
// them share.
//
// The right operand is packed into panels of a few vectors of columns, [panel][k][vectors], so that
// a tile reads it in one contiguous stream. A tile is `rows` x `vecs` accumulators in registers.
#pragma once

#include "cpu/vec.h"

namespace fastbptt {
namespace {

// 32 registers with AVX-512, else 16: what accumulators leave must hold the operands.
constexpr int kAccumulators = kVecBytes == 64 ? 24 : 12;
constexpr int kMaxVecs = 4;                          // vectors in a tile's row
constexpr int kPanelVecs = kVecBytes == 64 ? 4 : 2;  // best where the choice is free
constexpr int kMaxRows = 8;
constexpr int kMaxTile = kAccumulators * kVecBytes;  // bytes of a tile's results
// Multiply-adds that must be under way at once to hide their latency (4 cycles, 2 a cycle).
constexpr int kInFlight = 8;

constexpr int tile_rows(int vecs) {
  return kAccumulators / vecs < kMaxRows ? kAccumulators / vecs : kMaxRows;
}

// How a tile reads its left operand: a(i, k) = a[i * lda + k], or a[k * lda + i].
enum class Left { kByRow, kByColumn };

// A running sum over more values than this loses accuracy, so a long sum is one of shorter ones.
constexpr int64_t kSumLength = 256;

// acc[i][v] (+)= sum over k of a(i, k) * panel[k][v]. A small tile sums interleaved parts of the k
// range in accumulators of their own.
template <typename scalar_t, Left left, int rows, int vecs>
void tile(const scalar_t* a, int64_t lda, const scalar_t* panel, int64_t K, bool accumulate,
          scalar_t* acc_out) {
  using V = Vec<scalar_t>;
  constexpr int W = kLanes<scalar_t>;
  constexpr int parts =
      rows * vecs >= kInFlight ? 1 : (kInFlight + rows * vecs - 1) / (rows * vecs);
  int64_t k = 0;
  do {
    const int64_t end = min(K, k + kSumLength * parts);
    V acc[parts][rows][vecs] = {};
    const auto multiply_add = [&](V(&sum)[rows][vecs], int64_t k) __attribute__((always_inline)) {
      V b[vecs];
#pragma GCC unroll 8
      for (int v = 0; v < vecs; ++v) b[v] = load(panel + (k * vecs + v) * W);
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
        const V x = Bits<V>::broadcast(left == Left::kByRow ? a[i * lda + k] : a[k * lda + i]);
#pragma GCC unroll 8
        for (int v = 0; v < vecs; ++v) sum[i][v] += x * b[v];
      }
    };
    for (; k + parts <= end; k += parts) {
#pragma GCC unroll 8
      for (int part = 0; part < parts; ++part) multiply_add(acc[part], k + part);
    }
    if constexpr (parts > 1) {
      for (; k < end; ++k) multiply_add(acc[0], k);
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < vecs; ++v) {
        V sum = acc[0][i][v];
#pragma GCC unroll 8
        for (int part = 1; part < parts; ++part) sum += acc[part][i][v];
        scalar_t* to = acc_out + (i * vecs + v) * W;
        store(to, accumulate ? load(to) + sum : sum);
      }
    }
    accumulate = true;
  } while (k < K);
}

template <typename scalar_t, Left left, int vecs>
void tile_of(int64_t rows, const scalar_t* a, int64_t lda, const scalar_t* panel, int64_t K,
             bool accumulate, scalar_t* acc) {
#define FASTBPTT_ROWS(n)                                                \
  case n:                                                               \
    if constexpr (n <= tile_rows(vecs))                                 \
      tile<scalar_t, left, n, vecs>(a, lda, panel, K, accumulate, acc); \
    break;
  switch (rows) {
    FASTBPTT_ROWS(1)
    FASTBPTT_ROWS(2)
    FASTBPTT_ROWS(3)
    FASTBPTT_ROWS(4)
    FASTBPTT_ROWS(5)
    FASTBPTT_ROWS(6)
    FASTBPTT_ROWS(7)
    FASTBPTT_ROWS(8)
  }
#undef FASTBPTT_ROWS
}

// rows <= tile_rows(vecs), vecs <= kMaxVecs; acc: [rows][vecs] vectors, aligned.
template <typename scalar_t, Left left>
inline void run_tile(int64_t rows, int64_t vecs, const scalar_t* a, int64_t lda,
                     const scalar_t* panel, int64_t K, scalar_t* acc, bool accumulate = false) {
  switch (vecs) {
    case 1: return tile_of<scalar_t, left, 1>(rows, a, lda, panel, K, accumulate, acc);
    case 2: return tile_of<scalar_t, left, 2>(rows, a, lda, panel, K, accumulate, acc);
    case 3: return tile_of<scalar_t, left, 3>(rows, a, lda, panel, K, accumulate, acc);
    case 4: return tile_of<scalar_t, left, 4>(rows, a, lda, panel, K, accumulate, acc);
  }
}

struct Range {
  int64_t begin, end;
};

inline Range share(int64_t total, int64_t part, int64_t parts) {
  return {total * part / parts, total * (part + 1) / parts};
}

// Calls fn(first, count) for tiles of nearly equal height that cover [begin, end): 13 rows with a
// limit of 6 are 5 + 4 + 4, since a tile of one row runs at a fraction of the speed.
template <typename Fn>
inline void for_each_tile(int64_t begin, int64_t end, int64_t limit, Fn&& fn) {
  if (begin < end && end - begin <= limit) return fn(begin, end - begin);
  const int64_t tiles = ceil_div(end - begin, limit);
  for (int64_t i = 0, first = begin; i < tiles; ++i) {
    const int64_t count = (end - first) / (tiles - i);
    fn(first, count);
    first += count;
  }
}

// A packed right operand with K rows. Its columns are the gates of `units`, those of a unit side by
// side, so that one tile has all of them: [panel][k][unit vector][gate]. An ordinary matrix has one
// gate.
template <typename scalar_t>
struct Packed {
  scalar_t* data;
  int64_t K;
  int64_t units;
  int64_t gates;
  int64_t panel_vecs;  // unit vectors in every panel but a narrower last one
  // Where packing would cost more than the products: the matrix itself, of which this is the
  // transpose, [gates * units, K] row-major; else null.
  const scalar_t* unpacked;

  static constexpr int W = kLanes<scalar_t>;
  int64_t unit_vecs() const { return ceil_div(units, W); }
  int64_t panels() const { return ceil_div(unit_vecs(), panel_vecs); }
  int64_t first_unit(int64_t panel) const { return panel * panel_vecs * W; }
  int64_t unit_vecs_in(int64_t panel) const {
    return min(panel_vecs, unit_vecs() - panel * panel_vecs);
  }
  int64_t vecs_in(int64_t panel) const { return unit_vecs_in(panel) * gates; }
  scalar_t* panel(int64_t p) const { return data + p * panel_vecs * gates * W * K; }
  int64_t size() const { return K * unit_vecs() * gates * W; }
};

// Calls fn(unit vector, first unit, units that exist) for the unit vectors of a panel. Those that exist
// are Whole or a Part, so fn is compiled for both.
template <typename scalar_t, typename Fn>
inline void for_each_unit_vec(const Packed<scalar_t>& b, int64_t panel, Fn&& fn) {
  constexpr int W = kLanes<scalar_t>;
  const int64_t first = b.first_unit(panel);
  const int64_t vecs = b.unit_vecs_in(panel);
  for (int64_t v = 0; v < vecs; ++v) {
    const int64_t unit = first + v * W;
    if (b.units - unit >= W) {
      fn(v, unit, Whole<scalar_t>());
    } else {
      fn(v, unit, Part<scalar_t>(b.units - unit));
    }
  }
}

// Transposes a W x W block held in W vectors: log2(W) rounds that swap ever smaller blocks.
template <typename scalar_t>
inline void transpose_block(Vec<scalar_t> (&x)[kLanes<scalar_t>]) {
  constexpr int W = kLanes<scalar_t>;
  typename VecTypes<scalar_t>::bits low, high;
#pragma GCC unroll 8
  for (int half = W / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
    for (int lane = 0; lane < W; ++lane) {
      low[lane] = lane & half ? W + lane - half : lane;
      high[lane] = lane & half ? W + lane : lane + half;
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (i & half) continue;
      const auto a = x[i], b = x[i + half];
      x[i] = __builtin_shuffle(a, b, low);
      x[i + half] = __builtin_shuffle(a, b, high);
    }
  }
}

// dst[k][lane] = src[lane * ld + k] for lane < count, zero beyond; rows of dst are `stride` apart.
template <typename scalar_t>
void pack_strip_transposed(scalar_t* dst, int64_t stride, const scalar_t* src, int64_t ld,
                           int64_t count, int64_t K) {
  constexpr int W = kLanes<scalar_t>;
  for (int64_t k = 0; k < K; k += W) {
    const int64_t depth = min(W, K - k);
    Vec<scalar_t> block[W];
    for (int64_t lane = 0; lane < W; ++lane) {
      if (lane >= count) {
        block[lane] = Vec<scalar_t>{};
      } else {
        block[lane] = load_first(src + lane * ld + k, depth);
      }
    }
    transpose_block<scalar_t>(block);
    for (int64_t i = 0; i < depth; ++i) store(dst + (k + i) * stride, block[i]);
  }
}

// dst[k][lane] = src[k * ld + lane] for lane < count, zero beyond.
template <typename scalar_t>
void pack_strip(scalar_t* dst, int64_t stride, const scalar_t* src, int64_t ld, int64_t count,
                int64_t K) {
  for (int64_t k = 0; k < K; ++k) {
    const scalar_t* row = src + k * ld;
    store(dst + k * stride, load_first(row, count));
  }
}

// Packs some panels of w, [gates * units, K] row-major, as its transpose: B(k, n) = w[n][k].
template <typename scalar_t>
void pack_transposed(const Packed<scalar_t>& to, const scalar_t* w, Range panels) {
  constexpr int W = kLanes<scalar_t>;
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    for_each_unit_vec(to, p, [&](int64_t v, int64_t unit, int64_t count) {
      for (int64_t g = 0; g < to.gates; ++g) {
        pack_strip_transposed(to.panel(p) + (v * to.gates + g) * W, to.vecs_in(p) * W,
                              w + (g * to.units + unit) * to.K, to.K, count, to.K);
      }
    });
  }
}

// Packs some panels of w, [gates * rows, units] row-major, as it is, with its blocks of `rows` rows
// in the given order: B(j * rows + r, n) = w[order[j] * rows + r][n].
template <typename scalar_t>
void pack_direct(const Packed<scalar_t>& to, const scalar_t* w, int gates, const int* order,
                 Range panels) {
  constexpr int W = kLanes<scalar_t>;
  const int64_t rows = to.K / gates;
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    const int64_t stride = to.vecs_in(p) * W;
    for_each_unit_vec(to, p, [&](int64_t v, int64_t unit, int64_t count) {
      for (int j = 0; j < gates; ++j) {
        pack_strip(to.panel(p) + j * rows * stride + v * W, stride,
                   w + order[j] * rows * to.units + unit, to.units, count, rows);
      }
    });
  }
}

// Computes a[r] B for some rows and one panel of what is not packed, into acc: [rows][vectors]. Each
// sum runs along a row of the matrix in the lanes of a vector; W of them are added up together.
template <typename scalar_t>
void unpacked_product(const scalar_t* a, int64_t lda, const Packed<scalar_t>& b, int64_t panel,
                      int64_t rows, scalar_t* acc) {
  using V = Vec<scalar_t>;
  constexpr int W = kLanes<scalar_t>;
  const int64_t vecs = b.vecs_in(panel), K = b.K;
  for (int64_t i = 0; i < rows; ++i) {
    for_each_unit_vec(b, panel, [&](int64_t v, int64_t unit, int64_t count) {
      for (int64_t g = 0; g < b.gates; ++g) {
        const scalar_t* w = b.unpacked + (g * b.units + unit) * K;
        V sums[W] = {};
        for (int64_t k = 0; k < K; k += W) {
          const V x = load_first(a + i * lda + k, K - k);
          if (count == W && K - k >= W) {
#pragma GCC unroll 16
            for (int lane = 0; lane < W; ++lane) sums[lane] += x * load(w + lane * K + k);
          } else {
            for (int64_t lane = 0; lane < count; ++lane) {
              sums[lane] += x * load_first(w + lane * K + k, K - k);
            }
          }
        }
        transpose_block<scalar_t>(sums);
        V sum{};
        for (const V& part : sums) sum += part;
        store(acc + (i * vecs + v * b.gates + g) * W, sum);
      }
    });
  }
}

// Values of K that a tile takes at once where K is long: that much of a panel stays in the
// second-level cache while a group of rows passes over it.
constexpr int64_t kDepth = 512;
// Rows whose sums are kept meanwhile.
constexpr int64_t kGroupRows = 96;

// Computes a[r] B for the rows [begin, end) of one panel and hands the sums of each row to
// fn(r, acc). `a` is where row 0 stands.
template <typename scalar_t, typename Fn>
inline void panel_product(const scalar_t* a, int64_t lda, const Packed<scalar_t>& b, int64_t panel,
                          int64_t K, int64_t begin, int64_t end, Fn&& fn) {
  constexpr int W = kLanes<scalar_t>;
  const int64_t vecs = b.vecs_in(panel), height = tile_rows(vecs);
  alignas(64) char storage[kGroupRows * kMaxVecs * kVecBytes];
  scalar_t* acc = reinterpret_cast<scalar_t*>(storage);
  if (b.unpacked && K > 0) {
    return for_each_tile(begin, end, kGroupRows, [&](int64_t first, int64_t rows) {
      unpacked_product(a + first * lda, lda, b, panel, rows, acc);
      for (int64_t i = 0; i < rows; ++i) fn(first + i, acc + i * vecs * W);
    });
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

// Computes a[r] B for some rows and hands each result to fn(r, unit, count, sum), a vector at a
// time; B has one gate. Rows are taken in blocks that stay in the second-level cache while the
// panels pass over them.
template <typename scalar_t, typename Fn>
void gemm_rows(const scalar_t* a, int64_t lda, const Packed<scalar_t>& b, Range rows_in, Fn&& fn) {
  constexpr int W = kLanes<scalar_t>;
  const int64_t block = max(kGroupRows, (256 << 10) / int64_t(sizeof(scalar_t)) / min(b.K, kDepth));
  for (int64_t first = rows_in.begin; first < rows_in.end; first += block) {
    const int64_t last = min(rows_in.end, first + block);
    for (int64_t p = 0; p < b.panels(); ++p) {
      panel_product(a, lda, b, p, b.K, first, last, [&](int64_t r, const scalar_t* acc) {
        for_each_unit_vec(b, p, [&](int64_t v, int64_t unit, auto count) {
          fn(r, unit, count, load(acc + v * W));
        });
      });
    }
  }
}

}  // namespace
}  // namespace fastbptt
