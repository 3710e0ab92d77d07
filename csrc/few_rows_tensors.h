// A product of few rows, of tensors, and whether it need be exact.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <torch/version.h>

#include "few_rows.h"

namespace fastbptt {

// Whether torch's own float32 products may round their operands. Since 2.9 a program may have said so
// by either of two settings; asked for the older one, torch throws where the newer was used.
inline bool allows_tf32() {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 10
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
#elif TORCH_VERSION_MINOR == 9
  return at::globalContext().float32Precision("cuda", "matmul") == "tf32";
#else
  return at::globalContext().allowTF32CuBLAS();
#endif
}

// out = rows weight, in float32: rows of out and of `rows` are contiguous, and columns of weight.
inline FewRowsProduct few_rows_product(const at::Tensor& out, const at::Tensor& rows,
                                       const at::Tensor& weight) {
  return {rows.const_data_ptr<float>(),
          weight.const_data_ptr<float>(),
          out.mutable_data_ptr<float>(),
          rows.stride(0),
          weight.stride(1),
          out.stride(0),
          int(rows.size(0)),
          int(weight.size(1)),
          int(weight.size(0))};
}

}  // namespace fastbptt
