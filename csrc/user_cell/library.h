// The functions of a library that is compiled from a user's cell: what a step does, for a row and some
// units. The including file has defined FASTBPTT_VEC_BYTES and what vec.h names; the compiler is told
// the instruction set.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "user_cell/functions.h"
#include "user_cell/interface.h"

namespace fastbptt {
namespace {

// Calls fn(unit, units that exist, acc) for the vectors of the units [begin, end), of which each has
// `vecs` of acc.
template <typename scalar_t, typename Fn>
[[gnu::always_inline]] inline void for_each_vec(int64_t begin, int64_t end, const scalar_t* acc,
                                                int vecs, Fn&& fn) {
  constexpr int W = kLanes<scalar_t>;
  int64_t unit = begin;
  for (; unit + W <= end; unit += W, acc += vecs * W) fn(unit, Whole<W>(), acc);
  if (unit < end) fn(unit, Part<W>(end - unit), acc);
}

// A row of H values of each of `count` tensors, or null.
template <typename scalar_t, int count>
struct RowOfEach {
  scalar_t* rows[count + 1];

  RowOfEach(scalar_t* const* tensors, int64_t H, int64_t row) {
    for (int k = 0; k < count; ++k) {
      rows[k] = tensors && tensors[k] && row >= 0 ? tensors[k] + row * H : nullptr;
    }
  }
};

// What the cell reads of a row beside its gates. Here and below, pointers are found before the loop over
// units: what it stores might be these, for all that the compiler knows.
template <typename Cell, typename scalar_t>
struct ArgumentRows {
  using V = Vec<scalar_t>;
  const scalar_t* states[Cell::kStates];
  const scalar_t* extras[Cell::kExtras + 1];
  bool by_unit[Cell::kExtras + 1];

  ArgumentRows(const LayerParams<scalar_t>& p, const UserTensors<scalar_t>& of, int64_t row,
               int64_t before) {
    for (int k = 0; k < Cell::kStates; ++k) states[k] = entering_row(p, of, k, before);
    for (int k = 0; k < Cell::kExtras; ++k) {
      extras[k] = of.extras[k].data + row * of.extras[k].row_stride;
      by_unit[k] = of.extras[k].unit_stride != 0;
    }
  }

  template <typename Count>
  [[gnu::always_inline]] void load(int64_t unit, Count count, V* state, V* extra) const {
    for (int k = 0; k < Cell::kStates; ++k) {
      state[k] = states[k] ? load_first(states[k] + unit, count) : V{};
    }
    for (int k = 0; k < Cell::kExtras; ++k) {
      extra[k] = by_unit[k] ? load_first(extras[k] + unit, count) : Bits<V>::broadcast(*extras[k]);
    }
  }
};

// The input's part of a row's gates.
template <typename Cell, typename scalar_t, typename Count>
[[gnu::always_inline]] inline void load_gates(const scalar_t* pre, const scalar_t* bias, int64_t H,
                                              int64_t unit, Count count, Vec<scalar_t>* gates) {
  for (int g = 0; g < Cell::kGates; ++g) {
    gates[g] = load_first(pre + g * H + unit, count);
    if (bias) gates[g] += load_first(bias + g * H + unit, count);
  }
}

// The elements that there are; the rest is zero.
template <typename V, int lanes>
[[gnu::always_inline]] inline V first_of(V x, Whole<lanes>) {
  return x;
}
template <typename V, int lanes>
[[gnu::always_inline]] inline V first_of(V x, Part<lanes> part) {
  typename Bits<V>::scalar_t values[lanes];
  store(values, x);
  return load_first(values, part);
}

// What a phase has of a lane: slots that others wrote, and what it adds to sums over units, `each` of
// every normalization.
template <typename Cell, int each, typename scalar_t>
struct PhaseRow {
  using V = Vec<scalar_t>;
  static constexpr int W = kLanes<scalar_t>;
  scalar_t *slots, *sums;
  int64_t ld_slots;
  const scalar_t* stats;

  explicit PhaseRow(const UserPhase<scalar_t>& in)
      : slots(in.slots), sums(in.sums), ld_slots(in.ld_slots), stats(in.stats) {}

  [[gnu::always_inline]] void load_slots(int64_t unit, int count, V* to) const {
    for (int k = 0; k < count; ++k) to[k] = load(slots + k * ld_slots + unit);
  }
  [[gnu::always_inline]] void store_slots(int64_t unit, int begin, int end, const V* from) const {
    for (int k = begin; k < end; ++k) store(slots + k * ld_slots + unit, from[k]);
  }
  // One number of each normalization, as UserPhase has them.
  [[gnu::always_inline]] void load_stats(int which, V* to) const {
    for (int n = 0; n < Cell::kNorms; ++n) {
      to[n] = Bits<V>::broadcast(stats[n * UserPhase<scalar_t>::kStats + which]);
    }
  }
  // Adds those of normalizations that are in phase `phase`.
  template <int phase, typename Count>
  [[gnu::always_inline]] void add_sums(Phase<phase>, Count count, const V* from) const {
#pragma GCC unroll 128
    for (int n = 0; n < each * Cell::kNorms; ++n) {
      if (Cell::kNormPhases[n / each] != phase) continue;
      store(sums + n * W, load(sums + n * W) + first_of(from[n], count));
    }
  }
};

template <typename Cell, int phase, typename scalar_t>
void user_forward_phase(const UserForwardParams<scalar_t>& p, const UserForwardRow<scalar_t>& row,
                        int64_t begin, int64_t end, const scalar_t* acc) {
  using V = Vec<scalar_t>;
  constexpr int W = kLanes<scalar_t>, G = Cell::kGates, S = Cell::kStates;
  constexpr bool is_last = phase == Cell::kPhases - 1;
  constexpr int first_slot = phase == 0 ? 0 : Cell::kSlotEnds[phase - 1];
  constexpr int first_kept = phase == 0 ? 0 : Cell::kKeptEnds[phase - 1];
  const int64_t H = p.H;
  const scalar_t *const row_pre = row.pre, *const b_ih = p.b_ih, *const b_hh = p.b_hh;
  const ArgumentRows<Cell, scalar_t> arguments(p, p, row.row, row.before);
  const RowOfEach<scalar_t, S> states(p.states, H, row.row), last(p.last, H, row.ends);
  const PhaseRow<Cell, 1, scalar_t> in(row.in);
  scalar_t* const row_kept = p.kept ? p.kept + row.row * p.ld_kept : nullptr;
  scalar_t* const h = row.h;
  const bool is_reset = row.is_reset;
  const scalar_t* const reset_to = row.reset_to;
  for_each_vec(
      begin, end, acc, phase == 0 ? G : 0, [&](int64_t unit, auto count, const scalar_t* product) {
        V pre[G], rec[G], before[S], extra[Cell::kExtras + 1], after[S], kept[Cell::kKept + 1];
        V slots[Cell::kSlots + 1], sums[Cell::kNorms + 1];
        V mean[Cell::kNorms + 1], scale[Cell::kNorms + 1];
        load_gates<Cell>(row_pre, b_ih, H, unit, count, pre);
        for (int g = 0; phase == 0 && g < G; ++g) {
          rec[g] = load(product + g * W);
          if (b_hh) rec[g] += load_first(b_hh + g * H + unit, count);
        }
        arguments.load(unit, count, before, extra);
        in.load_slots(unit, first_slot, slots);
        in.load_stats(0, mean);
        in.load_stats(1, scale);
        Cell::forward(Phase<phase>(), pre, rec, before, extra, mean, scale, slots, sums, after,
                      kept);
        in.store_slots(unit, first_slot, Cell::kSlotEnds[phase], slots);
        in.add_sums(Phase<phase + 1>(), count, sums);
        for (int k = first_kept; row_kept && k < Cell::kKeptEnds[phase]; ++k) {
          store_first(row_kept + k * H + unit, kept[k], count);
        }
        if constexpr (is_last) {
          for (int k = 0; k < S; ++k) {
            store_first(states.rows[k] + unit, after[k], count);
            if (last.rows[k]) store_first(last.rows[k] + unit, after[k], count);
          }
          V next = after[Cell::kRecurrent];
          if (is_reset) next = reset_to ? load_first(reset_to + unit, count) : V{};
          store(h + unit, next);
        }
      });
}

template <typename Cell, int phase, typename scalar_t>
void user_backward_phase(const UserBackwardParams<scalar_t>& p,
                         const UserBackwardRow<scalar_t>& row, int64_t begin, int64_t end,
                         const scalar_t* acc) {
  using V = Vec<scalar_t>;
  constexpr int G = Cell::kGates, S = Cell::kStates, K = Cell::kKept, C = Cell::kColumns;
  constexpr int E = Cell::kExtras;
  constexpr bool begins = phase == Cell::kPhases - 1;
  constexpr int first_slot = begins ? 0 : Cell::kGradientSlotEnds[phase + 1];
  const int64_t H = p.H, ld_carry = row.ld_carry;
  const scalar_t* const row_pre = Cell::kReadsPre ? p.pre + row.row * G * H : nullptr;
  const scalar_t* const b_ih = p.b_ih;
  const scalar_t* const row_kept = p.kept + row.row * p.ld_kept;
  const ArgumentRows<Cell, scalar_t> arguments(p, p, row.row, row.before);
  const RowOfEach<const scalar_t, S> states(p.states, H, row.row);
  const RowOfEach<const scalar_t, S> d_states(p.d_states, H, row.row),
      d_last(p.d_last, H, row.ends);
  RowOfEach<scalar_t, E> d_extras(p.d_extras, H, row.row);
  bool is_sum[E + 1];
  for (int k = 0; k < E; ++k) {
    is_sum[k] = p.extras[k].row_stride == 0;
    if (d_extras.rows[k] && is_sum[k]) d_extras.rows[k] = row.extra_sums + k * ld_carry;
  }
  const PhaseRow<Cell, 2, scalar_t> in(row.in);
  const RowOfEach<scalar_t, S> d_reset_to(p.d_reset_to, H, row.reset);
  scalar_t *const carry = row.carry, *const row_d = row.d;
  const scalar_t gate = row.gate, clip_grad = p.clip_grad;
  const bool is_last = row.is_last;
  for_each_vec(
      begin, end, acc, begins ? 1 : 0, [&](int64_t unit, auto count, const scalar_t* product) {
        V pre[G], before[S], after[S], extra[E + 1], kept[K + 1];
        V d_after[S], d[C], d_before[S], d_extra[E + 1];
        V slots[Cell::kGradientSlots + 1], sums[2 * Cell::kNorms + 1];
        V mean[Cell::kNorms + 1], scale[Cell::kNorms + 1];
        V d_mean[Cell::kNorms + 1], d_scale[Cell::kNorms + 1];
        for (int k = 0; k < K; ++k) kept[k] = load_first(row_kept + k * H + unit, count);
        if constexpr (Cell::kReadsPre) load_gates<Cell>(row_pre, b_ih, H, unit, count, pre);
        arguments.load(unit, count, before, extra);
        for (int k = 0; k < S; ++k) {
          after[k] = load_first(states.rows[k] + unit, count);
          if constexpr (!begins) continue;
          V from_after = is_last ? V{} : load(carry + k * ld_carry + unit);
          if (k == Cell::kRecurrent) from_after += load(product);
          if (clip_grad > 0) from_after = clipped(from_after, clip_grad);
          if (d_reset_to.rows[k]) store_first(d_reset_to.rows[k] + unit, from_after, count);
          d_after[k] = gate == 0 ? V{} : from_after * gate;  // stops infinity and NaN too
          if (d_states.rows[k]) d_after[k] += load_first(d_states.rows[k] + unit, count);
          if (d_last.rows[k]) d_after[k] += load_first(d_last.rows[k] + unit, count);
        }
        in.load_slots(unit, first_slot, slots);
        in.load_stats(0, mean);
        in.load_stats(1, scale);
        in.load_stats(2, d_mean);
        in.load_stats(3, d_scale);
        Cell::backward(Phase<phase>(), pre, before, after, extra, kept, mean, scale, d_mean,
                       d_scale, d_after, slots, sums, d, d_before, d_extra);
        in.store_slots(unit, first_slot, Cell::kGradientSlotEnds[phase], slots);
        in.add_sums(Phase<phase>(), count, sums);
#pragma GCC unroll 128
        for (int c = 0; c < C; ++c) {
          if (Cell::kPhaseOf_d[c] == phase) store_first(row_d + c * H + unit, d[c], count);
        }
#pragma GCC unroll 128
        for (int k = 0; k < S; ++k) {
          if (Cell::kPhaseOf_d_before[k] == phase) store(carry + k * ld_carry + unit, d_before[k]);
        }
#pragma GCC unroll 128
        for (int k = 0; k < E; ++k) {
          if (Cell::kPhaseOf_d_extra[k] != phase || !d_extras.rows[k]) continue;
          scalar_t* const to = d_extras.rows[k] + unit;
          is_sum[k] ? store(to, load(to) + d_extra[k]) : store_first(to, d_extra[k], count);
        }
      });
}

// The phase that a row is in.
template <typename Cell, int phase = 0, typename Params, typename Row, typename scalar_t>
void user_forward(const Params& p, const Row& row, int64_t begin, int64_t end,
                  const scalar_t* acc) {
  if constexpr (phase + 1 < Cell::kPhases) {
    if (row.in.phase > phase) return user_forward<Cell, phase + 1>(p, row, begin, end, acc);
  }
  user_forward_phase<Cell, phase>(p, row, begin, end, acc);
}

template <typename Cell, int phase = 0, typename Params, typename Row, typename scalar_t>
void user_backward(const Params& p, const Row& row, int64_t begin, int64_t end,
                   const scalar_t* acc) {
  if constexpr (phase + 1 < Cell::kPhases) {
    if (row.in.phase > phase) return user_backward<Cell, phase + 1>(p, row, begin, end, acc);
  }
  user_backward_phase<Cell, phase>(p, row, begin, end, acc);
}

}  // namespace
}  // namespace fastbptt

#define FASTBPTT_USER_LIBRARY(Cell, scalar_t)                                     \
  extern "C" [[gnu::visibility("default")]] void fastbptt_cell_forward(           \
      const fastbptt::UserForwardParams<scalar_t>& p,                             \
      const fastbptt::UserForwardRow<scalar_t>& row, int64_t begin, int64_t end,  \
      const scalar_t* acc) {                                                      \
    fastbptt::user_forward<Cell>(p, row, begin, end, acc);                        \
  }                                                                               \
  extern "C" [[gnu::visibility("default")]] void fastbptt_cell_backward(          \
      const fastbptt::UserBackwardParams<scalar_t>& p,                            \
      const fastbptt::UserBackwardRow<scalar_t>& row, int64_t begin, int64_t end, \
      const scalar_t* acc) {                                                      \
    fastbptt::user_backward<Cell>(p, row, begin, end, acc);                       \
  }
