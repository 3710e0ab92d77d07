// The kernels of a user's cell, and of products, as emulated_launch takes them; included behind their
// source.
#pragma once

#include "few_rows.h"
#include "user_cell/step.h"

#define FASTBPTT_EMULATED_KERNEL(Cell, scalar_t, pass)                              \
  extern "C" void fastbptt_emulated_##pass(void** arguments) {                      \
    fastbptt_cell_##pass(                                                           \
        *static_cast<const fastbptt::UserArguments<Cell, scalar_t>*>(arguments[0]), \
        *static_cast<const fastbptt::UserStep*>(arguments[1]));                     \
  }
#define FASTBPTT_EMULATED_KERNELS(Cell, scalar_t)    \
  FASTBPTT_EMULATED_KERNEL(Cell, scalar_t, forward)  \
  FASTBPTT_EMULATED_KERNEL(Cell, scalar_t, backward) \
  FASTBPTT_EMULATED_KERNEL(Cell, scalar_t, finish)

#define FASTBPTT_EMULATED_PRODUCT(rows, columns, vector)                                      \
  extern "C" void fastbptt_emulated_product_##rows##_##columns##_##vector(void** arguments) { \
    fastbptt_product_##rows##_##columns##_##vector(                                           \
        *static_cast<const fastbptt::FewRowsProduct*>(arguments[0]));                         \
  }
