// Runs a recurrence on the GPU, as params.cuh describes it: the choice of the kernel, and the time
// loop of the stepwise one.
#pragma once

#include <string>

#include "cuda/stepwise.h"
#include "cuda/torch/allocate.h"
#include "cuda/torch/glue.h"
#include "cuda/torch/multiply.h"
#include "cuda/torch/run_persistent.h"
#include "cuda/torch/step_graph.h"

namespace fastbptt {

// What the host holds of a recurrence beside its parameters.
struct RecurrenceTensors {
  Tensor w_hh, w_hr;           // as in the parameters; w_hr may be undefined
  const int64_t* batch_sizes;  // [T] on the host, or null if uniform
};

// The dtype that sums are kept in.
inline at::ScalarType accumulator_of(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline Tensor first_rows(const Tensor& tensor, int64_t rows) {
  return rows == tensor.size(0) ? tensor : tensor.narrow(0, 0, rows);
}

// Once in the life of the process.
inline void warn_of_graph(const std::string& reason) {
  TORCH_WARN_ONCE("no CUDA graph of a recurrence's steps, which are launched one by one instead: ",
                  reason);
}

// Calls step(StepNumber) for 0, 1, ..., count - 1. Many steps that are alike, the same launches at the
// same addresses, are captured in a CUDA graph, kGraphSteps of them, and replayed. From the host a step
// takes 10 to 12 microseconds, replayed it should take about 4 (not measured); a graph should have
// paid for itself after some 40 steps.
template <typename Step>
void run_steps(const Tensor& like, int64_t count, bool are_alike, Step&& step) {
  int64_t next = 0;
  if (are_alike && count >= kFewestGraphSteps && !is_capturing(like)) {
    const Tensor further = allocate({1}, like.options().dtype(at::kLong));
    int64_t* const counted = data<int64_t>(further);
    try {
      const GraphStream stream(like);
      run_count_steps(counted, 0, current_stream(like));
      // What launches and products make for themselves where they are first on a stream, they have made
      // after these. The first may have no product.
      for (; next < 2; ++next) step(StepNumber{next});
      const int64_t before = stream.allocations();
      step(StepNumber{next++});
      // Memory that a step takes for itself would be another's by the time of a replay.
      if (stream.allocations() == before) {
        StepGraph graph(current_stream(like), [&] {
          for (int64_t i = 0; i < kGraphSteps; ++i) step(StepNumber{next + i, counted});
          run_count_steps(counted, kGraphSteps, current_stream(like));
        });
        for (; count - next >= kGraphSteps; next += kGraphSteps) graph.replay();
      }
    } catch (const GraphError& error) {
      warn_of_graph(error.what());  // and what was captured has not run
    }
  }
  for (; next < count; ++next) step(StepNumber{next});
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
  Kernels::run_initial_states(p, s, current_stream(w_hh));
  run_steps(w_hh, T, !tensors.batch_sizes, [&](StepNumber step) {
    const Stream stream = current_stream(w_hh);
    const int64_t t = p.sequences.direction > 0 ? step.number : T - 1 - step.number;
    // Those that reach step t are the first ones.
    const int64_t rows = tensors.batch_sizes ? tensors.batch_sizes[t] : B;
    if (step.number > 0 || p.hx) {
      multiply(first_rows(rec, rows), first_rows(h, rows), w_hh_t);
      s.rec = data<acc_t>(rec);
    }
    Kernels::run_forward_step(cell, p, s, step, rows, stream);
    if (!is_projected) return;
    multiply(first_rows(projected, rows), first_rows(unprojected, rows), w_hr_t);
    Kernels::run_project_step(p, s, step, rows, stream);
  });
}

template <typename scalar_t>
void run_stepwise(CellKind cell, const BwdRecurrence<scalar_t>& p,
                  const RecurrenceTensors& tensors) {
  using Kernels = Stepwise<scalar_t>;
  using acc_t = Accumulator<scalar_t>;
  const CellColumns columns = columns_of(cell);
  const int64_t lanes = p.num_lanes(), width = columns.columns * p.H;
  const bool is_projected = p.w_hr;
  const Tensor w_hh = as_operand(tensors.w_hh, lanes);
  const Tensor w_hr = is_projected ? as_operand(tensors.w_hr, lanes) : Tensor();
  const auto stored = w_hh.options(), summed = stored.dtype(accumulator_of(w_hh));
  const Tensor from_after = allocate({lanes, p.R}, summed);
  const Tensor d = allocate({lanes, width}, stored);  // of one lockstep after another
  const Tensor recurrent = d.narrow(1, columns.first_recurrent * p.H, columns.gates * p.H);
  Tensor carry, from_projection, d_projected;
  if (columns.has_carry) carry = allocate({lanes, p.H}, summed);
  if (is_projected) {
    from_projection = allocate({lanes, p.H}, summed);
    d_projected = allocate({lanes, p.R}, stored);
  }
  BwdScratch<scalar_t> s{data<acc_t>(from_after), data<acc_t>(from_projection), data<acc_t>(carry),
                         data<scalar_t>(d), data<scalar_t>(d_projected)};
  // Without windows the lanes that have a step are the first ones, as many as sequences have that
  // many; one more lockstep is for those that had their last step before.
  const bool is_prefix = tensors.batch_sizes && p.windows.k1 == p.sequences.layout.T;
  const auto run_lockstep = [&](StepNumber step) {
    const Stream stream = current_stream(w_hh);
    const int64_t k = step.number;
    const int64_t rows = is_prefix && k > 0 ? tensors.batch_sizes[k - 1] : lanes;
    if (k > 0) multiply(first_rows(from_after, rows), first_rows(recurrent, rows), w_hh);
    if (is_projected) {
      Kernels::run_project_back(p, s, step, rows, stream);
      if (s.d) {
        multiply(first_rows(from_projection, rows), first_rows(d_projected, rows), w_hr);
      }
    }
    Kernels::run_backward_step(cell, p, s, step, rows, stream);
  };
  run_steps(w_hh, p.steps, !is_prefix, run_lockstep);
  if (!p.d_hx && !p.d_cx) return;
  s.d = nullptr;  // no step is left, only initial states
  run_lockstep(StepNumber{p.steps});
}

// The one place that knows which kernels there are: Params is FwdRecurrence or BwdRecurrence, and
// span_steps the steps of the latter's span.
template <typename Params>
void run_recurrence(CellKind cell, const Params& p, const RecurrenceTensors& tensors,
                    int64_t span_steps = 0) {
  if (!run_persistent(cell, p, tensors.w_hh, span_steps)) run_stepwise(cell, p, tensors);
}

}  // namespace fastbptt
