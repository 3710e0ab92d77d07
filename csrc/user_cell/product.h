// A product of few rows with a matrix, as its kernels know it and what launches them. NVRTC reads this too,
// which has no headers of the standard library.
#pragma once

namespace fastbptt {

// out = rows weight^T, in float32. What follows a row in memory begins `ld` numbers behind it.
struct UserProduct {
  const float* rows;    // [count, depth]
  const float* weight;  // [columns, depth]
  float* out;           // [count, columns]
  long long ld_rows, ld_weight, ld_out;
  int count, columns, depth;
};

constexpr int kProductColumns = 4;  // of a block
constexpr int kProductWarps = 8;    // of a block, at most
// The kernels, as fastbptt/_codegen.py writes them out: for up to so many rows, and for so many numbers of
// a row that are loaded at once, where their number and all addresses are multiples of it.
constexpr int kProductRows[] = {4, 8, 16, 32};
constexpr int kProductVectors[] = {4, 1};
constexpr int kProductKernels = 8;

}  // namespace fastbptt
