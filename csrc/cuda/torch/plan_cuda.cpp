// The operator cuda_plan: how a recurrence would run, for benchmarks and bug reports.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <sstream>

#include "checks.h"
#include "cuda/torch/calls.h"
#include "cuda/torch/run_persistent.h"

namespace fastbptt {
namespace {

std::string to_json(const Plan& plan) {
  const Tiling& t = plan.tiling;
  std::ostringstream text;
  text << "{\"kernel\": \"" << name_of(plan.kernel()) << "\", \"cycles\": " << plan.cycles;
  if (plan.exists()) {
    text << ", \"blocks\": " << t.team() << ", \"cluster\": " << t.cluster
         << ", \"units\": " << t.units << ", \"lanes\": " << t.lanes
         << ", \"waves\": " << plan.waves << ", \"warps\": " << t.warps
         << ", \"shared_bytes\": " << t.shared.bytes;
  }
  text << "}";
  return text.str();
}

std::string cuda_plan(const Tensor& like, c10::string_view cell, int64_t hidden_size, int64_t lanes,
                      bool backward) {
  const CellKind kind = parse_cell(cell);
  TORCH_CHECK(hidden_size > 0, "hidden_size must be positive, got ", hidden_size);
  TORCH_CHECK(lanes > 0, "lanes must be positive, got ", lanes);
  const auto dtype = like.scalar_type();
  TORCH_CHECK(
      dtype == at::kDouble || dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16,
      "like must be of float64, float32, float16 or bfloat16, got ", dtype);
  const CallGuard guard(like);
  Plan plan{};
  const Wish wish = wish_of_environment();
  for_dtype(like, [&](auto zero) {
    using scalar_t = decltype(zero);
    if constexpr (!std::is_same_v<scalar_t, double>) {
      if (wish.kernel == Kernel::kStepwise) return;
      for_arithmetic<scalar_t>([&](auto kernels) {
        plan = kernels.plan(kind, backward, hidden_size, lanes, /*is_replayed=*/true, wish);
      });
    }
  });
  return to_json(plan);
}

constexpr const char* kPlanSchema =
    "cuda_plan(Tensor like, str cell, int hidden_size, int lanes, bool backward) -> str";

}  // namespace

// How a layer's long recurrence of so many lanes, sequences or windows, runs on like's device in its dtype,
// as JSON: the kernel, its estimate of a step in cycles (0 where there is none), and its division.
#ifdef FASTBPTT_EMULATED
TORCH_LIBRARY_FRAGMENT(fastbptt_emulated, m) {
  m.def(kPlanSchema);
  m.impl("cuda_plan", c10::DispatchKey::CPU, cuda_plan);
}
#else
TORCH_LIBRARY_FRAGMENT(fastbptt, m) { m.def(kPlanSchema); }
TORCH_LIBRARY_IMPL(fastbptt, CUDA, m) { m.impl("cuda_plan", cuda_plan); }
#endif

}  // namespace fastbptt
