#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include <cstdlib>
#include <stdexcept>

#include "cpu/kernels.h"

namespace fastbptt {
namespace {

struct Candidate {
  const KernelTable* table;
  bool runs_here;
};

#if defined(__x86_64__)
// Clang's __builtin_cpu_supports does not know it.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

#if defined(FASTBPTT_HAS_NEON_BF16)
bool has_bf16_products() {
#if defined(__linux__)
  return getauxval(AT_HWCAP2) & (1 << 14);  // HWCAP2_BF16, which older headers lack
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has;
#else
  return false;
#endif
}
#endif

std::vector<Candidate> candidates() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  return {{&kAvx512Bf16Kernels, avx512_bf16},
          {&kAvx512Kernels, avx512},
          {&kAvx2Kernels, avx2},
          {&kBaselineKernels, true}};
#elif defined(FASTBPTT_HAS_NEON_BF16)
  return {
      {&kNeonBf16Kernels, has_bf16_products()}, {&kNeonKernels, true}, {&kBaselineKernels, true}};
#elif defined(__aarch64__)
  return {{&kNeonKernels, true}, {&kBaselineKernels, true}};
#else
  return {{&kBaselineKernels, true}};
#endif
}

const KernelTable* best() {
  for (const Candidate& c : candidates()) {
    if (c.runs_here) return c.table;
  }
  return &kBaselineKernels;
}

std::atomic<const KernelTable*> in_use{best()};

}  // namespace

std::vector<std::string> runnable_isas() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates()) {
    if (c.runs_here) names.emplace_back(c.table->isa);
  }
  return names;
}

const KernelTable& kernels() { return *in_use.load(std::memory_order_relaxed); }

void select_isa(const std::string& isa, const std::string& source) {
  std::string known;
  for (const Candidate& c : candidates()) {
    if (isa == c.table->isa) {
      if (!c.runs_here) {
        throw std::runtime_error(source + " asks for \"" + isa +
                                 "\", which this processor does not support");
      }
      in_use = c.table;
      return;
    }
    known += std::string(known.empty() ? "" : ", ") + c.table->isa;
  }
  throw std::runtime_error(source + " must be one of " + known + ", got \"" + isa + "\"");
}

void select_isa_from_environment() {
  if (const char* isa = std::getenv("FASTBPTT_CPU_ISA")) select_isa(isa, "FASTBPTT_CPU_ISA");
}

}  // namespace fastbptt
