// Runs a recurrence by a persistent kernel, where there is one for it.
#pragma once

#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <type_traits>

#include "cuda/cell_columns.h"
#include "cuda/persistent.h"
#include "cuda/stepwise.h"
#include "cuda/torch/allocate.h"
#include "cuda/torch/glue.h"
#include "cuda/torch/multiply.h"
#include "tensors.h"

namespace fastbptt {

// Calls fn(Persistent<...>{}) for what multiplies numbers of the type.
template <typename scalar_t, typename Fn>
void for_arithmetic(Fn&& fn) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    if (allows_tf32()) {
      fn(Persistent<Tf32Cores, float>{});
    } else {
      fn(Persistent<PlainFma, float>{});
    }
  } else {
    fn(Persistent<TensorCores<scalar_t>, scalar_t>{});
  }
}

// Runs a plan, with the memory that it needs.
template <typename Kernels, typename Params>
void run_plan(Kernels, CellKind cell, const Params& p, const Plan& plan, int64_t column_gates,
              const Tensor& w_hh) {
  const int64_t lanes = p.num_lanes();
  GridMemory memory{};
  Tensor flags, x;
  if (plan.tiling.is_grid) {
    const auto options = w_hh.options();
    flags = allocate({plan.launches() * plan.flags(lanes)}, options.dtype(at::kInt)).zero_();
    x = allocate({plan.x_numbers(lanes, column_gates)}, options);
    memory.flags = reinterpret_cast<uint32_t*>(flags.mutable_data_ptr<int>());
    memory.x = x.mutable_data_ptr();
  }
  Kernels::run(cell, p, plan, memory, current_stream(w_hh));
}

template <typename scalar_t, typename Kernels>
void run_planned(Kernels kernels, CellKind cell, const FwdRecurrence<scalar_t>& p, const Plan& plan,
                 const Tensor& w_hh, int64_t) {
  run_plan(kernels, cell, p, plan, 1, w_hh);
}

template <typename scalar_t, typename Kernels>
void run_planned(Kernels kernels, CellKind cell, const BwdRecurrence<scalar_t>& p, const Plan& plan,
                 const Tensor& w_hh, int64_t span_steps) {
  const auto run = [&](const BwdRecurrence<scalar_t>& p) {
    run_plan(kernels, cell, p, plan, columns_of(cell).gates, w_hh);
  };
  if (!p.d.sums) return run(p);

  // What lanes that overlap compute is kept by lane, and added up afterwards.
  const auto stored = w_hh.options(), summed = stored.dtype(at::kFloat);
  const int64_t B = p.sequences.layout.B, columns = columns_of(cell).columns * p.H;
  BwdRecurrence<scalar_t> by_lane = p;
  Tensor d_by_lane;
  if (!p.d_by_lane) {
    d_by_lane = allocate({p.steps, p.num_lanes(), columns}, stored);
    by_lane.d_by_lane = data<scalar_t>(d_by_lane);
  }
  const auto rows_of = [&](float** pointer) {
    if (!*pointer) return Tensor();
    const Tensor rows = allocate({p.windows.count, B, p.H}, summed).zero_();
    *pointer = data<float>(rows);
    return rows;
  };
  by_lane.states_by_lane = true;
  const Tensor d_hx = rows_of(&by_lane.d_hx), d_cx = rows_of(&by_lane.d_cx);
  by_lane.d = {};
  run(by_lane);
  by_lane.d = p.d;
  run_sum_lanes<scalar_t>(by_lane, by_lane.d_by_lane, span_steps, columns, current_stream(w_hh));
  const auto add_up = [&](float* to, const Tensor& rows) {
    if (to) at::from_blob(to, {B, p.H}, summed).add_(rows.sum(0));
  };
  add_up(p.d_hx, d_hx);
  add_up(p.d_cx, d_cx);
}

// Steps and lanes are counted by 32 bits in the kernels.
constexpr int64_t kMostNumbered = (int64_t(1) << 31) - 4 * kPlaceSteps;

// False if no such kernel was wanted or none can run. Params: FwdRecurrence or BwdRecurrence;
// span_steps: the span's, of the latter.
template <typename scalar_t, template <typename> typename Params>
bool run_persistent(CellKind cell, const Params<scalar_t>& p, const Tensor& w_hh,
                    int64_t span_steps) {
  const Wish wish = wish_of_environment();
  if (wish.kernel == Kernel::kStepwise) return false;
  bool done = false;
  const bool has_kernels = !std::is_same_v<scalar_t, double> && !p.w_hr &&
                           std::max(p.sequences.layout.T, p.num_lanes()) < kMostNumbered;
  if constexpr (!std::is_same_v<scalar_t, double>) {
    constexpr bool kBackward = std::is_same_v<Params<scalar_t>, BwdRecurrence<scalar_t>>;
    const bool are_replayed = !p.sequences.lengths && p.num_steps() >= kFewestGraphSteps;
    if (has_kernels) {
      for_arithmetic<scalar_t>([&](auto kernels) {
        const Plan plan = kernels.plan(cell, kBackward, p.H, p.num_lanes(), are_replayed, wish);
        if (!plan.exists()) return;
        try {
          run_planned<scalar_t>(kernels, cell, p, plan, w_hh, span_steps);
          done = true;
        } catch (const LaunchError& error) {
          if (wish.kernel != Kernel::kAuto) throw;
          TORCH_WARN_ONCE("fastbptt goes on with another kernel: ", error.what());
        }
      });
    }
  }
  TORCH_CHECK(done || wish.kernel == Kernel::kAuto, "FASTBPTT_CUDA_KERNEL=", name_of(wish.kernel),
              ": there is no such kernel for ",
              has_kernels                        ? "so many hidden units on this device"
              : p.w_hr                           ? "an LSTM with projections"
              : std::is_same_v<scalar_t, double> ? "float64"
                                                 : "so many steps or sequences");
  return done;
}

}  // namespace fastbptt
