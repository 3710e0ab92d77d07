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
template <typename Cell, typename Product, bool kGrid>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1)
    persistent_forward_kernel(FwdRecurrence<typename Product::scalar_t> p, Tiling tiling,
                              GridMemory memory) {
  using Step = FwdStep<Cell, typename Product::scalar_t>;
  constexpr int G = Cell::kGates;
  Exchange<Product, Step, FwdPlace, /*kTransposed=*/false, kGrid> chip(tiling, memory);
  const Sequences& sequences = p.sequences;
  const int64_t B = sequences.layout.B;
  const int64_t first = memory.first_lane + int64_t(chip.team) * tiling.tile();
  const int steps = int(sequences.length(first));  // no other of the tile is longer
  const bool in_pairs = Step::are_in_pairs(p);

  const auto initial = [&](int lane, int unit) {
    const int64_t b = first + lane;
    if (b >= B || unit >= p.H || !has_initial_state(sequences, b)) return 0.0f;
    return load_or_zero(p.hx, b * p.H + unit);
  };
  const auto place_of = [&](int64_t step, int lane) {
    const int64_t b = first + lane;
    if (b >= B || step >= sequences.length(b)) return FwdPlace{};
    return fwd_place(sequences, sequences.direction > 0 ? step : sequences.length(b) - 1 - step, b);
  };
  for (int row = threadIdx.x; row < G * tiling.units; row += blockDim.x) {
    const int gate = row / tiling.units, unit = chip.first_unit() + row - gate * tiling.units;
    chip.biases()[row] = unit < p.H ? Step::recurrent_bias(p, gate, unit) : 0.0f;
  }
  chip.load_weights(p.w_hh, p.H, G);
  const bool has_unit = chip.own_unit() < p.H;
  const float input_bias = has_unit ? Step::input_bias(p, chip.own_unit()) : 0.0f;
  for (int group = 0; group < tiling.groups && Cell::kHasCarry; ++group) {
    for (int pass = 0; pass < tiling.passes; ++pass) {  // c of LSTM, h of GRU
      if (!chip.has_pair(pass)) continue;
      const int lane = chip.lane_of(pass);
      const int64_t b = first + group * tiling.lanes + lane;
      const bool has_state = has_unit && b < B && has_initial_state(sequences, b);
      const auto* const from = has_state ? Cell::kHasCellState ? p.cx : p.hx : nullptr;
      chip.carried(group, lane) = load_or_zero(from, b * p.H + chip.own_unit());
    }
  }
  chip.start(initial, place_of);

  const auto fetch = [&](int turn) {
    const int step = chip.step_of(turn), group = chip.group_of(turn);
    if (step < steps && chip.own_unit() < p.H) {
#pragma unroll 1
      for (int pass = 0; pass < tiling.passes; ++pass) {
        if (!chip.has_pair(pass)) continue;
        const int lane = chip.lane_of(pass);
        const FwdPlace& place = chip.place(group, step, lane);
        if (!place.exists) continue;
        chip.fetch_pair(turn, lane, in_pairs, [&](auto&& copy) {
          Step::for_each_input(p, place, chip.own_unit(), copy);
        });
      }
    }
    commit_async();
  };
  for (int turn = 0; turn < kAhead; ++turn) fetch(turn);

  int turn = 0;
  for (int step = 0; step < steps; ++step) {
    const bool is_last = step + 1 == steps;
    for (int group = 0; group < tiling.groups; ++group, ++turn) {
      const auto product = chip.begin_turn(chip.buffer(group, step), group);
      chip.receive(group, step, initial);
      chip.multiply(product);
      wait_async<kAhead - 1>();
      sync_block();
      if (!is_last) chip.announce(group, step + 1);
#pragma unroll 1
      for (int pass = 0; pass < tiling.passes; ++pass) {
        const int lane = chip.lane_of(pass), unit = chip.own_unit();
        const bool has_pair = chip.has_pair(pass);
        FwdPlace place{};
        if (unit < p.H && has_pair) place = chip.place(group, step, lane);
        typename Step::Values values{};
        if (place.exists) {
          const auto inputs = chip.inputs(turn, lane);
          const float before = Cell::kHasCarry ? chip.carried(group, lane) : 0.0f;
          float rec[G];
          chip.sums_of(group, chip.unit(), tiling.units, lane, rec);
          FASTBPTT_UNROLL
          for (int g = 0; g < G; ++g) rec[g] += chip.biases()[g * tiling.units + chip.unit()];
          values = Step::compute(inputs, input_bias, rec, before);
        }
        if (!is_last) {
          chip.push(group, step + 1, lane, has_pair, place.is_reset ? 0 : values.h);
        }
        if (kGrid) chip.publish(group, step + 1, is_last);  // the only pass
        if (place.exists) {
          const float carried = Cell::kHasCellState ? values.c : values.h;
          if (Cell::kHasCarry) chip.carried(group, lane) = place.is_reset ? 0 : carried;
          const int64_t b = first + group * tiling.lanes + lane;
          Step::store(p, place, b, unit, values);
          store_output(p, place, b, unit, values.h);
        }
      }
      if (step % kPlaceSteps == 0) chip.compute_places(group, step + kPlaceSteps, place_of);
      fetch(turn + kAhead);
    }
  }
}

// Lanes are windows of sequences, in lockstep from their last steps on.
template <typename Cell, typename Product, bool kGrid>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1)
    persistent_backward_kernel(BwdRecurrence<typename Product::scalar_t> p, Tiling tiling,
                               GridMemory memory) {
  using scalar_t = typename Product::scalar_t;
  using Step = BwdStep<Cell, scalar_t>;
  using Place = typename Step::Place;
  constexpr int G = Cell::kGates, kColumns = Cell::kColumns;
  Exchange<Product, Step, Place, /*kTransposed=*/true, kGrid> chip(tiling, memory);
  const int first = int(memory.first_lane) + chip.team * tiling.tile();
  const int lanes = int(p.num_lanes());
  const int steps =
      int(p.steps) + (p.d_hx || p.d_cx);  // the initial states come after the last step
  const bool in_pairs = Step::are_in_pairs(p);

  const auto zero = [](int, int) { return 0.0f; };
  const auto place_of = [&](int64_t k, int lane) {
    return first + lane < lanes ? bwd_place(p, k, first + lane) : Place{};
  };
  chip.load_weights(p.w_hh, p.H, G);
  for (int group = 0; group < tiling.groups && Cell::kHasCarry; ++group) {
#pragma unroll 1
    for (int pass = 0; pass < tiling.passes; ++pass) {
      if (chip.has_pair(pass)) chip.carried(group, chip.lane_of(pass)) = 0;
    }
  }
  chip.start(zero, place_of);
  if (kGrid) {
    chip.fill(0, 0, zero);  // its padding stays zero
  }

  const auto fetch = [&](int turn) {
    const int k = chip.step_of(turn), group = chip.group_of(turn);
    if (k < steps && chip.own_unit() < p.H) {
#pragma unroll 1
      for (int pass = 0; pass < tiling.passes; ++pass) {
        if (!chip.has_pair(pass)) continue;
        const int lane = chip.lane_of(pass);
        const Place& place = chip.place(group, k, lane);
        if (!place.exists) continue;
        const int of_all = first + group * tiling.lanes + lane;
        chip.fetch_pair(turn, lane, in_pairs, [&](auto&& copy) {
          Step::for_each_input(p, place, k, of_all, chip.own_unit(), copy);
        });
      }
    }
    commit_async();
  };
  for (int turn = 0; turn < kAhead; ++turn) fetch(turn);
  wait_async<kAhead - 1>();
  sync_block();

  // The cell, from the sums that have been sent for the step; its d is x of the next one.
  const auto compute = [&](int k, int group) {
    const bool is_last = k + 1 == steps;
    chip.collect(group, k);
#pragma unroll 1
    for (int pass = 0; pass < tiling.passes; ++pass) {
      const int lane = chip.lane_of(pass), unit = chip.own_unit();
      const int of_all = first + group * tiling.lanes + lane;
      const bool has_pair = chip.has_pair(pass), has = has_pair && unit < p.H;
      float d[kColumns] = {};
      if (has) {
        const Place& place = chip.place(group, k, lane);
        typename Step::Inputs inputs{};
        if (place.exists) inputs = chip.inputs(chip.turn_of(k, group), lane);
        float carry = Cell::kHasCarry ? chip.carried(group, lane) : 0.0f;
        Step::run(p, place, inputs, of_all, unit, chip.sum(group, k, lane), carry, d);
        if (Cell::kHasCarry) chip.carried(group, lane) = carry;
      }
      if (has_pair && !is_last) {
        FASTBPTT_UNROLL
        for (int g = 0; g < G; ++g) chip.put(group, k + 1, lane, g, d[Cell::kFirstRecurrent + g]);
      }
      // The next turn's inputs are there for all of the block after the barrier.
      if (pass + 1 == tiling.passes) {
        wait_async<kAhead - 2>();
        chip.publish(group, k + 1, is_last);
      }
      if (!has) continue;
      Step::store(p, chip.place(group, k, lane), unit, d);
      if (p.d_by_lane && k < p.steps && of_all < lanes) {
        scalar_t* const to = p.d_by_lane + (int64_t(k) * lanes + of_all) * kColumns * p.H + unit;
        FASTBPTT_UNROLL
        for (int c = 0; c < kColumns; ++c) to[c * p.H] = from_acc<scalar_t>(d[c]);
      }
    }
    if (k % kPlaceSteps == 0) chip.compute_places(group, k + kPlaceSteps, place_of);
    fetch(chip.turn_of(k, group) + kAhead);
  };
  const auto multiply = [&](int k, int group) {
    const auto product = chip.begin_turn(chip.buffer(group, k), group);
    chip.receive(group, k, zero);
    chip.multiply(product);
    sync_block();
    chip.send_sums(group, k);
  };

  for (int k = 0; k < steps; ++k) {
    const bool is_last = k + 1 == steps;
    for (int group = 0; group < tiling.groups; ++group) {
      compute(k, group);
      // In a grid all groups' flags are on their way before the first one's are waited for.
      if (!kGrid && !is_last) multiply(k + 1, group);
    }
    for (int group = 0; kGrid && !is_last && group < tiling.groups; ++group) multiply(k + 1, group);
  }
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
