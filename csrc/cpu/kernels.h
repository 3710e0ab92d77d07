// The kernels of one instruction set, and the choice of the set that runs.
#pragma once

#include <string>
#include <vector>

#include "cpu/team.h"
#include "params.h"

namespace fastbptt {

// Each pass of each cell: the bytes of workspace it wants, and what every thread of a team runs.
template <typename Params>
struct Kernel {
  int64_t (*workspace)(const Params& p);
  void (*run)(const Params& p, const Worker& worker);
};

template <typename scalar_t>
struct Kernels {
  Kernel<FwdParams<scalar_t>> forward[kNumCells];  // by CellKind
  Kernel<BwdParams<scalar_t>> backward[kNumCells];
};

struct KernelTable {
  const char* isa;
  Kernels<float> f32;
  Kernels<double> f64;
};

// The instruction sets that were built, best first.
extern const KernelTable kAvx512Kernels, kAvx2Kernels, kBaselineKernels;

// Those that this processor can run, best first.
std::vector<std::string> runnable_isas();

// The set in use: the best one, or the one that FASTBPTT_CPU_ISA or `select_isa` names.
const KernelTable& kernels();

// Throws std::runtime_error if the set is unknown or this processor lacks it; the source says who
// asked.
void select_isa(const std::string& isa, const std::string& source);

// Applies FASTBPTT_CPU_ISA; throws as select_isa does.
void select_isa_from_environment();

template <typename scalar_t>
const Kernels<scalar_t>& kernels_for() {
  if constexpr (sizeof(scalar_t) == 4) {
    return kernels().f32;
  } else {
    return kernels().f64;
  }
}

}  // namespace fastbptt
