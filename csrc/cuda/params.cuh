// The arguments of one direction of one layer's recurrence, as the GPU's kernels see them. Axes and
// names are those of params.h. All memory is the device's.
//
// The recurrence is what only goes step by step: forward, from pre = x W_ih^T to the states; backward,
// from the losses' gradients to d, those of the pre-activations. The products before and after it
// are the same for every kernel that runs it.
//
// Nothing here waits for the device, so resets and gates, whose values only it knows, are applied as
// masks; the windows of a truncated backward pass are arithmetic. Its lanes, a window of a sequence
// each, run in lockstep from their last step on. Lane w*B + b is the w-th window of sequence b.
#pragma once

#include "cuda/numbers.h"
#include "host_device.h"
#include "params.h"

namespace fastbptt {

// A batch, and the direction in which its sequences run.
struct Sequences {
  Layout layout;           // offsets are the device's; batch_sizes is null
  const int64_t* lengths;  // [B], never increasing, or null: all are T
  int direction;           // +1, or -1 for the reverse direction
  const bool* resets;      // [N] the state is zeros between this step and the one before, or null

  FASTBPTT_HD int64_t length(int64_t b) const { return lengths ? lengths[b] : layout.T; }

  // Whether t is the step that the recurrence of sequence b begins, or ends, with.
  FASTBPTT_HD bool begins(int64_t t, int64_t b) const {
    return t == (direction > 0 ? 0 : length(b) - 1);
  }
  FASTBPTT_HD bool ends(int64_t t, int64_t b) const {
    return t == (direction > 0 ? length(b) - 1 : 0);
  }

  // The row of the boundary that the recurrence meets after step t: that of the later of its two
  // steps in time. t may be one before the first step, but not the last.
  FASTBPTT_HD int64_t boundary_after(int64_t t, int64_t b) const {
    return layout.row(direction > 0 ? t + 1 : t, b);
  }
  FASTBPTT_HD bool is_reset_after(int64_t t, int64_t b) const {
    return resets && resets[boundary_after(t, b)];
  }

  // The row of the step before t, as in state_row.
  FASTBPTT_HD int64_t row_before(int64_t t, int64_t b) const {
    // No boundary lies beyond the last step in time, where the reverse direction begins.
    const bool is_beyond = direction < 0 && begins(t, b);
    if (!is_beyond && is_reset_after(t - direction, b)) return kNoRow;
    return begins(t, b) ? -1 - b : layout.row(t - direction, b);
  }
};

// Where a lane is at a lockstep. A lane that has no such step (it is shorter than others, or its
// sequence ends before its window) may stand where the sequence's initial state enters.
struct LaneStep {
  int64_t b, t;
  bool exists;
  bool is_initial;  // there is no step: the initial state enters the one after it
  bool has_loss;    // the step's loss counts
};

constexpr int64_t kMostLanes = int64_t(1) << 31;

// Windows of steps; see Cuts. One that is whole stands for none: k1 = k2 = T.
struct Windows {
  int64_t k1, k2;
  int64_t first, count;
  bool last_only;

  // k: 0 at the last step that the recurrence takes in the lane.
  FASTBPTT_HD LaneStep at(const Sequences& sequences, int64_t k, int64_t lane) const {
    const int64_t B = sequences.layout.B;
    // There are fewer than kMostLanes: one of 64 bits takes five times as long.
    const int64_t w = count == 1 ? 0 : uint32_t(lane) / uint32_t(B);
    return of_window(sequences, k, w, lane - w * B);
  }
  FASTBPTT_HD LaneStep of_window(const Sequences& sequences, int64_t k, int64_t w,
                                 int64_t b) const {
    LaneStep step{};
    step.b = b;
    const int64_t length = sequences.length(step.b), first_loss = (first + w) * k1;
    if (first_loss >= length) return step;
    const int64_t begin = first_loss > k2 - k1 ? first_loss - (k2 - k1) : 0;
    const int64_t end = first_loss + k1 < length ? first_loss + k1 : length;
    step.t = sequences.direction > 0 ? end - 1 - k : begin + k;
    step.exists = begin <= step.t && step.t < end;
    step.is_initial =
        sequences.direction > 0 ? step.t == -1 && begin == 0 : step.t == length && end == length;
    step.has_loss = step.exists && step.t >= (last_only ? end - 1 : first_loss);
    return step;
  }
};

// What both passes need. Pointers that a cell has no use for are null.
template <typename scalar_t>
struct Recurrence {
  Sequences sequences;
  int64_t H, R;
  const scalar_t* hx;    // [B, R] or null: zeros
  const scalar_t* cx;    // [B, H] or null: zeros
  const scalar_t* w_hh;  // [G*H, R]
  const scalar_t* w_hr;  // [R, H] or null: no projection
  const scalar_t* b_ih;  // [G*H] or null
  const scalar_t* b_hh;  // [G*H] or null
  int64_t ld_out;        // row stride of output and its gradient: R times the layer's directions
};

template <typename scalar_t>
struct FwdRecurrence : Recurrence<scalar_t> {
  const scalar_t*
      pre;           // [N, G*H] x W_ih^T without the biases; may stand where output, or gates, go
  int64_t ld_pre;    // its row stride
  scalar_t* output;  // [N, R], row stride ld_out
  scalar_t* gates;   // [N, S*H] or null: not kept
  scalar_t* c;       // [N, H] LSTM's cell states
  scalar_t* h_n;     // [B, R]
  scalar_t* c_n;     // [B, H]

  FASTBPTT_HD int64_t num_lanes() const { return this->sequences.layout.B; }
  FASTBPTT_HD int64_t num_steps() const { return this->sequences.layout.T; }
};

// Rows of a result, one for each step that the windows lie in. Where windows overlap they are sums
// over the lanes, in lockstep: then no two lanes of a sequence are at one step, and the order of
// each sum is fixed.
template <typename scalar_t>
struct StepRows {
  scalar_t* rows;               // [span, ...] or null
  Accumulator<scalar_t>* sums;  // [span, ...] zeros on entry, instead of rows
};

template <typename scalar_t>
struct BwdRecurrence : Recurrence<scalar_t> {
  using acc_t = Accumulator<scalar_t>;

  Windows windows;
  int64_t steps;             // of the longest lane
  const scalar_t* output;    // [N, R], row stride ld_out
  const scalar_t* gates;     // [N, S*H], or [span, S*H] if gates_of_span
  const scalar_t* c;         // [N, H]
  const scalar_t* d_output;  // [N, R], row stride ld_out, or null: zeros
  const scalar_t* d_lanes;   // [steps, lanes, R] instead of d_output, or null
  const scalar_t* d_h_n;     // [B, R] or null: zeros
  const scalar_t* d_c_n;     // [B, H] or null: zeros
  const scalar_t* kappa;     // [N] gate between a step and the one before it in time, or null: 1
  bool gates_of_span;        // they were computed again, for the span alone

  // The span: the steps that the windows lie in, from `begin` on. Its rows are in the order of the
  // batch's.
  int64_t begin;
  int64_t span_first_row;     // packed: the batch's row of its first
  int64_t span_batch_stride;  // uniform: rows from b to b+1

  StepRows<scalar_t> d;            // [span, columns*H] as the cell orders them
  StepRows<scalar_t> d_projected;  // [span, R] gradients of the projected state
  scalar_t* unprojected;           // [span, H] the state before its projection, or null
  scalar_t* d_by_lane;  // [steps, lanes, columns*H] d, zeros for what is not there, or null
  acc_t* d_hx;          // [B, R] zeros on entry, or null: not wanted
  acc_t* d_cx;          // [B, H] zeros on entry, or null: not wanted
  bool states_by_lane;  // both have a row for each lane: lanes of a sequence do not run in lockstep

  FASTBPTT_HD int64_t num_lanes() const { return windows.count * this->sequences.layout.B; }
  FASTBPTT_HD int64_t num_steps() const { return steps; }
  FASTBPTT_HD int64_t span_row(int64_t t, int64_t b) const {
    const Layout& layout = this->sequences.layout;
    return layout.offsets ? layout.offsets[t] + b - span_first_row
                          : (t - begin) * layout.time_stride + b * span_batch_stride;
  }
};

// What the teams of a grid kernel have in global memory; see exchange.cuh.
struct GridMemory {
  uint32_t* flags;     // [launches, teams, kFlagStride] zeros before the launch
  void* x;             // [teams, 2, lanes, gates, team's units]
  int64_t first_lane;  // of the launch, with whose flags the pointer begins
};

}  // namespace fastbptt
