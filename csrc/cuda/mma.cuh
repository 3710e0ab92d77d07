// Tensor-core products (sm_80). All are collective over the warp.
//
// d += a b, where a matrix is spread over the warp's registers. With lane = 4 * group + place,
// place in 0..3, element (row, column) of
//
//   d, 16 x 8 floats: d[i] is (group + 8 * (i / 2), 2 * place + i % 2)
//
//   16-bit numbers, two in a register, the one with the smaller row or column in the low half:
//     a, 16 x 16: a[i] is (group + 8 * (i % 2), 2 * place + 8 * (i / 2)) and the next column
//     b, 16 x 8:  b[i] is (2 * place + 8 * i, group) and the next row
//   tf32, one in a register:
//     a, 16 x 8:  a[i] is (group + 8 * (i % 2), place + 4 * (i / 2))
//     b, 8 x 8:   b[i] is (place + 4 * i, group)
//
// So d of one product, rounded and packed in pairs, is half of the columns of an a of 16-bit numbers:
// a[0], a[1] = pack_pair(d[0], d[1]), pack_pair(d[2], d[3]). The tensor cores' sums are of exact
// products, but not rounded as carefully as an FMA does.
#pragma once

#include "device.cuh"

#ifdef FASTBPTT_EMULATED
#include "emulation/mma.h"
#else

#include <type_traits>

namespace fastbptt {

// Two numbers as scalar_t (half_t or bfloat16_t), rounded to the nearest, in the low and high half of
// a register, and back.
template <typename scalar_t>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same_v<scalar_t, half_t>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    static_assert(std::is_same_v<scalar_t, bfloat16_t>, "half_t or bfloat16_t");
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}
template <typename scalar_t>
__device__ __forceinline__ void unpack_pair(uint32_t pair, float& low, float& high) {
  if constexpr (std::is_same_v<scalar_t, half_t>) {
    low = __half2float(__ushort_as_half(uint16_t(pair)));
    high = __half2float(__ushort_as_half(uint16_t(pair >> 16)));
  } else {
    static_assert(std::is_same_v<scalar_t, bfloat16_t>, "half_t or bfloat16_t");
    low = __uint_as_float(pair << 16);
    high = __uint_as_float(pair & 0xffff0000u);
  }
}

// The bits of x rounded to tf32: 10 bits of mantissa, to the nearest, ties away from zero.
__device__ __forceinline__ uint32_t round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// scalar_t is half_t or bfloat16_t.
template <typename scalar_t>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<scalar_t, half_t>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<scalar_t, bfloat16_t>, "half_t or bfloat16_t");
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// tf32: a and b by round_to_tf32, or what the hardware reads is truncated.
__device__ __forceinline__ void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory; matrices[i] gets two numbers of matrix i.
// Lane 8 * i + j gives the address of row j of matrix i: 8 numbers, aligned to 16 bytes. A lane gets
// (group, 2 * place) and the next column. Where memory holds a by rows, the matrices at rows 0, 8,
// 0, 8 and columns 0, 0, 8, 8 are the four registers of a; with tf32, 4 columns for 8.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&matrices)[4], const void* shared_row) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(address)
               : "memory");
}

// The same of the transposed matrices: a lane gets (2 * place, group) and the next row. Where memory
// holds b by rows, the matrices at rows 0 and 8 are the two registers of b.
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&matrices)[4],
                                                          const void* shared_row) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(address)
               : "memory");
}

}  // namespace fastbptt

#endif
