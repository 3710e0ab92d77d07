// The kernels of one instruction set, and the choice of the set that runs.
#pragma once

// Those of the standard's headers that kernels.inc uses are included here, before the target is chosen.
#include <algorithm>
#include <cmath>
#include <deque>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/numbers.h"
#include "cpu/split.h"
#include "cpu/team.h"
#include "cpu/waves.h"
#include "params.h"
#include "user_cell/interface.h"

// What follows may use these instructions, up to FASTBPTT_TARGET_END.
#define FASTBPTT_PRAGMA(...) _Pragma(#__VA_ARGS__)
#ifdef __clang__
#define FASTBPTT_TARGET(isa) \
  FASTBPTT_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define FASTBPTT_TARGET_END FASTBPTT_PRAGMA(clang attribute pop)
#else
#define FASTBPTT_TARGET(isa) FASTBPTT_PRAGMA(GCC target(isa))
#define FASTBPTT_TARGET_END
#endif

namespace fastbptt {

// Each pass of each cell.
template <typename Params>
struct Kernel {
  int64_t (*workspace)(const Params& p);  // bytes
  StepWork (*work_of_step)(const Params& p);
  // Whether the pass can wait in its midst for its input to go on.
  bool (*goes_in_pieces)(const Params& p);
  // What the thread that leads a team runs.
  void (*run)(const Params& p, Team& team);
  // The same for several passes that do not depend on each other, each of which has one thread.
  void (*run_side_by_side)(const std::vector<Params>& passes, Team& team);
  // The same for passes that go in pieces, each of which reads what the one before gives.
  void (*run_in_waves)(const std::vector<Params>& passes, Team& team);
};

template <typename scalar_t>
struct Kernels {
  Kernel<FwdParams<scalar_t>> forward[kNumCells];  // by CellKind
  Kernel<BwdParams<scalar_t>> backward[kNumCells];
};

// Of the steps of tangent passes.
template <typename scalar_t>
struct TangentKernels {
  Kernel<ForwardTangentParams<scalar_t>> forward[kNumCells];
  Kernel<BackwardTangentParams<scalar_t>> backward[kNumCells];
};

// Of users' cells, in one direction.
template <typename scalar_t>
struct UserKernels {
  Kernel<UserForwardParams<scalar_t>> forward;
  Kernel<UserBackwardParams<scalar_t>> backward;
  // Numbers [first, first + count) of a seed's, to `to`: `value` with a probability of threshold /
  // 2^32, else 0. `first` is a multiple of kDrawnNumbers.
  void (*bernoulli)(scalar_t* to, int64_t first, int64_t count, uint64_t seed, uint32_t threshold,
                    scalar_t value);
};

struct KernelTable {
  const char* isa;
  const KernelTable* rest;  // the set whose kernels run for types that this one adds nothing to
  const Kernels<float>* f32 = nullptr;
  const Kernels<double>* f64 = nullptr;
  const Kernels<half_t>* f16 = nullptr;
  const Kernels<bfloat16_t>* bf16 = nullptr;
  const TangentKernels<float>* tangents_f32 = nullptr;
  const TangentKernels<double>* tangents_f64 = nullptr;
  const UserKernels<float>* users_f32 = nullptr;
  const UserKernels<double>* users_f64 = nullptr;
};

// The instruction sets that were built, best first.
extern const KernelTable kAvx512Bf16Kernels, kAvx512Kernels, kAvx2Kernels, kNeonBf16Kernels,
    kNeonKernels, kBaselineKernels;

// Whether the compiler has NEON's products of bfloat16 where they are asked for by FASTBPTT_TARGET.
#if defined(__aarch64__) && (!defined(__clang__) || __clang_major__ >= 16)
#define FASTBPTT_HAS_NEON_BF16
#endif

// Those that this processor can run, best first.
std::vector<std::string> runnable_isas();

// The set in use: the best one, or the one that FASTBPTT_CPU_ISA or `select_isa` names.
const KernelTable& kernels();

// Throws std::runtime_error if the set is unknown or this processor lacks it; the source says who
// asked.
void select_isa(const std::string& isa, const std::string& source);

// Applies FASTBPTT_CPU_ISA; throws as select_isa does.
void select_isa_from_environment();

// Those for numbers stored as scalar_t, or null: there are none for 16 bits in the baseline.
template <typename scalar_t>
const Kernels<scalar_t>* kernels_for() {
  const auto of = [](const KernelTable& table) {
    if constexpr (std::is_same_v<scalar_t, float>) return table.f32;
    if constexpr (std::is_same_v<scalar_t, double>) return table.f64;
    if constexpr (std::is_same_v<scalar_t, half_t>) return table.f16;
    if constexpr (std::is_same_v<scalar_t, bfloat16_t>) return table.bf16;
  };
  const KernelTable& table = kernels();
  return of(table) || !table.rest ? of(table) : of(*table.rest);
}

// Those of tangents, for float and double.
template <typename scalar_t>
const TangentKernels<scalar_t>* tangent_kernels_for() {
  const KernelTable& table = kernels().tangents_f32 ? kernels() : *kernels().rest;
  if constexpr (std::is_same_v<scalar_t, float>) return table.tangents_f32;
  if constexpr (std::is_same_v<scalar_t, double>) return table.tangents_f64;
}

// Those of users' cells, likewise.
template <typename scalar_t>
const UserKernels<scalar_t>* user_kernels_for() {
  const KernelTable& table = kernels().users_f32 ? kernels() : *kernels().rest;
  if constexpr (std::is_same_v<scalar_t, float>) return table.users_f32;
  if constexpr (std::is_same_v<scalar_t, double>) return table.users_f64;
}

}  // namespace fastbptt
