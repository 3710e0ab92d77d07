// Runs a recurrence on the GPU, as params.cuh describes it: the choice of the kernel, and the time
// loop of the stepwise one.
#pragma once

#include <ATen/ops/mm.h>

#include "cuda/stepwise.h"
#include "cuda/torch/allocate.h"
#include "cuda/torch/glue.h"
#include "cuda/torch/run_persistent.h"

namespace fastbptt {

// What the host holds of a recurrence beside its parameters.
struct RecurrenceTensors {
  Tensor w_hh, w_hr;           // as in the parameters; w_hr may be undefined
  Tensor d_by_lane;            // likewise
  const int64_t* batch_sizes;  // [T] on the host, or null if uniform
};

// out = a b, where out may be float32 and the others of 16 bits.
inline void multiply(Tensor out, const Tensor& a, const Tensor& b) {
  if (out.scalar_type() == a.scalar_type()) {
    at::mm_out(out, a, b);
  } else {
    multiply_widening(out, a, b);
  }
}

// The dtype that sums are kept in.
inline at::ScalarType accumulator_of(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline Tensor first_rows(const Tensor& tensor, int64_t rows) {
  return rows == tensor.size(0) ? tensor : tensor.narrow(0, 0, rows);
}

template <typename scalar_t>
void run_stepwise(CellKind cell, const FwdRecurrence<scalar_t>& p,
                  const RecurrenceTensors& tensors) {
  using Kernels = Stepwise<scalar_t>;
  using acc_t = Accumulator<scalar_t>;
  const CellColumns columns = columns_of(cell);
  const Tensor& w_hh = tensors.w_hh;
  const auto stored = w_hh.options(), summed = stored.dtype(accumulator_of(w_hh));
  const int64_t T = p.sequences.layout.T, B = p.sequences.layout.B;
  const bool is_projected = p.w_hr;
  const Tensor h = allocate({B, p.R}, stored), rec = allocate({B, columns.gates * p.H}, summed);
  const Tensor w_hh_t = w_hh.t(), w_hr_t = is_projected ? tensors.w_hr.t() : Tensor();
  Tensor carried_h, c, unprojected, projected;
  if (columns.has_cell_state) {
    c = allocate({B, p.H}, summed);
  } else if (columns.has_carry) {
    carried_h = allocate({B, p.R}, summed);
  }
  if (is_projected) {
    unprojected = allocate({B, p.H}, stored);
    projected = allocate({B, p.R}, summed);
  }
  FwdScratch<scalar_t> s{data<scalar_t>(h), data<acc_t>(carried_h),      data<acc_t>(c),
                         nullptr,           data<scalar_t>(unprojected), data<acc_t>(projected)};
  const Stream stream = current_stream(w_hh);
  Kernels::run_initial_states(p, s, stream);
  for (int64_t step = 0; step < T; ++step) {
    const int64_t t = p.sequences.direction > 0 ? step : T - 1 - step;
    // Those that reach step t are the first ones.
    const int64_t rows = tensors.batch_sizes ? tensors.batch_sizes[t] : B;
    if (step > 0 || p.hx) {
      multiply(first_rows(rec, rows), first_rows(h, rows), w_hh_t);
      s.rec = data<acc_t>(rec);
    }
    Kernels::run_forward_step(cell, p, s, t, rows, stream);
    if (!is_projected) continue;
    multiply(first_rows(projected, rows), first_rows(unprojected, rows), w_hr_t);
    Kernels::run_project_step(p, s, t, rows, stream);
  }
}

template <typename scalar_t>
void run_stepwise(CellKind cell, const BwdRecurrence<scalar_t>& p,
                  const RecurrenceTensors& tensors) {
  using Kernels = Stepwise<scalar_t>;
  using acc_t = Accumulator<scalar_t>;
  const CellColumns columns = columns_of(cell);
  const Tensor& w_hh = tensors.w_hh;
  const auto stored = w_hh.options(), summed = stored.dtype(accumulator_of(w_hh));
  const int64_t lanes = p.num_lanes(), width = columns.columns * p.H;
  const bool is_projected = p.w_hr;
  const Tensor from_after = allocate({lanes, p.R}, summed);
  // d of one lockstep after another, or each in its own place.
  const Tensor d = p.d_by_lane ? tensors.d_by_lane : allocate({1, lanes, width}, stored);
  Tensor carry, from_projection, d_projected;
  if (columns.has_carry) carry = allocate({lanes, p.H}, summed);
  if (is_projected) {
    from_projection = allocate({lanes, p.H}, summed);
    d_projected = allocate({lanes, p.R}, stored);
  }
  BwdScratch<scalar_t> s{data<acc_t>(from_after), data<acc_t>(from_projection), data<acc_t>(carry),
                         nullptr, data<scalar_t>(d_projected)};
  const Stream stream = current_stream(w_hh);
  // Without windows the lanes that have a step are the first ones, as many as sequences have that
  // many; one more lockstep is for those that had their last step before.
  const bool is_prefix = tensors.batch_sizes && p.windows.k1 == p.sequences.layout.T;
  const int64_t locksteps = p.steps + (p.d_hx || p.d_cx);
  Tensor before;  // d of the lockstep before, as W_hh sees it
  for (int64_t k = 0; k < locksteps; ++k) {
    const int64_t rows = is_prefix && k > 0 ? tensors.batch_sizes[k - 1] : lanes;
    if (k > 0) multiply(first_rows(from_after, rows), first_rows(before, rows), w_hh);
    const bool has_steps = k < p.steps;
    const Tensor now = has_steps ? d.select(0, p.d_by_lane ? k : 0) : Tensor();
    s.d = data<scalar_t>(now);
    if (is_projected) {
      Kernels::run_project_back(p, s, k, rows, stream);
      if (has_steps) {
        multiply(first_rows(from_projection, rows), first_rows(d_projected, rows), tensors.w_hr);
      }
    }
    Kernels::run_backward_step(cell, p, s, k, rows, stream);
    if (has_steps) before = now.narrow(1, columns.first_recurrent * p.H, columns.gates * p.H);
  }
}

// The one place that knows which kernels there are: Params is FwdRecurrence or BwdRecurrence, and
// span_steps the steps of the latter's span.
template <typename Params>
void run_recurrence(CellKind cell, const Params& p, const RecurrenceTensors& tensors,
                    int64_t span_steps = 0) {
  if (!run_persistent(cell, p, tensors.w_hh, span_steps)) run_stepwise(cell, p, tensors);
}

}  // namespace fastbptt
