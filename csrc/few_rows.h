// A product of few rows with a matrix, as its kernels know it and what launches them. NVRTC reads this too,
// which has no headers of the standard library.
#pragma once

namespace fastbptt {

// out = rows weight^T, in float32. What follows a row in memory begins `ld` numbers behind it.
struct FewRowsProduct {
  const float* rows;    // [count, depth]
  const float* weight;  // [columns, depth]
  float* out;           // [count, columns]
  long long ld_rows, ld_weight, ld_out;
  int count, columns, depth;
};

// A block has a tile of the product, of so many rows and columns. fastbptt/_codegen.py has the same lists.
struct ProductTile {
  int rows, columns;
};
constexpr ProductTile kProductTiles[] = {{4, 4}, {8, 8}, {16, 8}};
// Numbers of a row that are loaded at once, where their number and all addresses are multiples of it.
constexpr int kProductVectors[] = {4, 1};
constexpr int kProductKernels = 6;  // for each of kProductVectors those for kProductTiles
constexpr int kProductWarps = 8;    // of a block, at most

}  // namespace fastbptt
