// The persistent kernels: all steps in one launch, with W_hh on the chip; see on_chip.cuh. Called
// resident where one block has all of W_hh, and cluster where the blocks of a cluster share it.
//
// What a pair reads of memory is loaded when the pair before it is done with, for a thread's first one
// at the end of the step before: it is on its way while the product runs. The pairs' state stays in
// registers.
#pragma once

#include "cuda/on_chip.cuh"
#include "cuda/step.cuh"
#include "cuda/units.cuh"

namespace fastbptt {
namespace {

// Lanes are sequences. They begin together, each with its own first step.
template <typename Cell, typename Product>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1)
    persistent_forward_kernel(FwdRecurrence<typename Product::scalar_t> p, Tiling tiling) {
  using Step = FwdStep<Cell, typename Product::scalar_t>;
  constexpr int G = Cell::kGates;
  OnChip<Product, FwdPlace, /*kTransposed=*/false> chip(tiling);
  const Sequences& sequences = p.sequences;
  const int64_t first = chip.cluster_index() * tiling.lanes, B = sequences.layout.B;
  const int64_t steps = sequences.length(first);  // no other of the tile is longer
  const bool has_unit = chip.own_unit() < p.H;

  const auto initial = [&](int lane, int column) {
    const int64_t b = first + lane;
    if (b >= B || column >= p.H || !has_initial_state(sequences, b)) return 0.0f;
    return load_or_zero(p.hx, b * p.H + column);
  };
  const auto bias = [&](int row) {
    const int gate = row / tiling.units, row_unit = chip.first_unit() + row - gate * tiling.units;
    return row_unit < p.H ? Step::recurrent_bias(p, gate, row_unit) : 0.0f;
  };
  const auto place_of = [&](int64_t step, int lane) {
    const int64_t b = first + lane;
    if (b >= B || step >= sequences.length(b)) return FwdPlace{};
    return fwd_place(sequences, sequences.direction > 0 ? step : sequences.length(b) - 1 - step, b);
  };
  chip.start({p.w_hh, p.H, G, tiling.units, chip.first_unit()}, initial, bias, place_of);

  const float input_bias = has_unit ? Step::input_bias(p, chip.own_unit()) : 0.0f;
  float carried[kMaxPasses] = {};  // c of LSTM, h of GRU
  FASTBPTT_UNROLL
  for (int pass = 0; pass < kMaxPasses; ++pass) {
    const int64_t b = first + chip.lane_of(pass);
    if (!Cell::kHasCarry || !has_unit || !chip.has_pair(pass) || b >= B) continue;
    if (!has_initial_state(sequences, b)) continue;
    carried[pass] = load_or_zero(Cell::kHasCellState ? p.cx : p.hx, b * p.H + chip.own_unit());
  }
  typename Step::Inputs inputs{};  // of the pair that comes next
  const auto load = [&](int64_t step, int pass) {
    if (!has_unit || !chip.has_pair(pass)) return;
    const FwdPlace& place = chip.place(step, chip.lane_of(pass));
    if (place.exists) inputs = Step::load(p, place, chip.own_unit());
  };
  load(0, 0);

  for (int64_t step = 0; step < steps; ++step) {
    chip.wait(step);
    chip.multiply(step);
    const int unit = chip.own_unit();
    sync_block();
    const bool is_last = step + 1 == steps;
    if (step % kPlaceSteps == 0) chip.compute_places(step + kPlaceSteps, place_of);
    if (!is_last) chip.announce(step + 1, 1);
    FASTBPTT_UNROLL
    for (int pass = 0; pass < kMaxPasses; ++pass) {
      if (!chip.has_pass(pass)) continue;
      const int lane = chip.lane_of(pass);
      FwdPlace place{};
      if (has_unit && chip.has_pair(pass)) place = chip.place(step, lane);
      typename Step::Values values{};
      if (place.exists) {
        float rec[G];
        FASTBPTT_UNROLL
        for (int g = 0; g < G; ++g) rec[g] = chip.sum(g * tiling.units + chip.unit, lane);
        values = Step::compute(inputs, input_bias, rec, carried[pass]);
        carried[pass] = place.is_reset ? 0 : Cell::kHasCellState ? values.c : values.h;
      }
      if (!is_last) chip.push(step + 1, pass, 0, place.is_reset ? 0 : values.h);
      if (place.exists) {
        Step::store(p, place, first + lane, unit, values);
        store_output(p, place, first + lane, unit, values.h);
      }
      const bool is_over = pass + 1 == kMaxPasses || !chip.has_pass(pass + 1);
      load(is_over ? step + 1 : step, is_over ? 0 : pass + 1);
    }
    chip.end_step();
  }
}

// Lanes are windows of sequences, in lockstep from their last steps on.
template <typename Cell, typename Product>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1)
    persistent_backward_kernel(BwdRecurrence<typename Product::scalar_t> p, Tiling tiling) {
  using scalar_t = typename Product::scalar_t;
  using Step = BwdStep<Cell, scalar_t>;
  using Place = typename Step::Place;
  constexpr int G = Cell::kGates, kColumns = Cell::kColumns;
  OnChip<Product, Place, /*kTransposed=*/true> chip(tiling);
  const int64_t first = chip.cluster_index() * tiling.lanes, lanes = p.num_lanes();
  const int64_t steps =
      p.steps + (p.d_hx || p.d_cx);  // the initial states come after the last step
  const bool has_unit = chip.own_unit() < p.H;

  const auto zero = [](auto...) { return 0.0f; };
  const auto place_of = [&](int64_t k, int lane) {
    return first + lane < lanes ? bwd_place(p, k, first + lane) : Place{};
  };
  chip.start({p.w_hh, p.H, G, tiling.units, chip.first_unit()}, zero, zero, place_of);

  float carried[kMaxPasses] = {};
  typename Step::Inputs inputs{};  // of the pair that comes next
  const auto load = [&](int64_t k, int pass) {
    if (!has_unit || !chip.has_pair(pass)) return;
    const int lane = chip.lane_of(pass);
    inputs = Step::load(p, chip.place(k, lane), k, first + lane, chip.own_unit());
  };
  load(0, 0);

  for (int64_t k = 0; k < steps; ++k) {
    chip.wait(k);
    chip.multiply(k);
    const int unit = chip.own_unit();
    sync_block();
    const bool is_last = k + 1 == steps;
    if (k % kPlaceSteps == 0) chip.compute_places(k + kPlaceSteps, place_of);
    if (!is_last) chip.announce(k + 1, G);
    FASTBPTT_UNROLL
    for (int pass = 0; pass < kMaxPasses; ++pass) {
      if (!chip.has_pass(pass)) continue;
      const bool has = has_unit && chip.has_pair(pass);
      const int lane = chip.lane_of(pass);
      float d[kColumns] = {};
      if (has) {
        Step::run(p, chip.place(k, lane), inputs, first + lane, unit, chip.sum(chip.unit, lane),
                  carried[pass], d);
      }
      FASTBPTT_UNROLL
      for (int g = 0; g < G; ++g) {
        if (!is_last) chip.push(k + 1, pass, g, d[Cell::kFirstRecurrent + g]);
      }
      if (has) {
        Step::store(p, chip.place(k, lane), unit, d);
        if (p.d_by_lane && k < p.steps && first + lane < lanes) {
          scalar_t* const to = p.d_by_lane + (k * lanes + first + lane) * kColumns * p.H + unit;
          FASTBPTT_UNROLL
          for (int c = 0; c < kColumns; ++c) to[c * p.H] = from_acc<scalar_t>(d[c]);
        }
      }
      const bool is_over = pass + 1 == kMaxPasses || !chip.has_pass(pass + 1);
      load(is_over ? k + 1 : k, is_over ? 0 : pass + 1);
    }
    chip.end_step();
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
