// A product of few rows, of tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include "few_rows.h"

namespace fastbptt {

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
