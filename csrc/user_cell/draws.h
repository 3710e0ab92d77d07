// Random numbers for what a cell is given by chance, of Philox4x32-10 (Salmon, Moraes, Dror, Shaw,
// "Parallel random numbers: as easy as 1, 2, 3", 2011). A block of four numbers is a function of its
// own number and the seed, so that any thread may draw any of them.
#pragma once

#include <cstring>

#include "cpu/vec.h"
#include "user_cell/interface.h"

namespace fastbptt {
namespace {

// A number of 32 bits in each lane; what is above them means nothing.
typedef uint64_t Words __attribute__((vector_size(kVecBytes)));

// The products of 64 bits.
[[gnu::always_inline]] inline Words multiply(Words a, uint32_t factor) {
  const Words factors = Words{} + factor;
  // Of vectors' own product GCC makes three of 32 bits, or the slower one of 64.
#if defined(FASTBPTT_AVX512)
  return (Words)_mm512_maskz_mul_epu32(__mmask8(-1), (__m512i)a, (__m512i)factors);
#elif defined(FASTBPTT_F16C)
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)factors);
#elif defined(FASTBPTT_NEON)
  return (Words)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)factors));
#else
  return (a & 0xffffffff) * factors;
#endif
}

// The numbers of blocks [first, first + kDrawnNumbers / 4): word j of block b at [j / 2][b][j % 2].
inline void draw_words(uint64_t seed, uint64_t first, uint32_t* to) {
  constexpr int kBlocks = kDrawnNumbers / 4, kLanes64 = kVecBytes / 8;
  constexpr int kVecs = 2;  // as their rounds wait for one another
  uint64_t blocks[kBlocks];
  for (int b = 0; b < kBlocks; ++b) blocks[b] = first + uint64_t(b);
  for (int begin = 0; begin < kBlocks; begin += kVecs * kLanes64) {
    Words x[4][kVecs];
    for (int v = 0; v < kVecs; ++v) {
      std::memcpy(&x[0][v], blocks + begin + v * kLanes64, sizeof(Words));
      x[1][v] = x[0][v] >> 32;
      x[2][v] = x[3][v] = Words{};
    }
    uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9, key1 += 0xBB67AE85) {
      for (int v = 0; v < kVecs; ++v) {
        const Words a = multiply(x[0][v], 0xD2511F53), b = multiply(x[2][v], 0xCD9E8D57);
        x[0][v] = (b >> 32) ^ x[1][v] ^ key0;
        x[1][v] = b;
        x[2][v] = (a >> 32) ^ x[3][v] ^ key1;
        x[3][v] = a;
      }
    }
    for (int pair = 0; pair < 2; ++pair) {
      for (int v = 0; v < kVecs; ++v) {
        const Words both = (x[2 * pair][v] & 0xffffffff) | (x[2 * pair + 1][v] << 32);
        std::memcpy(to + 2 * (pair * kBlocks + begin + v * kLanes64), &both, sizeof both);
      }
    }
  }
}

// `value` where a number is less than `threshold`, else 0; see UserKernels.
template <typename scalar_t>
void draw_bernoulli(scalar_t* to, int64_t first, int64_t count, uint64_t seed, uint32_t threshold,
                    scalar_t value) {
  for (int64_t i = 0; i < count; i += kDrawnNumbers) {
    alignas(kVecBytes) uint32_t words[kDrawnNumbers];
    alignas(kVecBytes) scalar_t drawn[kDrawnNumbers];
    draw_words(seed, uint64_t(first + i) / 4, words);
    const int64_t n = min(count - i, kDrawnNumbers);
    scalar_t* const out = n < kDrawnNumbers ? drawn : to + i;
    for (int k = 0; k < kDrawnNumbers; ++k) out[k] = words[k] < threshold ? value : scalar_t(0);
    if (n < kDrawnNumbers) std::memcpy(to + i, drawn, size_t(n) * sizeof(scalar_t));
  }
}

}  // namespace
}  // namespace fastbptt
