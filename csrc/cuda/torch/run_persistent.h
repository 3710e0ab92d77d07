// Runs a recurrence by a persistent kernel, where there is one for it.
#pragma once

#include <ATen/Context.h>
#include <ATen/ops/from_blob.h>
#include <torch/version.h>

#include <algorithm>
#include <type_traits>

#include "cuda/cell_columns.h"
#include "cuda/persistent.h"
#include "cuda/torch/allocate.h"
#include "cuda/torch/glue.h"
#include "tensors.h"

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

template <typename scalar_t, typename Kernels>
void run_persistent(Kernels, CellKind cell, const FwdRecurrence<scalar_t>& p, const Tiling& tiling,
                    const Tensor& w_hh, int64_t) {
  Kernels::run(cell, p, tiling, current_stream(w_hh));
}

template <typename scalar_t, typename Kernels>
void run_persistent(Kernels, CellKind cell, const BwdRecurrence<scalar_t>& p, const Tiling& tiling,
                    const Tensor& w_hh, int64_t span_steps) {
  const Stream stream = current_stream(w_hh);
  if (!p.d.sums) return Kernels::run(cell, p, tiling, stream);

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
  Kernels::run(cell, by_lane, tiling, stream);
  by_lane.d = p.d;
  run_sum_lanes<scalar_t>(by_lane, by_lane.d_by_lane, span_steps, columns, stream);
  const auto add_up = [&](float* to, const Tensor& rows) {
    if (to) at::from_blob(to, {B, p.H}, summed).add_(rows.sum(0));
  };
  add_up(p.d_hx, d_hx);
  add_up(p.d_cx, d_cx);
}

// False if no such kernel was wanted or none can run. Params: FwdRecurrence or BwdRecurrence;
// span_steps: the span's, of the latter.
template <typename scalar_t, template <typename> typename Params>
bool run_persistent(CellKind cell, const Params<scalar_t>& p, const Tensor& w_hh,
                    int64_t span_steps) {
  const Kernel wish = wished_kernel();
  if (wish == Kernel::kStepwise) return false;
  bool done = false;
  const bool has_kernels = !std::is_same_v<scalar_t, double> && !p.w_hr;
  if constexpr (!std::is_same_v<scalar_t, double>) {
    if (has_kernels) {
      for_arithmetic<scalar_t>([&](auto kernels) {
        const Tiling tiling = kernels.tiling(cell, p, wish);
        if (tiling.warps == 0) return;
        run_persistent<scalar_t>(kernels, cell, p, tiling, w_hh, span_steps);
        done = true;
      });
    }
  }
  TORCH_CHECK(done || wish == Kernel::kAuto,
              "FASTBPTT_CUDA_KERNEL=", wish == Kernel::kResident ? "resident" : "cluster",
              ": there is no such kernel for ",
              has_kernels ? "so many hidden units on this device"
              : p.w_hr    ? "an LSTM with projections"
                          : "float64");
  return done;
}

}  // namespace fastbptt
