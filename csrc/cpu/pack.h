// Operands packed for the micro-kernel. Right ones are cut into panels of a few vectors of columns,
// and these into strips as wide as a tile: [panel][strip][k][vectors], or of bfloat16
// [panel][strip][k / 2][vectors][2].
#pragma once

#include <utility>

#include "cpu/tile.h"

namespace fastbptt {
namespace {

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
// side, so that one panel has all of them: its vectors are [unit vector][gate]. An ordinary matrix has one
// gate. Of pairs, the last value's partner may be zero.
template <typename scalar_t>
struct Packed {
  scalar_t* data;
  int64_t K;
  int64_t units;
  int64_t gates;
  int64_t panel_vecs;  // unit vectors in every panel but a narrower last one
  // Where packing would cost more than the products: the matrix itself, row-major, else null. It is
  // [gates * units, K], of which this is the transpose; or [K, units] in num_blocks blocks of rows, of
  // which block_order[j] is the j-th here.
  const scalar_t* unpacked = nullptr;
  const int* block_order = nullptr;
  int num_blocks = 0;

  static constexpr int W = kLanes<scalar_t>;
  int64_t depth() const { return ceil_div(K, kPair<scalar_t>) * kPair<scalar_t>; }
  int64_t unit_vecs() const { return ceil_div(units, W); }
  int64_t panels() const { return ceil_div(unit_vecs(), panel_vecs); }
  int64_t first_unit(int64_t panel) const { return panel * panel_vecs * W; }
  int64_t unit_vecs_in(int64_t panel) const {
    return min(panel_vecs, unit_vecs() - panel * panel_vecs);
  }
  int64_t vecs_in(int64_t panel) const { return unit_vecs_in(panel) * gates; }
  // The strip that begins with vector v of a panel, and how many vectors it has.
  scalar_t* strip(int64_t panel, int64_t v) const {
    return data + (panel * panel_vecs * gates + v) * W * depth();
  }
  int64_t strip_vecs(int64_t panel, int64_t v) const { return min(kStripVecs, vecs_in(panel) - v); }
  int64_t size() const { return depth() * unit_vecs() * gates * W; }
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
      fn(v, unit, Whole<W>());
    } else {
      fn(v, unit, Part<W>(b.units - unit));
    }
  }
}

// Swaps a's blocks of `size` lanes at odd places for b's at even ones.
template <typename scalar_t, int size, int... lane>
[[gnu::always_inline]] inline void swap_blocks(Vec<scalar_t>& a, Vec<scalar_t>& b,
                                               std::integer_sequence<int, lane...>) {
  constexpr int W = sizeof...(lane);
#ifdef __clang__
  const auto low = __builtin_shufflevector(a, b, (lane & size ? W + lane - size : lane)...);
  b = __builtin_shufflevector(a, b, (lane & size ? W + lane : lane + size)...);
#else
  using Lanes = typename VecTypes<Accumulator<scalar_t>>::bits;
  const auto low = __builtin_shuffle(a, b, Lanes{(lane & size ? W + lane - size : lane)...});
  b = __builtin_shuffle(a, b, Lanes{(lane & size ? W + lane : lane + size)...});
#endif
  a = low;
}

// Transposes a W x W block held in W vectors: log2(W) rounds that swap ever smaller blocks.
template <typename scalar_t, int size = kLanes<scalar_t> / 2>
inline void transpose_block(Vec<scalar_t> (&x)[kLanes<scalar_t>]) {
  constexpr int W = kLanes<scalar_t>;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & size) continue;
    swap_blocks<scalar_t, size>(x[i], x[i + size], std::make_integer_sequence<int, W>());
  }
  if constexpr (size > 1) transpose_block<scalar_t, size / 2>(x);
}

// Numbers in a vector's worth of packed memory.
template <typename scalar_t>
constexpr int kPackedLanes = kPair<scalar_t> * kLanes<scalar_t>;

// The first n of them, the rest is zero: of bfloat16 a pair in each lane, whose bits are moved as a
// float's, which they are not.
template <typename scalar_t, typename Count>
inline Vec<scalar_t> load_lanes(const scalar_t* p, Count n) {
  if constexpr (kPair<scalar_t> == 1) {
    return load_first(p, n);
  } else if constexpr (std::is_same_v<Count, Part<kPackedLanes<scalar_t>>>) {
#ifdef FASTBPTT_AVX512
    return (Vec<scalar_t>)_mm512_maskz_loadu_epi16(n.mask, p);
#else
    Vec<scalar_t> v{};
    __builtin_memcpy(&v, p, n * sizeof(scalar_t));
    return v;
#endif
  } else {
    if (n < kPackedLanes<scalar_t>) return load_lanes(p, Part<kPackedLanes<scalar_t>>(n));
    Vec<scalar_t> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
}

template <typename scalar_t>
inline void store_lanes(scalar_t* p, Vec<scalar_t> v) {
  if constexpr (kPair<scalar_t> == 1) {
    store(p, v);
  } else {
    __builtin_memcpy(p, &v, sizeof v);
  }
}

// The pairs of two vectors that are rounded already, as they stand in packed memory.
inline Vec<float> pairs_of(Vec<float> first, Vec<float> second) {
  return (Vec<float>)((FloatBits)first >> 16 | (FloatBits)second);
}

// dst[k][lane] = src[lane * ld + k] for lane < count, zero beyond; rows of dst are `stride` apart.
template <typename scalar_t>
void pack_vec_transposed(scalar_t* dst, int64_t stride, const scalar_t* src, int64_t ld,
                         int64_t count, int64_t K) {
  constexpr int W = kLanes<scalar_t>, P = kPair<scalar_t>;
  for (int64_t k = 0; k < K; k += W * P) {
    const int64_t depth = min(W * P, K - k);
    Vec<scalar_t> block[W];
    for (int64_t lane = 0; lane < W; ++lane) {
      if (lane >= count) {
        block[lane] = Vec<scalar_t>{};
      } else {
        block[lane] = load_lanes(src + lane * ld + k, depth);
      }
    }
    transpose_block<scalar_t>(block);
    for (int64_t i = 0; i < depth; i += P) store_lanes(dst + (k + i) * stride, block[i / P]);
  }
}

// dst[k][lane] = row_at(k)[lane] for lane < count, zero beyond; a null row is zero.
template <typename scalar_t, typename RowAt>
inline void pack_vec(scalar_t* dst, int64_t stride, int64_t count, int64_t K, RowAt&& row_at) {
  constexpr int P = kPair<scalar_t>;
  const auto row = [&](int64_t k) {
    const auto* from = row_at(k);
    return from ? load_first(from, count) : Vec<scalar_t>{};
  };
  for (int64_t k = 0; k < K; k += P) {
    if constexpr (P == 1) {
      store(dst + k * stride, row(k));
    } else {
      const Vec<scalar_t> first = row(k);
      store_lanes(dst + k * stride, pairs_of(first, k + 1 < K ? row(k + 1) : Vec<scalar_t>{}));
    }
  }
}

// Calls fn(to, stride) with where vector v of a panel is to be packed.
template <typename scalar_t, typename Fn>
inline void in_strip(const Packed<scalar_t>& b, int64_t panel, int64_t v, Fn&& fn) {
  const int64_t first = v / kStripVecs * kStripVecs;
  fn(b.strip(panel, first) + (v - first) * kPair<scalar_t> * kLanes<scalar_t>,
     b.strip_vecs(panel, first) * kLanes<scalar_t>);
}

// Packs some panels of w, [gates * units, K] row-major, as its transpose: B(k, n) = w[n][k].
template <typename scalar_t>
void pack_transposed(const Packed<scalar_t>& to, const scalar_t* w, Range panels) {
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    for_each_unit_vec(to, p, [&](int64_t v, int64_t unit, int64_t count) {
      for (int64_t g = 0; g < to.gates; ++g) {
        in_strip(to, p, v * to.gates + g, [&](scalar_t* dst, int64_t stride) {
          pack_vec_transposed(dst, stride, w + (g * to.units + unit) * to.K, to.K, count, to.K);
        });
      }
    });
  }
}

// Packs some panels of w, [gates * rows, units] row-major, as it is, with its blocks of `rows` rows
// in the given order: B(j * rows + r, n) = w[order[j] * rows + r][n].
template <typename scalar_t>
void pack_direct(const Packed<scalar_t>& to, const scalar_t* w, int gates, const int* order,
                 Range panels) {
  const int64_t rows = to.K / gates;
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    for_each_unit_vec(to, p, [&](int64_t v, int64_t unit, int64_t count) {
      // Pairs may reach from one block to the next.
      int64_t j = 0, r = 0;
      in_strip(to, p, v, [&](scalar_t* dst, int64_t stride) {
        pack_vec(dst, stride, count, to.K, [&](int64_t) {
          const scalar_t* row = w + (order[j] * rows + r) * to.units + unit;
          if (++r == rows) r = 0, ++j;
          return row;
        });
      });
    });
  }
}

}  // namespace
}  // namespace fastbptt
