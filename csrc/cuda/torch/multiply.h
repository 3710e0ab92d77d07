// The products of steps: by torch's library, or where they are of few rows by a kernel of ours.
#pragma once

#include "cuda/stepwise.h"
#include "cuda/torch/glue.h"
#include "few_rows_launch.h"
#include "few_rows_tensors.h"

namespace fastbptt {

// Whether a product of so many rows with w is that of few_rows.cuh, which is in float32 as it is.
inline bool is_of_few_rows(const at::Tensor& w, int64_t rows) {
  return w.scalar_type() == at::kFloat && are_few_rows(rows, w.numel()) && !allows_tf32();
}

// w, or a copy of it, as `multiply` is to have it for so many rows: with columns that are contiguous.
inline at::Tensor as_operand(const at::Tensor& w, int64_t rows) {
  return is_of_few_rows(w, rows) && w.stride(0) != 1 ? w.t().contiguous().t() : w;
}

// out = a b. Where a and b are of 16 bits out may be in float32: what the product sums is not rounded.
inline void multiply(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  const bool is_laid_out = a.stride(1) == 1 && b.stride(0) == 1 && out.stride(1) == 1;
  if (!is_laid_out || !is_of_few_rows(b, a.size(0))) return multiply_by_library(out, a, b);
  run_few_rows(few_rows_product(out, a, b), current_stream(out));
}

}  // namespace fastbptt
