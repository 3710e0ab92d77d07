// The lane kernels: a block computes one lane, all steps in one launch, and its threads keep W in registers.
// For so few hidden units that they hold it.
//
// The fastest kernels of all where they can run: a step has one barrier. A tile of threads multiplies
// for some units, each thread with some columns; its sums are added up by shuffles, so that each unit's come
// to the few threads that share it, which compute the cell, all the same. What a step takes is bound by
// what a thread reads of x, 4 bytes a lane for each column: the fewer the more units it multiplies for.
// Three more warps do what else there is meanwhile: one fetches inputs some steps ahead, one stores
// results a step behind, and the last one computes where both are, for both only to follow. That takes
// longer than a step, so it meets the others once in kPlaceSteps steps. Products are of float32, in every
// dtype.
#pragma once

#include "cuda/lane_shape.h"
#include "cuda/step.cuh"
#include "cuda/step_memory.cuh"

namespace fastbptt {
namespace {

// Where a step's inputs and results are, those of unit 0: null where there are none. Results may go to two
// places.
template <typename Step>
struct Addresses {
  using scalar_t = typename Step::scalar_t;
  const scalar_t* inputs[Step::kInputs];
  scalar_t* results[2][Step::kResults];

  __device__ void add_result(int i, scalar_t* to) {
    if (results[0][i]) {
      results[1][i] = to;
    } else {
      results[0][i] = to;
    }
  }
};

// kRows: of W, that a unit has; kGroups: of columns, that a thread has of each row. Forward a row is a
// gate's and the columns are x's; backward there is one row, with groups of columns for the gates.
template <typename Step, typename Place, size_t kShape, int kRows, int kGroups>
struct OneLane : StepMemory<Step, Place, kLaneRing, kLanePlaces> {
  using Base = StepMemory<Step, Place, kLaneRing, kLanePlaces>;
  using Base::inputs, Base::results, Base::place, Base::tiling;
  using typename Base::Group;
  using typename Base::scalar_t;
  using Four = Packed<float, 4>;

  static constexpr LaneShape kOf = kLaneShapes[kShape];
  static constexpr int kGates = kRows * kGroups;
  static constexpr bool kIsBackward = kGroups > 1;  // of one gate both are divided alike
  static constexpr int kUnits =
      kOf.tile_units(kGates, kIsBackward);  // that a thread multiplies for
  static constexpr int kTile = kOf.tile_threads(kGates, kIsBackward);
  static constexpr int kColumns = kOf.columns(kGates, kIsBackward);
  static constexpr int kStride = kOf.stride(kGates, kIsBackward), kGroupStride = kTile * kStride;
  static constexpr int kXNumbers = kGroups * kGroupStride;
  static_assert(kXNumbers == kGroups * kOf.x_numbers(kGates, kIsBackward) && kColumns % 4 == 0 &&
                kWarp % kTile == 0);
  static constexpr int kSums = kUnits * kRows;
  // How a sum is kept apart while it grows: chains of additions that do not wait for each other.
  static constexpr int kApart = kSums >= 4 ? 1 : 4 / kSums;
  // A thread's numbers of W, four columns at a time.
  static constexpr int kFours = kSums * kGroups * kColumns / 4;
  static constexpr int kKept = kFours - kOf.shared_numbers / 4;  // in registers

  // What its state is, which the unit's sharers have: `sharer` is its place among them.
  int unit = int(threadIdx.x) / kOf.sharers, sharer = int(threadIdx.x) % kOf.sharers;
  int part = int(threadIdx.x) % kTile;  // of the columns
  // What the warp does; those before them compute.
  enum Role { kFetch, kStore, kPlaces };
  int role;
  int own_x;    // bytes from a buffer's begin to the place of the unit in x
  int stretch;  // numbers beside each other that are carried at a time
  Four kept[kKept];

  __device__ OneLane(const Tiling& tiling, int stretch)
      : Base(tiling),
        role(int(threadIdx.x) / kWarp - (tiling.warps - kLaneCarriers)),
        own_x(4 * (unit / kColumns * kStride + unit % kColumns)),
        stretch(stretch) {}

  __device__ float* x(int step) const {
    return this->template at<float>(tiling.shared.x) + step % 2 * kXNumbers;
  }
  // The unit's place in a group of x.
  __device__ float& own(int step, int group) const {
    float* const first = this->template at<float>(tiling.shared.x + own_x);
    return first[step % 2 * kXNumbers + group * kGroupStride];
  }
  __device__ Addresses<Step>& addresses(int step) const {
    return this->template at<Addresses<Step>>(tiling.shared.addresses)[step % kLanePlaces];
  }

  // Where four numbers of a thread are in its order: sums fastest.
  static constexpr FASTBPTT_HD int place_of(int group, int c, int sum) {
    return (group * kColumns / 4 + c / 4) * kSums + sum;
  }
  // Those in shared memory.
  __device__ Four& shared_four(int place) const {
    constexpr int kThreads = kOf.units * kOf.sharers;
    return this->template at<Four>(tiling.shared.weights)[(place - kKept) * kThreads + threadIdx.x];
  }

  // weight(row, group, unit, column): a number of W; columns are units too.
  template <typename Weight>
  __device__ void load_weights(int H, Weight&& weight) {
    const int first_unit = int(threadIdx.x) / kTile * kUnits;
    FASTBPTT_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      FASTBPTT_UNROLL
      for (int c = 0; c < kColumns; c += 4) {
        FASTBPTT_UNROLL
        for (int sum = 0; sum < kSums; ++sum) {
          const int own_unit = first_unit + sum / kRows, place = place_of(group, c, sum);
          Four four;
          FASTBPTT_UNROLL
          for (int j = 0; j < 4; ++j) {
            const int column = part * kColumns + c + j;
            const bool exists = own_unit < H && column < H;
            four.values[j] = exists ? weight(sum % kRows, group, own_unit, column) : 0.0f;
          }
          if (place < kKept) {
            kept[place] = four;
          } else if (role < 0) {
            shared_four(place) = four;
          }
          // More loads would be under way than there are registers, where no two addresses follow each other.
          sync_warp();
        }
      }
    }
  }

  // The first inputs are under way then; the barrier that x waits for is that of step 0. initial(unit): x
  // of step 0, the same in all groups.
  template <typename Initial, typename Locate>
  __device__ void start(int64_t H, Initial&& initial, Locate&& locate) {
    if (role == kPlaces) compute_places<2 * kPlaceSteps>(0, locate);
    for (int i = threadIdx.x; i < 2 * kXNumbers; i += blockDim.x) x(0)[i] = 0;
    sync_block();
    if (role < 0 && unit < H && sharer == 0) {
      FASTBPTT_UNROLL
      for (int group = 0; group < kGroups; ++group) own(0, group) = initial(unit);
    }
    if (role != kFetch) return;
    for (int step = 0; step < kLaneAhead; ++step) fetch(step, int(H));
  }

  // --- All steps -------------------------------------------------------------------------------------

  // Calls compute(step) by the warps that compute, and has the others carry. What a warp does is told
  // apart before the first step: a branch takes as long as a fifth of the product.
  template <typename Compute, typename Locate>
  __device__ void run(int steps, int H, Compute&& compute, Locate&& locate) const {
    if (role < 0) {
      for_each_step(steps, compute);
    } else if (role == kFetch) {
      for_each_step(steps, [&](int step) { fetch(step + kLaneAhead, H); });
    } else if (role == kStore) {
      for_each_step(steps, [&](int step) {
        if (step > 0) store(step - 1, H);
      });
    } else {
      for (int step = 0; step < steps; step += kPlaceSteps) {
        sync_all();
        compute_places<kPlaceSteps>(step + 2 * kPlaceSteps, locate);
      }
    }
    sync_all();
    if (role == kStore) store(steps - 1, H);
  }

  // A step begins with a barrier, at which the warp that computes places is missing but once in
  // kPlaceSteps steps.
  template <typename Fn>
  __device__ void for_each_step(int steps, Fn&& fn) const {
    for (int first = 0; first < steps; first += kPlaceSteps) {
      sync_all();
      fn(first);
      const int end = first + kPlaceSteps < steps ? first + kPlaceSteps : steps;
#pragma unroll 1
      for (int step = first + 1; step < end; ++step) {
        wait_async<kLaneAhead - 1>();
        sync_first(int(blockDim.x) - kWarp);
        fn(step);
      }
    }
  }
  // The inputs that were fetched for the next step are there, too.
  __device__ void sync_all() const {
    wait_async<kLaneAhead - 1>();
    sync_block();
  }

  // --- By the warps that carry -----------------------------------------------------------------------

  // locate(step, addresses): a step's place, and where what it reads and writes is; also of steps beyond
  // the last one, which read and write nothing.
  template <int steps, typename Locate>
  __device__ void compute_places(int first, Locate&& locate) const {
    const int i = threadIdx.x % kWarp;
    if (i >= steps) return;
    Addresses<Step> found{};
    place(first + i, 0) = locate(first + i, found);
    addresses(first + i) = found;
  }

  // Calls fn(first) for the stretches of H units that are the thread's.
  template <typename Fn>
  __device__ void for_each_stretch(int H, Fn&& fn) const {
    for (int first = int(threadIdx.x) % kWarp * stretch; first < H; first += kWarp * stretch) {
      fn(first);
    }
  }

  __device__ void fetch(int step, int H) const {
    const Addresses<Step>& at = addresses(step);
    const int bytes = stretch * int(sizeof(scalar_t));
    for_each_stretch(H, [&](int first) {
      FASTBPTT_UNROLL
      for (int i = 0; i < Step::kInputs; ++i) {
        const scalar_t* const from = at.inputs[i];
        scalar_t* const to = inputs(step, i) + first;
        if (bytes == 16) {
          copy_async<16>(to, from + first, from != nullptr);
        } else if (bytes == 4) {
          copy_async<4>(to, from + first, from != nullptr);
        } else {
          *to = from ? from[first] : from_acc<scalar_t>(0);
        }
      }
    });
    commit_async();
  }

  __device__ void store(int step, int H) const {
    const Addresses<Step>& at = addresses(step);
    store_to(at.results[0], step, H);
    if (at.results[1][0]) store_to(at.results[1], step, H);
  }
  __device__ void store_to(scalar_t* const (&to)[Step::kResults], int step, int H) const {
    const int bytes = stretch * int(sizeof(scalar_t));
    for_each_stretch(H, [&](int first) {
      if (bytes == 16) {
        copy_results<Group>(to, step, first);
      } else if (bytes == 4) {
        copy_results<uint32_t>(to, step, first);
      } else {
        copy_results<scalar_t>(to, step, first);
      }
    });
  }
  template <typename T>
  __device__ void copy_results(scalar_t* const (&to)[Step::kResults], int step, int first) const {
    T values[Step::kResults];
    FASTBPTT_UNROLL
    for (int i = 0; i < Step::kResults; ++i) {
      values[i] = *reinterpret_cast<const T*>(results(step, i) + first);
    }
    FASTBPTT_UNROLL
    for (int i = 0; i < Step::kResults; ++i) {
      if (to[i]) *reinterpret_cast<T*>(to[i] + first) = values[i];
    }
  }

  // --- By those that compute -------------------------------------------------------------------------

  // Adds the unit's sums to what is in `sums`, for each of its sharers. Collective over the warp.
  __device__ void multiply(int step, float (&sums)[kRows]) const {
    float apart[kApart][kSums] = {};
    FASTBPTT_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      const Four* const from =
          reinterpret_cast<const Four*>(x(step) + group * kGroupStride + part * kStride);
      FASTBPTT_UNROLL
      for (int c = 0; c < kColumns; c += 4) {
        const Four four = from[c / 4];
        Four weights[kSums];
        FASTBPTT_UNROLL
        for (int sum = 0; sum < kSums; ++sum) {
          const int place = place_of(group, c, sum);
          weights[sum] = place < kKept ? kept[place] : shared_four(place);
        }
        FASTBPTT_UNROLL
        for (int j = 0; j < 4; ++j) {
          FASTBPTT_UNROLL
          for (int sum = 0; sum < kSums; ++sum) {
            apart[j % kApart][sum] += weights[sum].values[j] * four.values[j];
          }
        }
      }
    }
    FASTBPTT_UNROLL
    for (int i = 1; i < kApart; ++i) {
      FASTBPTT_UNROLL
      for (int sum = 0; sum < kSums; ++sum) apart[0][sum] += apart[i][sum];
    }
    add_up<kUnits, kTile / 2>(apart[0]);
    FASTBPTT_UNROLL
    for (int row = 0; row < kRows; ++row) sums[row] += apart[0][row];
  }

  // What the tile's threads have summed for `units` units: each keeps one half of them and hands over the
  // other, until one unit is left, whose sharers then add up.
  template <int units, int mask>
  __device__ void add_up(float* sums) const {
    if constexpr (mask > 0) {
      constexpr int half = units > 1 ? units / 2 * kRows : kRows;
      FASTBPTT_UNROLL
      for (int i = 0; i < half; ++i) {
        if constexpr (units > 1) {
          const bool is_upper = part & mask;
          const float own = is_upper ? sums[half + i] : sums[i];
          const float other = is_upper ? sums[i] : sums[half + i];
          sums[i] = own + shuffle_xor(other, mask);
        } else {
          sums[i] += shuffle_xor(sums[i], mask);
        }
      }
      add_up<(units > 1 ? units / 2 : 1), mask / 2>(sums);
    }
  }

  // Each of the sharers keeps some.
  __device__ void keep_parts(int step, const typename Step::Results& results) const {
    this->keep_results(step, unit, results, [&](int i) { return sharer == i % kOf.sharers; });
  }
};

template <typename Cell, typename scalar_t, size_t kShape>
__global__ void __launch_bounds__(kLaneShapes[kShape].threads(), 1)
    lane_forward_kernel(FwdRecurrence<scalar_t> p, Tiling tiling, GridMemory) {
  using Step = FwdStep<Cell, scalar_t>;
  constexpr int G = Cell::kGates;
  OneLane<Step, FwdPlace, kShape, G, 1> chip(tiling, stretch_of<Step>(p));
  const Sequences& sequences = p.sequences;
  const int b = int(blockIdx.x), H = int(p.H), steps = int(sequences.length(b));
  const bool has_initial = has_initial_state(sequences, b), has_unit = chip.unit < H;

  const auto locate = [&](int step, Addresses<Step>& at) {
    if (step >= steps) return FwdPlace{};
    const auto place = fwd_place(sequences, sequences.direction > 0 ? step : steps - 1 - step, b);
    Step::for_each_input(p, place, 0, [&](int i, const scalar_t* from) { at.inputs[i] = from; });
    Step::for_each_result(p, place, b, 0, [&](int i, scalar_t* to) { at.add_result(i, to); });
    return place;
  };
  const auto initial = [&](int unit) {
    return has_initial ? load_or_zero(p.hx, b * p.H + unit) : 0.0f;
  };
  float biases[G] = {};
  float input_bias = 0, carry = 0;  // carry: c of LSTM, h of GRU
  chip.load_weights(H, [&](int row, int, int unit, int column) {
    return to_acc(p.w_hh[(row * H + unit) * H + column]);
  });
  if (has_unit) {
    FASTBPTT_UNROLL
    for (int g = 0; g < G; ++g) {
      biases[g] = Step::recurrent_bias(p, g, chip.unit);
    }
    input_bias = Step::input_bias(p, chip.unit);
    if (Cell::kHasCarry && has_initial) {
      carry = load_or_zero(Cell::kHasCellState ? p.cx : p.hx, b * p.H + chip.unit);
    }
  }
  chip.start(H, initial, locate);

  const auto compute = [&](int step) {
    float rec[G];
    FASTBPTT_UNROLL
    for (int g = 0; g < G; ++g) rec[g] = biases[g];
    chip.multiply(step, rec);
    if (!has_unit) return;
    const auto values = Step::compute(chip.inputs_of(step, chip.unit), input_bias, rec, carry);
    float sent = to_acc(from_acc<scalar_t>(values.h));
    if (Cell::kHasCarry) carry = Step::carried(values);
    if (sequences.resets && chip.place(step, 0).is_reset) sent = carry = 0;
    if (chip.sharer == 0) chip.own(step + 1, 0) = sent;
    chip.keep_parts(step, Step::results_of(values));
  };
  chip.run(steps, H, compute, locate);
}

// A lane is a window of a sequence.
template <typename Cell, typename scalar_t, size_t kShape>
__global__ void __launch_bounds__(kLaneShapes[kShape].threads(), 1)
    lane_backward_kernel(BwdRecurrence<scalar_t> p, Tiling tiling, GridMemory) {
  using Step = BwdStep<Cell, scalar_t>;
  using Place = typename Step::Place;
  constexpr int G = Cell::kGates;
  OneLane<Step, Place, kShape, 1, G> chip(tiling, stretch_of<Step>(p));
  const int lane = int(blockIdx.x), H = int(p.H);
  const int steps =
      int(p.steps) + (p.d_hx || p.d_cx);  // the initial states come after the last step
  const bool has_unit = chip.unit < H;

  const auto locate = [&](int k, Addresses<Step>& at) {
    if (k >= steps) return Place{};
    const Place place = bwd_place(p, k, lane);
    if (place.exists) {
      Step::for_each_input(p, place, k, lane, 0,
                           [&](int i, const scalar_t* from) { at.inputs[i] = from; });
    }
    Step::for_each_result(p, place, k, lane, 0, [&](int i, scalar_t* to) { at.add_result(i, to); });
    return place;
  };
  float carry = 0;
  chip.load_weights(H, [&](int, int gate, int unit, int column) {
    return to_acc(p.w_hh[(gate * H + column) * H + unit]);
  });
  chip.start(H, [](int) { return 0.0f; }, locate);

  const auto compute = [&](int k) {
    // All that is read is asked for at once.
    const auto inputs = chip.inputs_of(k, has_unit ? chip.unit : 0);
    Place place = chip.place(k, 0);
    place.is_initial = place.is_initial && chip.sharer == 0;  // one adds to the initial states'
    float dh[1] = {}, d[Step::kColumns] = {};
    chip.multiply(k, dh);
    if (!has_unit) return;
    Step::run(p, place, inputs, lane, chip.unit, dh[0], carry, d);
    FASTBPTT_UNROLL
    for (int g = 0; g < G; ++g) {
      if (chip.sharer == g % decltype(chip)::kOf.sharers)
        chip.own(k + 1, g) = d[Cell::kFirstRecurrent + g];
    }
    chip.keep_parts(k, Step::results_of(d));
  };
  chip.run(steps, H, compute, locate);
}

}  // namespace
}  // namespace fastbptt
