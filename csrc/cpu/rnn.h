// The passes of one direction of an Elman layer. Each function is run by every thread of a team.
//
//   forward    pre = x W_ih^T + b for all steps at once (into the output's memory), then step by
//              step h_t = phi(pre_t + h_{t-1} W_hh^T), which overwrites pre_t
//   backward   step by step lambda_t = g_t + dpre_{t+1} W_hh, dpre_t = phi'(h_t) lambda_t, then
//              all steps at once dW_ih = dpre^T x, dW_hh = dpre^T h_{t-1}, dx = dpre W_ih
//
// The state that a step hands to the next is kept twice: in the caller's memory, where rows lie as
// the layout says, and in a small double buffer [2][lanes][state_stride] that tiles can read with
// one stride.
#pragma once

#include "cpu/gemm.h"
#include "cpu/team.h"
#include "params.h"

namespace fastbptt {
namespace {

// Deals out the workspace, or with a null base only counts its bytes.
struct Arena {
  char* base;
  int64_t used = 0;
  template <typename T>
  T* take(int64_t count) {
    T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += ceil_div(count * int64_t(sizeof(T)), 64) * 64;
    return p;
  }
};

inline int64_t row_of(const Layout& layout, int64_t t, int64_t b) {
  return layout.offsets ? layout.offsets[t] + b : t * layout.time_stride + b * layout.batch_stride;
}

struct Range {
  int64_t begin, end;
};

inline Range share(int64_t total, int64_t part, int64_t parts) {
  return {total * part / parts, total * (part + 1) / parts};
}

// A power-of-two stride would put the rows of a tile into the same few sets of the cache.
template <typename scalar_t>
int64_t state_stride(int64_t columns) {
  return (ceil_div(columns, kLanes<scalar_t>) + 1) * kLanes<scalar_t>;
}

// One thread's part of a recurrence.
template <typename scalar_t>
struct Share {
  const Lane* lanes;   // of the group: every lane_step-th
  int64_t lane_step;
  int64_t num_lanes;
  Range panels;        // of the units this thread computes
  scalar_t* state[2];  // [num_lanes, stride]
  int64_t stride;
  Barrier* barrier;  // of the group, or null if the thread is alone in it
  bool idle;

  const Lane& lane(int64_t i) const { return lanes[i * lane_step]; }
  void wait() const {
    if (barrier) barrier->wait();
  }
};

// Every thread comes to the same split. The barriers it needs are ready after everyone's next wait.
template <typename scalar_t>
Split split_for(const RnnBase<scalar_t>& p, int64_t K, const Worker& worker) {
  const int64_t vecs = ceil_div(p.H, kLanes<scalar_t>);
  const Split split =
      choose_split(worker.count, p.num_lanes, K, vecs, kVecBytes);
  if (worker.id == 0) {
    for (int i = 0; i < split.batch_parts; ++i) worker.groups[i].init(split.unit_parts);
  }
  return split;
}

// Gives each thread its lanes and panels. `packed` has been laid out for `split`.
template <typename scalar_t>
Share<scalar_t> share_of(const RnnBase<scalar_t>& p, const Packed<scalar_t>& packed, Split split,
                         scalar_t* state, const Worker& worker) {
  Share<scalar_t> mine{};
  const int group = worker.id / split.unit_parts;
  mine.idle = group >= split.batch_parts;
  if (mine.idle) return mine;
  // Whole sequences are dealt out in blocks of neighbours; where lengths differ in turn, so that
  // each group gets long and short ones.
  const bool uniform = p.lanes[0].steps == p.lanes[p.num_lanes - 1].steps;
  const Range block = share(p.num_lanes, group, split.batch_parts);
  mine.lane_step = uniform ? 1 : split.batch_parts;
  mine.lanes = p.lanes + (uniform ? block.begin : group);
  mine.num_lanes = uniform ? block.end - block.begin
                           : (p.num_lanes - group + split.batch_parts - 1) / split.batch_parts;
  mine.panels = share(packed.panels(), worker.id % split.unit_parts, split.unit_parts);
  mine.stride = state_stride<scalar_t>(packed.K);
  const int64_t before = uniform ? block.begin : p.num_lanes * group / split.batch_parts + group;
  mine.state[0] = state + 2 * before * mine.stride;
  mine.state[1] = mine.state[0] + mine.num_lanes * mine.stride;
  mine.barrier = split.unit_parts > 1 ? worker.groups + group : nullptr;
  return mine;
}

template <typename scalar_t>
int64_t state_size(const RnnBase<scalar_t>& p, int64_t K) {
  return 2 * (p.num_lanes + p.threads) * state_stride<scalar_t>(K);
}

// Computes one step for the lanes [begin, end): state_in W through the packed panels, each result
// row handed to fn(lane, panel, acc). K = 0 skips the product.
template <typename scalar_t, typename Fn>
inline void step_tiles(const Share<scalar_t>& mine, const Packed<scalar_t>& packed, int64_t K,
                       const scalar_t* state_in, int64_t begin, int64_t end, Fn&& fn) {
  alignas(64) char storage[kMaxTile];
  scalar_t* acc = reinterpret_cast<scalar_t*>(storage);
  for (int64_t panel = mine.panels.begin; panel < mine.panels.end; ++panel) {
    const int64_t vecs = packed.vecs_in(panel);
    for_each_tile(begin, end, tile_rows(vecs), [&](int64_t first, int64_t rows) {
      run_tile<scalar_t, Left::kByRow>(rows, vecs, state_in + first * mine.stride, mine.stride,
                                       packed.panel(panel), K, acc);
      for (int64_t i = 0; i < rows; ++i) {
        fn(first + i, panel, acc + i * vecs * kLanes<scalar_t>);
      }
    });
  }
}

// ---------------------------------------------------------------------------------------- forward

template <typename scalar_t>
struct FwdBuffers {
  Packed<scalar_t> w_ih, w_hh;
  scalar_t* bias;
  scalar_t* state;

  FwdBuffers(const RnnFwd<scalar_t>& p, Arena arena, Split split) {
    using P = Packed<scalar_t>;
    const int64_t vecs = ceil_div(p.H, kLanes<scalar_t>);
    w_ih = {arena.take<scalar_t>(P::size(p.I, p.H)), p.I, p.H, kMaxVecs};
    w_hh = {arena.take<scalar_t>(P::size(p.H, p.H)), p.H, p.H,
            min(kMaxVecs, ceil_div(vecs, split.unit_parts))};
    bias = arena.take<scalar_t>(vecs * kLanes<scalar_t>);
    state = arena.take<scalar_t>(state_size(p, p.H));
    bytes = arena.used;
  }
  int64_t bytes;
};

template <typename scalar_t>
int64_t rnn_fwd_workspace(const RnnFwd<scalar_t>& p) {
  return FwdBuffers<scalar_t>(p, Arena{nullptr}, {1, 1}).bytes;
}

template <typename Phi, typename scalar_t>
void forward_steps(const RnnFwd<scalar_t>& p, const Packed<scalar_t>& w_hh,
                   const Share<scalar_t>& mine) {
  constexpr int W = kLanes<scalar_t>;
  if (p.hx) {
    for (int64_t i = 0; i < mine.num_lanes; ++i) {
      const scalar_t* from = p.hx + mine.lane(i).batch * p.H;
      scalar_t* to = mine.state[0] + i * mine.stride;
      for (int64_t panel = mine.panels.begin; panel < mine.panels.end; ++panel) {
        for_each_vec(w_hh, panel, [&](int64_t, int64_t column, int64_t count) {
          store(to + column, load_first(from + column, count));
        });
      }
    }
  }
  mine.wait();
  int64_t active = mine.num_lanes;
  for (int64_t s = 0; s < mine.lane(0).steps; ++s) {
    while (mine.lane(active - 1).steps <= s) --active;
    scalar_t* next = mine.state[(s + 1) % 2];
    step_tiles(mine, w_hh, s > 0 || p.hx ? p.H : 0, mine.state[s % 2], 0, active,
               [&](int64_t i, int64_t panel, const scalar_t* acc) {
                 const Lane& lane = mine.lane(i);
                 const int64_t t = lane.first + p.direction * s;
                 scalar_t* h = p.output + row_of(p.layout, t, lane.batch) * p.ld_out;
                 scalar_t* state = next + i * mine.stride;
                 scalar_t* h_n = s + 1 == lane.steps ? p.h_n + lane.batch * p.H : nullptr;
                 for_each_vec(w_hh, panel, [&](int64_t v, int64_t column, int64_t count) {
                   const auto value = Phi::value(load(acc + v * W) + load_first(h + column, count));
                   store(state + column, value);
                   store_first(h + column, value, count);
                   if (h_n) store_first(h_n + column, value, count);
                 });
               });
    mine.wait();
  }
}

template <typename scalar_t>
void rnn_fwd(const RnnFwd<scalar_t>& p, const Worker& worker) {
  const Split split = split_for(p, p.H, worker);
  const FwdBuffers<scalar_t> buffers(p, Arena{static_cast<char*>(p.workspace)}, split);
  const auto& [w_ih, w_hh, bias, state, bytes] = buffers;
  const Range ih = share(w_ih.panels(), worker.id, worker.count);
  const Range hh = share(w_hh.panels(), worker.id, worker.count);
  pack_transposed(w_ih, p.w_ih, ih.begin, ih.end);
  pack_transposed(w_hh, p.w_hh, hh.begin, hh.end);
  if (worker.id == 0) {
    for (int64_t n = 0; n < p.H; ++n) {
      bias[n] = (p.b_ih ? p.b_ih[n] : scalar_t(0)) + (p.b_hh ? p.b_hh[n] : scalar_t(0));
    }
  }
  worker.everyone->wait();
  const Range rows = share(p.layout.N, worker.id, worker.count);
  gemm_rows(p.input, p.I, w_ih, bias, false, p.output, p.ld_out, rows.begin, rows.end);
  worker.everyone->wait();

  const Share<scalar_t> mine = share_of(p, w_hh, split, state, worker);
  if (mine.idle) return;
  switch (p.nonlinearity) {
    case Nonlinearity::kTanh:
      return forward_steps<Tanh>(p, w_hh, mine);
    case Nonlinearity::kRelu:
      return forward_steps<Relu>(p, w_hh, mine);
    case Nonlinearity::kIdentity:
      return forward_steps<Identity>(p, w_hh, mine);
  }
}

// --------------------------------------------------------------------------------------- backward

// Rows of a block of the sums over time, and with them the size of a packed panel.
constexpr int64_t kSumRows = 256;

template <typename scalar_t>
struct BwdBuffers {
  Packed<scalar_t> w_ih, w_hh;
  scalar_t* state;
  scalar_t* panels;  // [threads][kSumRows][kMaxVecs] vectors

  BwdBuffers(const RnnBwd<scalar_t>& p, Arena arena, Split split) {
    using P = Packed<scalar_t>;
    const int64_t vecs = ceil_div(p.H, kLanes<scalar_t>);
    w_ih = {arena.take<scalar_t>(p.d_input ? P::size(p.H, p.I) : 0), p.H, p.I, kMaxVecs};
    w_hh = {arena.take<scalar_t>(P::size(p.H, p.H)), p.H, p.H,
            min(kMaxVecs, ceil_div(vecs, split.unit_parts))};
    state = arena.take<scalar_t>(state_size(p, p.H));
    panels = arena.take<scalar_t>(p.threads * kSumRows * kMaxVecs * kLanes<scalar_t>);
    bytes = arena.used;
  }
  int64_t bytes;
};

template <typename scalar_t>
int64_t rnn_bwd_workspace(const RnnBwd<scalar_t>& p) {
  return BwdBuffers<scalar_t>(p, Arena{nullptr}, {1, 1}).bytes;
}

template <typename Phi, typename scalar_t>
void backward_steps(const RnnBwd<scalar_t>& p, const Packed<scalar_t>& w_hh,
                    const Share<scalar_t>& mine) {
  constexpr int W = kLanes<scalar_t>;
  int64_t entered = 0;  // lanes whose last step has been taken
  for (int64_t s = mine.lane(0).steps - 1; s >= 0; --s) {
    int64_t active = entered;
    while (active < mine.num_lanes && mine.lane(active).steps > s) ++active;
    scalar_t* next = mine.state[s % 2];
    const auto finish_row = [&](int64_t i, int64_t panel, const scalar_t* acc) {
      const Lane& lane = mine.lane(i);
      const int64_t row = row_of(p.layout, lane.first + p.direction * s, lane.batch);
      const scalar_t* h = p.output + row * p.ld_out;
      const scalar_t* d_h = p.d_output ? p.d_output + row * p.ld_out : nullptr;
      const bool last = s + 1 == lane.steps && lane.to_end;
      const scalar_t* d_h_n = last && p.d_h_n ? p.d_h_n + lane.batch * p.H : nullptr;
      scalar_t* d_pre = p.d_pre + row * p.H;
      scalar_t* state = next + i * mine.stride;
      for_each_vec(w_hh, panel, [&](int64_t v, int64_t column, int64_t count) {
        auto lambda = load(acc + v * W);
        if (d_h_n) lambda += load_first(d_h_n + column, count);
        if (d_h) lambda += load_first(d_h + column, count);
        const auto d = lambda * Phi::derivative(load_first(h + column, count));
        store(state + column, d);
        store_first(d_pre + column, d, count);
      });
    };
    const scalar_t* previous = mine.state[(s + 1) % 2];
    step_tiles(mine, w_hh, p.H, previous, 0, entered, finish_row);
    step_tiles(mine, w_hh, 0, previous, entered, active, finish_row);
    entered = active;
    mine.wait();
  }
  if (!p.d_hx) return;
  step_tiles(mine, w_hh, p.H, mine.state[0], 0, mine.num_lanes,
             [&](int64_t i, int64_t panel, const scalar_t* acc) {
               const Lane& lane = mine.lane(i);
               if (!lane.from_start) return;
               scalar_t* d_hx = p.d_hx + lane.batch * p.H;
               for_each_vec(w_hh, panel, [&](int64_t v, int64_t column, int64_t count) {
                 store_first(d_hx + column, load(acc + v * W), count);
               });
             });
}

// Walks the rows of a layout in memory order and knows each row's step and sequence.
struct RowCursor {
  const Layout& layout;
  int64_t t = 0, b = 0;

  RowCursor(const Layout& l, int64_t row) : layout(l) {
    if (l.offsets) {
      int64_t high = l.T;  // offsets[t] <= row < offsets[high]
      while (high - t > 1) {
        const int64_t middle = (t + high) / 2;
        (l.offsets[middle] <= row ? t : high) = middle;
      }
      b = row - l.offsets[t];
    } else if (l.batch_stride == 1) {
      t = row / l.B;
      b = row % l.B;
    } else {
      t = row % l.T;
      b = row / l.T;
    }
  }
  void advance() {
    if (!layout.offsets && layout.batch_stride != 1) {
      if (++t == layout.T) t = 0, ++b;
    } else if (++b == (layout.offsets ? layout.batch_sizes[t] : layout.B)) {
      b = 0, ++t;
    }
  }
};

// The rows of x, one after another.
template <typename scalar_t>
struct InputRows {
  const RnnBwd<scalar_t>& p;
  int64_t row;
  const scalar_t* next() { return p.input + row++ * p.I; }
};

// h_{t-1} for the rows of h_t, one after another; null where it is zero.
template <typename scalar_t>
struct PreviousRows {
  const RnnBwd<scalar_t>& p;
  RowCursor at;
  const scalar_t* next() {
    const int64_t t = at.t - p.direction, b = at.b;
    at.advance();
    const bool exists =
        t >= 0 && t < p.layout.T && (!p.layout.offsets || b < p.layout.batch_sizes[t]);
    if (exists) return p.output + row_of(p.layout, t, b) * p.ld_out;
    return p.hx ? p.hx + b * p.H : nullptr;
  }
};

// dw[m][n] = sum over rows r of d_pre[r][m] x[r][n], for the gate rows m in `gates`.
template <typename scalar_t, typename RowsAt>
void sum_over_rows(const RnnBwd<scalar_t>& p, int64_t columns, const RowsAt& rows_at,
                   scalar_t* panel, Range gates, scalar_t* dw) {
  constexpr int W = kLanes<scalar_t>;
  const int64_t ldd = p.H;
  const Packed<scalar_t> shape{nullptr, kSumRows, columns, kMaxVecs};
  alignas(64) char storage[kMaxTile];
  scalar_t* acc = reinterpret_cast<scalar_t*>(storage);
  for (int64_t first = 0; first < p.layout.N; first += kSumRows) {
    const int64_t depth = min(kSumRows, p.layout.N - first);
    for (int64_t q = 0; q < shape.panels(); ++q) {
      const int64_t vecs = shape.vecs_in(q);
      auto rows = rows_at(first);
      for (int64_t k = 0; k < depth; ++k) {
        const scalar_t* row = rows.next();
        for_each_vec(shape, q, [&](int64_t v, int64_t column, int64_t count) {
          scalar_t* to = panel + (k * vecs + v) * W;
          store(to, row ? load_first(row + column, count) : Vec<scalar_t>{});
        });
      }
      for_each_tile(gates.begin, gates.end, tile_rows(vecs), [&](int64_t m, int64_t count_m) {
        run_tile<scalar_t, Left::kByColumn>(count_m, vecs, p.d_pre + first * ldd + m, ldd, panel,
                                            depth, acc);
        for (int64_t i = 0; i < count_m; ++i) {
          scalar_t* to = dw + (m + i) * columns;
          for_each_vec(shape, q, [&](int64_t v, int64_t column, int64_t count) {
            auto sum = load(acc + (i * vecs + v) * W);
            if (first > 0) sum += load_first(to + column, count);
            store_first(to + column, sum, count);
          });
        }
      });
    }
  }
}

// d_bias[m] = sum over rows of d_pre[r][m] for the gate rows m in `gates`.
template <typename scalar_t>
void sum_bias(const RnnBwd<scalar_t>& p, Range gates) {
  constexpr int W = kLanes<scalar_t>;
  for (int64_t m = gates.begin; m < gates.end; m += W) {
    const int64_t count = min(W, gates.end - m);
    // Several running sums: one would grow long and round more.
    Vec<scalar_t> sums[4] = {};
    for (int64_t r = 0; r < p.layout.N; ++r) {
      sums[r % 4] += load_first(p.d_pre + r * p.H + m, count);
    }
    store_first(p.d_bias + m, (sums[0] + sums[1]) + (sums[2] + sums[3]), count);
  }
}

template <typename scalar_t>
void rnn_bwd(const RnnBwd<scalar_t>& p, const Worker& worker) {
  const Split split = split_for(p, p.H, worker);
  const BwdBuffers<scalar_t> buffers(p, Arena{static_cast<char*>(p.workspace)}, split);
  const auto& [w_ih, w_hh, state, panels, bytes] = buffers;
  if (p.d_input) {
    const Range ih = share(w_ih.panels(), worker.id, worker.count);
    pack_direct(w_ih, p.w_ih, ih.begin, ih.end);
  }
  const Range hh = share(w_hh.panels(), worker.id, worker.count);
  pack_direct(w_hh, p.w_hh, hh.begin, hh.end);
  worker.everyone->wait();

  const Share<scalar_t> mine = share_of(p, w_hh, split, state, worker);
  if (!mine.idle) {
    switch (p.nonlinearity) {
      case Nonlinearity::kTanh:
        backward_steps<Tanh>(p, w_hh, mine);
        break;
      case Nonlinearity::kRelu:
        backward_steps<Relu>(p, w_hh, mine);
        break;
      case Nonlinearity::kIdentity:
        backward_steps<Identity>(p, w_hh, mine);
        break;
    }
  }
  worker.everyone->wait();

  if (p.d_input) {
    const Range rows = share(p.layout.N, worker.id, worker.count);
    gemm_rows<scalar_t>(p.d_pre, p.H, w_ih, nullptr, p.accumulate_d_input, p.d_input, p.I,
                        rows.begin, rows.end);
  }
  if (p.d_w_ih) {
    scalar_t* panel = panels + worker.id * kSumRows * kMaxVecs * kLanes<scalar_t>;
    const Range gates = share(p.H, worker.id, worker.count);
    const auto inputs = [&](int64_t row) { return InputRows<scalar_t>{p, row}; };
    const auto previous = [&](int64_t row) {
      return PreviousRows<scalar_t>{p, RowCursor(p.layout, row)};
    };
    sum_over_rows(p, p.I, inputs, panel, gates, p.d_w_ih);
    sum_over_rows(p, p.H, previous, panel, gates, p.d_w_hh);
    if (p.d_bias) sum_bias(p, gates);
  }
}

}  // namespace
}  // namespace fastbptt
