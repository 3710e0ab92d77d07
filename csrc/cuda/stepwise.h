// Launchers of the stepwise kernels; see stepwise.cuh.
#pragma once

#include "cuda/launch.h"
#include "cuda/params.cuh"
#include "few_rows.h"

namespace fastbptt {

// The number of a step. A launch that was captured in a graph is replayed for steps further on, and by
// how many is counted on the device.
struct StepNumber {
  int64_t number;
  const int64_t* further = nullptr;  // the device's count, or null

  FASTBPTT_HD int64_t get() const { return further ? number + *further : number; }
};

// Starts such a count where `by` is zero, else adds to it.
void run_count_steps(int64_t* further, int64_t by, Stream stream);

// Steps that a graph has, and how many there have to be for it to be worth while.
constexpr int64_t kGraphSteps = 16, kFewestGraphSteps = 4 * kGraphSteps;

// A product of few_rows.h.
void run_few_rows(const FewRowsProduct& product, Stream stream);

// What stays between the launches of a forward pass. Pointers that a cell has no use for are null.
template <typename scalar_t>
struct FwdScratch {
  using acc_t = Accumulator<scalar_t>;

  scalar_t* h;             // [B, R] the state that enters the next step: the product's operand
  acc_t* carried_h;        // [B, R] the same, for a cell that takes it as it is
  acc_t* c;                // [B, H]
  const acc_t* rec;        // [B, G*H] h W_hh^T, or null where h is zeros
  scalar_t* unprojected;   // [B, H] the state before its projection
  const acc_t* projected;  // [B, R]
};

template <typename scalar_t>
struct BwdScratch {
  using acc_t = Accumulator<scalar_t>;

  const acc_t* from_after;       // [lanes, R] d W_hh of the lockstep before; undefined at the first
  const acc_t* from_projection;  // [lanes, H]
  acc_t* carry;                  // [lanes, H]
  scalar_t* d;  // [lanes, columns*H] the product's operand, or null where no lane has a step
  scalar_t* d_projected;  // [lanes, R]
};

template <typename scalar_t>
struct Stepwise {
  using acc_t = Accumulator<scalar_t>;
  using Fwd = FwdRecurrence<scalar_t>;
  using Bwd = BwdRecurrence<scalar_t>;

  static void run_initial_states(const Fwd& p, const FwdScratch<scalar_t>& s, Stream stream);
  static void run_forward_step(CellKind cell, const Fwd& p, const FwdScratch<scalar_t>& s,
                               StepNumber step, int64_t rows, Stream stream);
  static void run_project_step(const Fwd& p, const FwdScratch<scalar_t>& s, StepNumber step,
                               int64_t rows, Stream stream);
  static void run_project_back(const Bwd& p, const BwdScratch<scalar_t>& s, StepNumber step,
                               int64_t lanes, Stream stream);
  static void run_backward_step(CellKind cell, const Bwd& p, const BwdScratch<scalar_t>& s,
                                StepNumber step, int64_t lanes, Stream stream);
  // gates: [rows, S*H] with pre in its first G*H columns, without the biases; rec: [rows, G*H].
  static void run_recompute(CellKind cell, scalar_t* gates, const acc_t* rec, const scalar_t* b_ih,
                            const scalar_t* b_hh, int64_t rows, int64_t H, Stream stream);
  // states: [span, R]; steps: the span's.
  static void run_states_before(const Bwd& p, scalar_t* states, int64_t steps, Stream stream);
  // mask: [N, I]; d_input: [steps, lanes, I].
  static void run_mask_lanes(const Bwd& p, const scalar_t* mask, scalar_t* d_input, int64_t I,
                             Stream stream);
};

}  // namespace fastbptt
