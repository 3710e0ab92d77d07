// The persistent kernels: all steps in one launch, with W_hh on the chip; see on_chip.cuh and
// exchange.cuh. Called resident where one block has all of W_hh, cluster where the blocks of a cluster
// share it, and grid where all blocks of the launch do.
#pragma once

#include "cuda/exchange.cuh"
#include "cuda/step.cuh"
#include "cuda/units.cuh"

namespace fastbptt {
namespace {

// Lanes are sequences. They begin together, each with its own first step.
template <typename Cell, typename Product, Reach kReach>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1)
    persistent_forward_kernel(FwdRecurrence<typename Product::scalar_t> p, Tiling tiling,
                              GridMemory memory) {
  using Step = FwdStep<Cell, typename Product::scalar_t>;
  constexpr int G = Cell::kGates;
  Exchange<Product, Step, FwdPlace, /*kTransposed=*/false, kReach> chip(tiling, memory);
  const Sequences& sequences = p.sequences;
  const int64_t B = sequences.layout.B;
  const int first = int(memory.first_lane) + chip.team * tiling.lanes;
  const int steps = int(sequences.length(first));  // no other lane's are more

  const auto initial = [&](int lane, int unit) {
    const int b = first + lane;
    if (b >= B || unit >= p.H || !has_initial_state(sequences, b)) return 0.0f;
    return load_or_zero(p.hx, b * p.H + unit);
  };
  const auto place_of = [&](int64_t step, int lane) {
    const int b = first + lane;
    if (b >= B || step >= sequences.length(b)) return FwdPlace{};
    return fwd_place(sequences, sequences.direction > 0 ? step : sequences.length(b) - 1 - step, b);
  };
  if (chip.has_pair()) {
    float* const biases = chip.sums() + chip.lane * tiling.shared.sum_stride;
    for (int gate = 0; gate < G; ++gate) {
      const bool exists = chip.own_unit() < p.H;
      biases[gate * tiling.units + chip.unit()] =
          exists ? Step::recurrent_bias(p, gate, chip.own_unit()) : 0.0f;
    }
  }
  chip.load_weights(p.w_hh, p.H, G);
  const bool has_unit = chip.has_pair() && chip.own_unit() < p.H;
  const int b = first + chip.lane;
  // Of the thread's pair; the others have none.
  const int own_steps = has_unit && b < B ? int(sequences.length(b)) : 0;
  const float input_bias = has_unit ? Step::input_bias(p, chip.own_unit()) : 0.0f;
  float carry = 0;  // c of LSTM, h of GRU
  if (Cell::kHasCarry && own_steps > 0 && has_initial_state(sequences, b)) {
    carry = load_or_zero(Cell::kHasCellState ? p.cx : p.hx, b * p.H + chip.own_unit());
  }
  const int stretch = stretch_of<Step>(p);
  chip.share_carrying(p.H, stretch);
  const bool is_behind = chip.is_behind(stretch);
  chip.start(initial, place_of);

  const auto fetch = [&](int step) {
    if (chip.carried >= 0 && step < steps) {
      const FwdPlace& place = chip.place(step, chip.carried_lane());
      if (place.exists) {
        chip.fetch(step,
                   [&](auto&& copy) { Step::for_each_input(p, place, chip.carried_unit(), copy); });
      }
    }
    commit_async();
  };
  const auto store = [&](int step) {
    if (chip.carried < 0 || step < 0) return;
    const FwdPlace& place = chip.place(step, chip.carried_lane());
    if (!place.exists) return;
    chip.store(step, [&](auto&& copy) {
      Step::for_each_result(p, place, first + chip.carried_lane(), chip.carried_unit(), copy);
    });
  };
  for (int step = 0; step < kAhead; ++step) fetch(step);

  for (int step = 0; step < steps; ++step) {
    const bool is_last = step + 1 == steps;
    chip.begin_step();
    chip.receive(step);
    chip.multiply(chip.buffer(step));
    wait_async<kAhead - 1>();
    sync_block();
    if (!is_last) chip.announce(step + 1);
    if (chip.has_pairs()) {
      typename Step::Values values{};
      float sent = 0;
      const bool exists = step < own_steps;
      if (exists) {
        float rec[G];
        chip.sums_of(tiling.units, rec);
        values = Step::compute(chip.inputs_of(step, threadIdx.x), input_bias, rec, carry);
        sent = values.h;
        if (Cell::kHasCarry) carry = Step::carried(values);
        if (sequences.resets && chip.place(step, chip.lane).is_reset) sent = carry = 0;
      }
      if (!is_last) chip.push(step + 1, sent);
      if (exists) chip.keep_results(step, threadIdx.x, Step::results_of(values));
    }
    if (kReach == Reach::kGrid) chip.publish(is_last);
    if (is_behind) {
      store(step - 1);
      fetch(step + kAhead);
      if (step % kPlaceSteps == 1) chip.compute_places(step - 1 + kPlaceSteps, place_of);
    }
  }
  sync_block();
  store(steps - 1);
}

// Lanes are windows of sequences, in lockstep from their last steps on.
template <typename Cell, typename Product, Reach kReach>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1)
    persistent_backward_kernel(BwdRecurrence<typename Product::scalar_t> p, Tiling tiling,
                               GridMemory memory) {
  using Step = BwdStep<Cell, typename Product::scalar_t>;
  using Place = typename Step::Place;
  constexpr int G = Cell::kGates;
  Exchange<Product, Step, Place, /*kTransposed=*/true, kReach> chip(tiling, memory);
  const int first = int(memory.first_lane) + chip.team * tiling.lanes;
  const int steps =
      int(p.steps) + (p.d_hx || p.d_cx);  // the initial states come after the last step

  const auto zero = [](int, int) { return 0.0f; };
  const auto place_of = [&](int64_t k, int lane) {
    return first + lane < p.num_lanes() ? bwd_place(p, k, first + lane) : Place{};
  };
  chip.load_weights(p.w_hh, p.H, G);
  const bool has_unit = chip.has_pair() && chip.own_unit() < p.H;
  float carry = 0;
  const int stretch = stretch_of<Step>(p);
  chip.share_carrying(p.H, stretch);
  const bool is_behind = chip.is_behind(stretch);
  chip.start(zero, place_of);

  const auto fetch = [&](int k) {
    if (chip.carried >= 0 && k < steps) {
      const Place& place = chip.place(k, chip.carried_lane());
      if (place.exists) {
        chip.fetch(k, [&](auto&& copy) {
          Step::for_each_input(p, place, k, first + chip.carried_lane(), chip.carried_unit(), copy);
        });
      }
    }
    commit_async();
  };
  const auto store = [&](int k) {
    if (chip.carried < 0 || k < 0) return;
    chip.store(k, [&](auto&& copy) {
      Step::for_each_result(p, chip.place(k, chip.carried_lane()), k, first + chip.carried_lane(),
                            chip.carried_unit(), copy);
    });
  };
  for (int k = 0; k < kAhead; ++k) fetch(k);
  wait_async<kAhead - 1>();
  sync_block();

  for (int k = 0; k < steps; ++k) {
    const bool is_last = k + 1 == steps;
    chip.begin_step();
    // The cell, from the sums that have been sent for the step; its d is x of the next one.
    if (chip.has_pairs()) {
      chip.collect(k);
      if (chip.has_pair()) {
        float d[Step::kColumns] = {};
        if (has_unit) {
          const Place& place = chip.place(k, chip.lane);
          typename Step::Inputs inputs{};
          if (place.exists) inputs = chip.inputs_of(k, threadIdx.x);
          Step::run(p, place, inputs, first + chip.lane, chip.own_unit(), chip.sum(k), carry, d);
        }
        if (!is_last) {
          FASTBPTT_UNROLL
          for (int g = 0; g < G; ++g) chip.put(k + 1, g, d[Cell::kFirstRecurrent + g]);
        }
        chip.keep_results(k, threadIdx.x, Step::results_of(d));
      }
    }
    if (is_behind) {
      store(k - 1);
      fetch(k + kAhead);
      if (k % kPlaceSteps == 1) chip.compute_places(k - 1 + kPlaceSteps, place_of);
    }
    chip.publish(is_last);
    if (is_last) break;
    chip.receive(k + 1);
    chip.multiply(0);
    wait_async<kAhead - 1>();
    sync_block();
    chip.send_sums(k + 1);
  }
  store(steps - 1);
}

// Adds what lanes that overlap have computed by themselves up to p.d.sums, [span, columns], one lane
// after another. steps: the span's.
template <typename scalar_t>
__global__ void __launch_bounds__(kUnitThreads)
    sum_lanes_kernel(BwdRecurrence<scalar_t> p, const scalar_t* d_by_lane, int64_t steps,
                     int64_t columns) {
  const int64_t B = p.sequences.layout.B, lanes = p.num_lanes();
  const Windows& windows = p.windows;
  for_each_unit(steps * B, columns, [&](int64_t i, int64_t column) {
    const int64_t t = p.begin + i / B, b = i % B;
    if (t >= p.sequences.length(b)) return;
    // The windows that have step t lie between the one whose losses it is among, and the one whose
    // loss reaches it last.
    int64_t w = t / windows.k1 - windows.first;
    int64_t last = (t + windows.k2 - windows.k1) / windows.k1 - windows.first;
    if (w < 0) w = 0;
    if (last > windows.count - 1) last = windows.count - 1;
    Accumulator<scalar_t> sum = 0;
    for (; w <= last; ++w) {
      const int64_t end = windows.of_window(p.sequences, 0, w, b).t;  // of the lane's lockstep 0
      const int64_t k = p.sequences.direction > 0 ? end - t : t - end;
      if (!windows.of_window(p.sequences, k, w, b).exists) continue;
      sum += to_acc(d_by_lane[(k * lanes + w * B + b) * columns + column]);
    }
    p.d.sums[p.span_row(t, b) * columns + column] += sum;
  });
}

}  // namespace
}  // namespace fastbptt
