// A step of a user's cell as one kernel: a thread has a unit of a row, or some of them. A cell that
// normalizes has a block for each row, whose threads add up between the cell's phases; what one phase
// hands to the next is in memory that a thread alone reads and writes.
//
// Axes as in interface.h. Rows are [T, B], or a packed batch's [N]; b is a sequence.
#pragma once

#include "user_cell/device.cuh"
#include "user_cell/step.h"

namespace fastbptt {
namespace {

// Of both passes; fastbptt/_device_layer.py has the same list. What is not wanted or not there is null.
template <typename Cell, typename scalar_t>
struct UserArguments {
  static constexpr int S = Cell::kStates, E = Cell::kExtras > 0 ? Cell::kExtras : 1;

  long long H, blocks_of_row, direction, ld_kept;
  double clip_grad;  // 0: none
  const scalar_t *b_ih, *b_hh;
  const bool* resets;   // [N]
  const scalar_t* pre;  // [N, G*H] without b_ih
  scalar_t* kept;       // [N, ld_kept], as in UserTensors; may be pre
  const scalar_t*
      product;         // [B, G*H] what W_hh gives; in the backward pass [B, H] what it hands back
  scalar_t* entering;  // [B, H] what W_hh sees next; in the backward pass [N, H] what it saw
  scalar_t* slots;     // [B, slots, H] what one phase hands to the next
  const scalar_t* kappa;        // [N]
  scalar_t* d;                  // [N, C*H] the gradients of the gates
  scalar_t* carry;              // [B, S, H] what a step hands to the one before, W_hh aside
  const scalar_t* initial[S];   // [B, H]
  scalar_t* states[S];          // [N, H]
  const scalar_t* reset_to[S];  // [N, H], or [B, H]
  scalar_t* last[S];            // [B, H]
  const scalar_t* d_states[S];  // [N, H]
  const scalar_t* d_last[S];    // [B, H]
  scalar_t* d_initial[S];       // [B, H]
  scalar_t* d_reset_to[S];      // [N, H]
  const scalar_t* extras[E];    // [N, H], [N], [H] or one number
  scalar_t* d_extras[E];        // [N, H]
  int reset_by_row[S];          // whether it is [N, H]
  int extra_by_row[E], extra_by_unit[E];
};

// What all threads of a row know of a step.
template <typename Cell, typename scalar_t>
struct UserRow {
  const UserArguments<Cell, scalar_t>& p;
  const long long b, row;
  const long long first_unit, unit_stride;  // of the thread
  // Whether the sequence was in the step before, and is in the one after.
  const bool has_before, has_after;
  // Resets and gates stand between steps, in the row of the later one in time.
  const long long boundary_after;
  const bool is_reset_after;
  const scalar_t* entering[Cell::kStates];  // [H], or null: zeros

  __device__ __forceinline__ UserRow(const UserArguments<Cell, scalar_t>& arguments,
                                     const UserStep& step)
      : p(arguments),
        b(blockIdx.x / p.blocks_of_row),
        row(step.row + b),
        first_unit(blockIdx.x % p.blocks_of_row * blockDim.x + threadIdx.x),
        unit_stride(p.blocks_of_row * blockDim.x),
        has_before(b < step.from_before),
        has_after(b < step.to_after),
        boundary_after(p.direction > 0 ? step.after + b : row),
        is_reset_after(has_after && p.resets && p.resets[boundary_after]) {
    const long long boundary = p.direction > 0 ? row : step.before + b;
    const bool is_crossed = p.direction > 0 || has_before;
    const bool is_reset = is_crossed && p.resets && p.resets[boundary];
    unrolled<Cell::kStates>([&](auto k) {
      entering[k] = is_reset       ? reset_row(k, boundary)
                    : has_before   ? p.states[k] + (step.before + b) * p.H
                    : p.initial[k] ? p.initial[k] + b * p.H
                                   : nullptr;
    });
  }

  __device__ __forceinline__ const scalar_t* reset_row(int k, long long boundary) const {
    if (!p.reset_to[k]) return nullptr;
    return p.reset_to[k] + (p.reset_by_row[k] ? boundary : b) * p.H;
  }

  __device__ __forceinline__ scalar_t* slot(int count, int k, long long unit) const {
    return p.slots + (b * count + k) * p.H + unit;
  }

  __device__ __forceinline__ void load_gates(long long unit, scalar_t* pre) const {
    unrolled<Cell::kGates>([&](auto g) {
      pre[g] = p.pre[(row * Cell::kGates + g) * p.H + unit];
      if (p.b_ih) pre[g] += p.b_ih[g * p.H + unit];
    });
  }

  __device__ __forceinline__ void load(long long unit, scalar_t* state, scalar_t* extra) const {
    unrolled<Cell::kStates>([&](auto k) { state[k] = entering[k] ? entering[k][unit] : 0; });
    unrolled<Cell::kExtras>([&](auto k) {
      const long long own_row = p.extra_by_row[k] ? row : 0;
      extra[k] = p.extras[k][p.extra_by_unit[k] ? own_row * p.H + unit : own_row];
    });
  }
};

// Of each normalization, as in UserPhase.
template <typename Cell, typename scalar_t>
struct UserStats {
  scalar_t mean[Cell::kNorms + 1], scale[Cell::kNorms + 1];
  scalar_t d_mean[Cell::kNorms + 1], d_scale[Cell::kNorms + 1];
};

// What is normalized when `phase` begins: its mean and scale, given the sums over the thread's units.
template <int phase, typename Cell, typename scalar_t>
__device__ __forceinline__ void measure(const UserRow<Cell, scalar_t>& row, scalar_t* sums,
                                        UserStats<Cell, scalar_t>* stats) {
  const UserArguments<Cell, scalar_t>& p = row.p;
  scalar_t squares[Cell::kNorms] = {};
  sum_over_block<Cell::kNorms>(sums);
  unrolled<Cell::kNorms>([&](auto n) {
    constexpr int first = Cell::kNormSlots[n], count = Cell::kNormCounts[n];
    if constexpr (Cell::kNormPhases[n] == phase) {
      const scalar_t mean = stats->mean[n] = sums[n] / scalar_t(count * p.H);
      for (long long unit = row.first_unit; unit < p.H; unit += row.unit_stride) {
        for (int k = first; k < first + count; ++k) {
          const scalar_t apart = *row.slot(Cell::kSlots, k, unit) - mean;
          squares[n] += apart * apart;
        }
      }
    }
  });
  sum_over_block<Cell::kNorms>(squares);
  unrolled<Cell::kNorms>([&](auto n) {
    constexpr double eps = Cell::kNormEps[n];
    constexpr int count = Cell::kNormCounts[n];
    if constexpr (Cell::kNormPhases[n] == phase) {
      const scalar_t variance = squares[n] / scalar_t(count * p.H) + scalar_t(eps);
      stats->scale[n] = 1 / math::sqrt(variance);
      if (p.kept && threadIdx.x == 0) {
        scalar_t* const kept = p.kept + row.row * p.ld_kept + Cell::kKept * p.H + 2 * n;
        kept[0] = stats->mean[n];
        kept[1] = stats->scale[n];
      }
    }
  });
}

template <int phase, typename Cell, typename scalar_t>
__device__ __forceinline__ void forward_phase(const UserRow<Cell, scalar_t>& row,
                                              UserStats<Cell, scalar_t>* stats) {
  constexpr int G = Cell::kGates, S = Cell::kStates;
  constexpr int first_slot = phase == 0 ? 0 : Cell::kSlotEnds[phase - 1];
  constexpr int first_kept = phase == 0 ? 0 : Cell::kKeptEnds[phase - 1];
  const UserArguments<Cell, scalar_t>& p = row.p;
  scalar_t totals[Cell::kNorms + 1] = {};
  for (long long unit = row.first_unit; unit < p.H; unit += row.unit_stride) {
    scalar_t pre[G], rec[G] = {}, before[S], extra[Cell::kExtras + 1], after[S];
    scalar_t kept[Cell::kKept + 1], slots[Cell::kSlots + 1], sums[Cell::kNorms + 1];
    row.load_gates(unit, pre);
    if constexpr (phase == 0) {
      unrolled<G>([&](auto g) {
        if (p.product) rec[g] = p.product[(row.b * G + g) * p.H + unit];
        if (p.b_hh) rec[g] += p.b_hh[g * p.H + unit];
      });
    }
    row.load(unit, before, extra);
    unrolled<first_slot>([&](auto k) { slots[k] = *row.slot(Cell::kSlots, k, unit); });
    Cell::forward(Phase<phase>(), pre, rec, before, extra, stats->mean, stats->scale, slots, sums,
                  after, kept);
    unrolled<Cell::kSlotEnds[phase], first_slot>(
        [&](auto k) { *row.slot(Cell::kSlots, k, unit) = slots[k]; });
    unrolled<Cell::kNorms>([&](auto n) {
      if constexpr (Cell::kNormPhases[n] == phase + 1) totals[n] += sums[n];
    });
    if (p.kept) {
      unrolled<Cell::kKeptEnds[phase], first_kept>(
          [&](auto k) { p.kept[row.row * p.ld_kept + k * p.H + unit] = kept[k]; });
    }
    if constexpr (phase + 1 == Cell::kPhases) {
      unrolled<S>([&](auto k) {
        p.states[k][row.row * p.H + unit] = after[k];
        if (!row.has_after) p.last[k][row.b * p.H + unit] = after[k];
      });
      if (p.entering) {
        constexpr int k = Cell::kRecurrent;
        scalar_t next = after[k];
        if (row.is_reset_after) {
          const scalar_t* const to = row.reset_row(k, row.boundary_after);
          next = to ? to[unit] : 0;
        }
        p.entering[row.b * p.H + unit] = next;
      }
    }
  }
  if constexpr (phase + 1 < Cell::kPhases) measure<phase + 1>(row, totals, stats);
}

// The gradient of state k from the steps after this one, as it comes to the state that leaves it: bounded,
// and before its gate.
template <typename Cell, typename scalar_t>
__device__ __forceinline__ scalar_t handed_back(const UserArguments<Cell, scalar_t>& p, long long b,
                                                int k, long long unit) {
  scalar_t d = p.carry[(b * Cell::kStates + k) * p.H + unit];
  if (k == Cell::kRecurrent && p.product) d += p.product[b * p.H + unit];
  return p.clip_grad > 0 ? clipped(d, scalar_t(p.clip_grad)) : d;
}

// Infinity and NaN are stopped too.
template <typename scalar_t>
__device__ __forceinline__ scalar_t through(scalar_t gate, scalar_t d) {
  return gate == 0 ? 0 : d * gate;
}

template <int phase, typename Cell, typename scalar_t>
__device__ __forceinline__ void backward_phase(const UserRow<Cell, scalar_t>& row,
                                               UserStats<Cell, scalar_t>* stats) {
  constexpr int S = Cell::kStates, E = Cell::kExtras;
  constexpr bool begins = phase == Cell::kPhases - 1;
  constexpr int first_slot = begins ? 0 : Cell::kGradientSlotEnds[phase + 1];
  const UserArguments<Cell, scalar_t>& p = row.p;
  scalar_t totals[2 * Cell::kNorms + 1] = {};
  for (long long unit = row.first_unit; unit < p.H; unit += row.unit_stride) {
    const long long at = row.row * p.H + unit;
    scalar_t pre[Cell::kGates] = {}, before[S], after[S], extra[E + 1], kept[Cell::kKept + 1];
    scalar_t d_after[S], d[Cell::kColumns], d_before[S], d_extra[E + 1];
    scalar_t slots[Cell::kGradientSlots + 1], sums[2 * Cell::kNorms + 1];
    unrolled<Cell::kKept>([&](auto k) { kept[k] = p.kept[row.row * p.ld_kept + k * p.H + unit]; });
    if constexpr (Cell::kReadsPre) row.load_gates(unit, pre);
    row.load(unit, before, extra);
    unrolled<S>([&](auto k) {
      after[k] = p.states[k][at];
      if constexpr (begins) {
        d_after[k] = 0;
        if (row.has_after) {
          const scalar_t from_after = handed_back(p, row.b, k, unit);
          if (row.is_reset_after) {
            if (p.d_reset_to[k]) p.d_reset_to[k][row.boundary_after * p.H + unit] = from_after;
          } else {
            const scalar_t gate = p.kappa ? p.kappa[row.boundary_after] : scalar_t(1);
            d_after[k] = through(gate, from_after);
          }
        } else if (p.d_last[k]) {
          d_after[k] = p.d_last[k][row.b * p.H + unit];
        }
        if (p.d_states[k]) d_after[k] += p.d_states[k][at];
      }
    });
    if (begins && p.entering) p.entering[at] = before[Cell::kRecurrent];
    unrolled<first_slot>([&](auto k) { slots[k] = *row.slot(Cell::kGradientSlots, k, unit); });
    Cell::backward(Phase<phase>(), pre, before, after, extra, kept, stats->mean, stats->scale,
                   stats->d_mean, stats->d_scale, d_after, slots, sums, d, d_before, d_extra);
    unrolled<Cell::kGradientSlotEnds[phase], first_slot>(
        [&](auto k) { *row.slot(Cell::kGradientSlots, k, unit) = slots[k]; });
    unrolled<2 * Cell::kNorms>([&](auto n) {
      if constexpr (Cell::kNormPhases[n / 2] == phase) totals[n] += sums[n];
    });
    unrolled<Cell::kColumns>([&](auto c) {
      if constexpr (Cell::kPhaseOf_d[c] == phase) {
        p.d[(row.row * Cell::kColumns + c) * p.H + unit] = d[c];
      }
    });
    unrolled<S>([&](auto k) {
      if constexpr (Cell::kPhaseOf_d_before[k] == phase) {
        p.carry[(row.b * S + k) * p.H + unit] = d_before[k];
      }
    });
    unrolled<E>([&](auto k) {
      if constexpr (Cell::kPhaseOf_d_extra[k] == phase) {
        if (p.d_extras[k]) p.d_extras[k][at] = d_extra[k];
      }
    });
  }
  if constexpr (phase > 0) {
    sum_over_block<2 * Cell::kNorms>(totals);
    unrolled<Cell::kNorms>([&](auto n) {
      constexpr int count = Cell::kNormCounts[n];
      if constexpr (Cell::kNormPhases[n] == phase) {
        stats->d_mean[n] = totals[2 * n] / scalar_t(count * p.H);
        stats->d_scale[n] = totals[2 * n + 1] / scalar_t(count * p.H);
      }
    });
  }
}

template <typename Cell, typename scalar_t>
__device__ __forceinline__ void user_forward(const UserArguments<Cell, scalar_t>& p,
                                             const UserStep& step) {
  const UserRow<Cell, scalar_t> row(p, step);
  UserStats<Cell, scalar_t> stats{};
  unrolled<Cell::kPhases>([&](auto phase) { forward_phase<phase>(row, &stats); });
}

template <typename Cell, typename scalar_t>
__device__ __forceinline__ void user_backward(const UserArguments<Cell, scalar_t>& p,
                                              const UserStep& step) {
  const UserRow<Cell, scalar_t> row(p, step);
  UserStats<Cell, scalar_t> stats{};
  unrolled<Cell::kNorms>([&](auto n) {
    const scalar_t* const kept = p.kept + row.row * p.ld_kept + Cell::kKept * p.H + 2 * n;
    stats.mean[n] = kept[0];
    stats.scale[n] = kept[1];
  });
  unrolled<Cell::kPhases>([&](auto i) { backward_phase<Cell::kPhases - 1 - i>(row, &stats); });
}

// After the backward pass, for all sequences: the gradients of the states that their first step began
// with, given ones or those of a reset.
template <typename Cell, typename scalar_t>
__device__ __forceinline__ void user_finish(const UserArguments<Cell, scalar_t>& p,
                                            const UserStep& step) {
  const UserRow<Cell, scalar_t> row(p, step);
  const bool is_crossed = p.direction > 0;  // the boundary of step 0, whose row is b
  const bool is_reset = is_crossed && p.resets && p.resets[row.b];
  const scalar_t gate = is_crossed && p.kappa ? p.kappa[row.b] : scalar_t(1);
  for (long long unit = row.first_unit; unit < p.H; unit += row.unit_stride) {
    const long long at = row.b * p.H + unit;
    unrolled<Cell::kStates>([&](auto k) {
      scalar_t* const to = is_reset ? p.d_reset_to[k] : p.d_initial[k];
      const scalar_t d = handed_back(p, row.b, k, unit);
      if (to) to[at] = is_reset ? d : through(gate, d);
    });
  }
}

template <typename Cell>
constexpr int kMostThreads = Cell::kNorms > 0 ? 512 : 256;

}  // namespace
}  // namespace fastbptt

#define FASTBPTT_USER_KERNEL(Cell, scalar_t, pass)                                               \
  extern "C" __global__ void __launch_bounds__(fastbptt::kMostThreads<Cell>)                     \
      fastbptt_cell_##pass(fastbptt::UserArguments<Cell, scalar_t> p, fastbptt::UserStep step) { \
    fastbptt::user_##pass(p, step);                                                              \
  }
#define FASTBPTT_USER_KERNELS(Cell, scalar_t)    \
  FASTBPTT_USER_KERNEL(Cell, scalar_t, forward)  \
  FASTBPTT_USER_KERNEL(Cell, scalar_t, backward) \
  FASTBPTT_USER_KERNEL(Cell, scalar_t, finish)
