// Masks for users' cells, drawn by all threads. torch's own are drawn by one, and can take a quarter
// of a pass.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <mutex>

#include "cpu/kernels.h"

namespace fastbptt {
namespace {

using at::Tensor;

template <typename scalar_t>
void draw(scalar_t* to, int64_t count, uint64_t seed, double p, double value) {
  const double threshold = std::round(std::ldexp(p, 32));
  if (threshold >= std::ldexp(1.0, 32)) {
    std::fill(to, to + count, scalar_t(value));
    return;
  }
  constexpr int64_t kGroupsByThread = 128;  // about 5 us
  const int64_t groups = (count + kDrawnNumbers - 1) / kDrawnNumbers;
  const auto kernel = user_kernels_for<scalar_t>()->bernoulli;
  at::parallel_for(0, groups, kGroupsByThread, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kDrawnNumbers;
    const int64_t own = std::min(end * kDrawnNumbers, count) - first;
    kernel(to + first, first, own, seed, uint32_t(threshold), scalar_t(value));
  });
}

Tensor& bernoulli(Tensor& self, double p, double value, std::optional<at::Generator> generator) {
  const auto dtype = self.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kDouble,
              "bernoulli_: self must be float32 or float64, got ", dtype);
  TORCH_CHECK(self.is_contiguous(), "bernoulli_: self must be contiguous, got strides ",
              self.strides());
  TORCH_CHECK(p >= 0 && p <= 1, "bernoulli_: p must be in [0, 1], got ", p);
  uint64_t seed;
  {
    auto* const source = at::get_generator_or_default<at::CPUGeneratorImpl>(
        generator, at::detail::getDefaultCPUGenerator());
    const std::lock_guard<std::mutex> lock(source->mutex_);
    seed = source->random64();
  }
  if (dtype == at::kFloat) {
    draw(self.mutable_data_ptr<float>(), self.numel(), seed, p, value);
  } else {
    draw(self.mutable_data_ptr<double>(), self.numel(), seed, p, value);
  }
  return self;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastbptt, m) {
  // Each number of self, float32 or float64 and contiguous: value with probability p, else 0.
  m.def(
      "bernoulli_(Tensor(a!) self, float p, float value=1., *, Generator? generator=None) -> "
      "Tensor(a!)",
      {at::Tag::nondeterministic_seeded});
}
TORCH_LIBRARY_IMPL(fastbptt, CPU, m) { m.impl("bernoulli_", bernoulli); }

}  // namespace fastbptt
