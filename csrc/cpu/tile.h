// The micro-kernel that the time loops and the products around them share. A tile is `rows` x `vecs`
// accumulators in registers; what it reads of the right operand is packed into one contiguous
// stream, a strip, [k][vecs] (see pack.h).
//
// 16-bit weights are packed as they are, so that few rows read half the bytes, and widened in the
// registers. Of bfloat16 two values of k stand side by side in 32 bits, [k / 2][vecs][2]: a shift and
// a mask make two floats of them, and where the processor has it one instruction multiplies and adds
// both. That instruction takes denormal numbers for zero.
#pragma once

#include "cpu/vec.h"

namespace fastbptt {
namespace {

// 32 registers with AVX-512 and NEON, else 16: what accumulators leave must hold the operands.
#if defined(FASTBPTT_AVX512) || defined(FASTBPTT_NEON)
constexpr int kAccumulators = 24, kStripVecs = 4;  // vectors in a tile's row
#else
constexpr int kAccumulators = 12, kStripVecs = 2;
#endif
constexpr int kPanelVecs = kVecBytes == 64 ? 4 : 8;  // in the strips that share a row's epilogue
constexpr int kMaxRows = 8;
// Multiply-adds that must be under way at once to hide their latency (4 cycles, 2 a cycle; some
// processors have more units for NEON's short registers).
#ifdef FASTBPTT_NEON
constexpr int kInFlight = 12;
#else
constexpr int kInFlight = 8;
#endif

// Values of k that stand side by side in a lane.
template <typename scalar_t>
constexpr int kPair = std::is_same_v<scalar_t, bfloat16_t> ? 2 : 1;

// What rows that meet packed numbers of a type are stored as.
template <typename scalar_t>
struct OperandOf {
  using type = Accumulator<scalar_t>;
};
#ifdef FASTBPTT_MULTIPLIES_PAIRS
template <>
struct OperandOf<bfloat16_t> {
  using type = bfloat16_t;
};
#endif
template <typename scalar_t>
using Operand = typename OperandOf<scalar_t>::type;

// Whether pairs are taken apart into two registers before they are multiplied.
template <typename scalar_t>
constexpr bool kSplitsPairs = kPair<scalar_t> == 2 && !std::is_same_v<scalar_t, Operand<scalar_t>>;

// Stores what a product is to read: rounded as scalar_t.
template <typename scalar_t>
inline void store_operand(Operand<scalar_t>* p, Vec<scalar_t> v) {
  store(p, std::is_same_v<Operand<scalar_t>, scalar_t> ? v : round_to<scalar_t>(v));
}

// sum + x * y, or where lanes hold pairs, sum plus the products of both.
template <typename scalar_t>
inline Vec<scalar_t> add_product(Vec<scalar_t> sum, Vec<scalar_t> x, Vec<scalar_t> y) {
#ifdef FASTBPTT_MULTIPLIES_PAIRS
  if constexpr (kPair<scalar_t> == 2) {
    return add_products_of_pairs(sum, (FloatBits)x, (FloatBits)y);
  }
#endif
  return sum + x * y;
}

template <typename scalar_t>
constexpr int tile_rows(int vecs) {
  const int rows = (kAccumulators - (kSplitsPairs<scalar_t> ? vecs : 0)) / vecs;
  return rows < kMaxRows ? rows : kMaxRows;
}

// How a tile reads its left operand: a(i, k) = a[i * lda + k], or packed, a[k * rows + i], where
// pairs stand side by side too: a(i, k) and a(i, k + 1) at a[k * rows + 2 * i].
enum class Left { kByRow, kPacked };

// A running sum over more values than this loses accuracy, so a long sum is one of shorter ones.
constexpr int64_t kSumLength = 256;

// sum[i][v] += a(i, k) * strip[k][v], and of pairs also that of k + 1, or with `alone` of k alone.
template <typename scalar_t, Left left, bool alone, int rows, int vecs>
[[gnu::always_inline]] inline void multiply_add(Vec<scalar_t> (&sum)[rows][vecs],
                                                const Operand<scalar_t>* a, int64_t lda,
                                                const scalar_t* strip, int64_t k) {
  using V = Vec<scalar_t>;
  constexpr int W = kLanes<scalar_t>, P = kPair<scalar_t>;
  const auto at = [&](int v)
                      __attribute__((always_inline)) { return strip + (k * vecs + v * P) * W; };
  if constexpr (P == 1) {
    V b[vecs];
#pragma GCC unroll 8
    for (int v = 0; v < vecs; ++v) b[v] = load(at(v));
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const V x = Bits<V>::broadcast(left == Left::kByRow ? a[i * lda + k] : a[k * rows + i]);
#pragma GCC unroll 8
      for (int v = 0; v < vecs; ++v) sum[i][v] += x * b[v];
    }
  } else if constexpr (kSplitsPairs<scalar_t>) {
    static_assert(left == Left::kByRow);
#pragma GCC unroll 2
    for (int second = 0; second < (alone ? 1 : 2); ++second) {
      V b[vecs];
#pragma GCC unroll 8
      for (int v = 0; v < vecs; ++v) {
        FloatBits pair;
        __builtin_memcpy(&pair, at(v), sizeof pair);
        b[v] = (V)(second ? pair & 0xffff0000u : pair << 16);
      }
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
        const V x = Bits<V>::broadcast(a[i * lda + k + second]);
#pragma GCC unroll 8
        for (int v = 0; v < vecs; ++v) sum[i][v] += x * b[v];
      }
    }
  } else {
#ifdef FASTBPTT_MULTIPLIES_PAIRS
    FloatBits b[vecs];
#pragma GCC unroll 8
    for (int v = 0; v < vecs; ++v) __builtin_memcpy(&b[v], at(v), sizeof b[v]);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const bfloat16_t* from = left == Left::kByRow ? a + i * lda + k : a + k * rows + 2 * i;
      uint32_t pair = from->bits;
      if constexpr (!alone) __builtin_memcpy(&pair, from, sizeof pair);
      const FloatBits x = pair - FloatBits{};
#pragma GCC unroll 8
      for (int v = 0; v < vecs; ++v) sum[i][v] = add_products_of_pairs(sum[i][v], x, b[v]);
    }
#endif
  }
}

// c[i][v] (+)= sum over k of a(i, k) * strip[k][v], where rows of c are ldc apart. A small tile sums
// interleaved parts of the k range in accumulators of their own.
template <typename scalar_t, Left left, int rows, int vecs>
void tile(const Operand<scalar_t>* a, int64_t lda, const scalar_t* strip, int64_t K,
          bool accumulate, Accumulator<scalar_t>* c, int64_t ldc) {
  using V = Vec<scalar_t>;
  constexpr int W = kLanes<scalar_t>, P = kPair<scalar_t>;
  constexpr int parts =
      rows * vecs >= kInFlight ? 1 : (kInFlight + rows * vecs - 1) / (rows * vecs);
  int64_t k = 0;
  do {
    const int64_t end = min(K, k + kSumLength * parts);
    V acc[parts][rows][vecs] = {};
    for (; k + parts * P <= end; k += parts * P) {
#pragma GCC unroll 16
      for (int part = 0; part < parts; ++part) {
        multiply_add<scalar_t, left, false>(acc[part], a, lda, strip, k + part * P);
      }
    }
    if constexpr (parts > 1) {
      for (; k + P <= end; k += P) multiply_add<scalar_t, left, false>(acc[0], a, lda, strip, k);
    }
    if constexpr (P > 1 && left == Left::kByRow) {
      if (k < end) multiply_add<scalar_t, left, true>(acc[0], a, lda, strip, k++);
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < vecs; ++v) {
        V sum = acc[0][i][v];
#pragma GCC unroll 16
        for (int part = 1; part < parts; ++part) sum += acc[part][i][v];
        Accumulator<scalar_t>* to = c + i * ldc + v * W;
        store(to, accumulate ? load(to) + sum : sum);
      }
    }
    accumulate = true;
  } while (k < K);
}

template <typename scalar_t, Left left, int vecs>
void tile_of(int64_t rows, const Operand<scalar_t>* a, int64_t lda, const scalar_t* strip,
             int64_t K, bool accumulate, Accumulator<scalar_t>* c, int64_t ldc) {
#define FASTBPTT_ROWS(n)                                                   \
  case n:                                                                  \
    if constexpr (n <= tile_rows<scalar_t>(vecs))                          \
      tile<scalar_t, left, n, vecs>(a, lda, strip, K, accumulate, c, ldc); \
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

// rows <= tile_rows(vecs), vecs <= kStripVecs. Of a packed left operand, K is a whole number of
// pairs.
template <typename scalar_t, Left left>
inline void run_tile(int64_t rows, int64_t vecs, const Operand<scalar_t>* a, int64_t lda,
                     const scalar_t* strip, int64_t K, bool accumulate, Accumulator<scalar_t>* c,
                     int64_t ldc) {
#define FASTBPTT_VECS(n)                                                      \
  case n:                                                                     \
    if constexpr (n <= kStripVecs)                                            \
      tile_of<scalar_t, left, n>(rows, a, lda, strip, K, accumulate, c, ldc); \
    break;
  switch (vecs) {
    FASTBPTT_VECS(1)
    FASTBPTT_VECS(2)
    FASTBPTT_VECS(3)
    FASTBPTT_VECS(4)
  }
#undef FASTBPTT_VECS
}

}  // namespace
}  // namespace fastbptt
