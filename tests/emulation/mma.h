// The emulation's bodies of csrc/cuda/mma.cuh, which says what they mean.
#pragma once

#include <type_traits>

#include "emulation/device.h"

namespace fastbptt {
namespace emulation {

template <typename To, typename From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "of the same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename scalar_t>
float number_of(uint16_t bits) {
  static_assert(std::is_same_v<scalar_t, half_t> || std::is_same_v<scalar_t, bfloat16_t>,
                "half_t or bfloat16_t");
  return scalar_t(bits, scalar_t::from_bits());
}

// What a lane brings to a product; d is what it gets.
struct Fragments {
  uint32_t a[4], b[2];
  float d[4];
};

// d += a b, with the matrices put together from the lanes' registers and taken apart again.
// set(lane, registers, a, b) puts a lane's part of a and b where it belongs.
template <int K, typename Set>
void multiply(Warp& warp, const Set& set) {
  float a[16][K], b[K][8];
  Fragments lanes[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    std::memcpy(&lanes[lane], warp.in[lane], sizeof(Fragments));
    set(lane / 4, lane % 4, lanes[lane], a, b);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    float* d = lanes[lane].d;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      for (int k = 0; k < K; ++k) d[i] += a[row][k] * b[k][column];
    }
    std::memcpy(warp.out[lane], d, sizeof lanes[lane].d);
  }
}

template <typename scalar_t>
void multiply_m16n8k16(Warp& warp) {
  multiply<16>(warp, [](int group, int place, const Fragments& lane, auto& a, auto& b) {
    for (int i = 0; i < 4; ++i) {
      float* pair = &a[group + 8 * (i % 2)][2 * place + 8 * (i / 2)];
      pair[0] = number_of<scalar_t>(uint16_t(lane.a[i]));
      pair[1] = number_of<scalar_t>(uint16_t(lane.a[i] >> 16));
    }
    for (int i = 0; i < 2; ++i) {
      const int row = 2 * place + 8 * i;
      b[row][group] = number_of<scalar_t>(uint16_t(lane.b[i]));
      b[row + 1][group] = number_of<scalar_t>(uint16_t(lane.b[i] >> 16));
    }
  });
}

inline void multiply_m16n8k8(Warp& warp) {
  multiply<8>(warp, [](int group, int place, const Fragments& lane, auto& a, auto& b) {
    for (int i = 0; i < 4; ++i) {
      a[group + 8 * (i % 2)][place + 4 * (i / 2)] = bit_cast<float>(lane.a[i]);
    }
    for (int i = 0; i < 2; ++i) b[place + 4 * i][group] = bit_cast<float>(lane.b[i]);
  });
}

inline void mma(const char* what, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                void (*product)(Warp&), const Site& site) {
  Fragments lane;
  std::memcpy(lane.a, a, sizeof a);
  std::memcpy(lane.b, b, sizeof b);
  std::memcpy(lane.d, d, sizeof d);
  std::memcpy(d, warp_exchange(what, &lane, sizeof lane, product, site), sizeof d);
}

// tf32 as round_to_tf32 leaves it; NaN may be anything.
inline void require_tf32(uint32_t bits, const Site& site) {
  require(!(bits & 0x1fff) || std::isnan(bit_cast<float>(bits)),
          "mma_m16n8k8 of a number that round_to_tf32 has not rounded", site);
}

// Lane 8 * i + j has put the address of row j of matrix i there.
template <bool kTransposed>
void load_matrices(Warp& warp) {
  const unsigned char* rows[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) std::memcpy(&rows[lane], warp.in[lane], sizeof rows[0]);
  for (int lane = 0; lane < kWarp; ++lane) {
    const int group = lane / 4, place = lane % 4;
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 2; ++j) {
        const int row = kTransposed ? 2 * place + j : group;
        const int column = kTransposed ? group : 2 * place + j;
        std::memcpy(&warp.out[lane][4 * i + 2 * j], rows[8 * i + row] + 2 * column, 2);
      }
    }
  }
}

inline void load_matrix(const char* what, uint32_t (&matrices)[4], const void* row,
                        void (*load)(Warp&), const Site& site) {
  require(this_thread().block->holds(row, 16), "a matrix's row outside of the shared memory", site);
  require(uintptr_t(row) % 16 == 0, "a matrix's row that is not aligned to 16 bytes", site);
  std::memcpy(matrices, warp_exchange(what, &row, sizeof row, load, site), sizeof matrices);
}

}  // namespace emulation

template <typename scalar_t>
uint32_t pack_pair(float low, float high) {
  return uint32_t(scalar_t(low).x) | uint32_t(scalar_t(high).x) << 16;
}

template <typename scalar_t>
void unpack_pair(uint32_t pair, float& low, float& high) {
  low = emulation::number_of<scalar_t>(uint16_t(pair));
  high = emulation::number_of<scalar_t>(uint16_t(pair >> 16));
}

inline uint32_t round_to_tf32(float x) {
  const uint32_t bits = emulation::bit_cast<uint32_t>(x);
  if (!std::isfinite(x)) return std::isnan(x) ? 0x7fffe000u : bits;
  return (bits + 0x1000) & ~uint32_t(0x1fff);
}

template <typename scalar_t>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  emulation::Site site = emulation::Site::here()) {
  emulation::mma("mma_m16n8k16", d, a, b, emulation::multiply_m16n8k16<scalar_t>, site);
}

inline void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                        emulation::Site site = emulation::Site::here()) {
  for (const uint32_t bits : a) emulation::require_tf32(bits, site);
  for (const uint32_t bits : b) emulation::require_tf32(bits, site);
  emulation::mma("mma_m16n8k8", d, a, b, emulation::multiply_m16n8k8, site);
}

inline void load_matrix_x4(uint32_t (&matrices)[4], const void* shared_row,
                           emulation::Site site = emulation::Site::here()) {
  emulation::load_matrix("load_matrix_x4", matrices, shared_row, emulation::load_matrices<false>,
                         site);
}

inline void load_matrix_x4_transposed(uint32_t (&matrices)[4], const void* shared_row,
                                      emulation::Site site = emulation::Site::here()) {
  emulation::load_matrix("load_matrix_x4_transposed", matrices, shared_row,
                         emulation::load_matrices<true>, site);
}

}  // namespace fastbptt
