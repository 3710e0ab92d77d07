// The kernels for products of few rows that users' cells have, as NVRTC compiles them.
#pragma once

#include "user_cell/device.cuh"

// Needs what is above.
#include "few_rows.cuh"

#define FASTBPTT_PRODUCT_KERNEL(rows, columns, vector)                                      \
  extern "C" __global__ void __launch_bounds__(fastbptt::kProductWarps* fastbptt::kWarp, 1) \
      fastbptt_product_##rows##_##columns##_##vector(fastbptt::FewRowsProduct p) {          \
    fastbptt::multiply_few_rows<rows, columns, vector>(p);                                  \
  }
