// What the blocks of a team tell each other, and when they may.
//
// A step, of all blocks of a team:
//
//   forward   receive(): x of the step is there    backward  collect(): the sums for the block's units
//             multiply(), sync_block()                       the cell, which writes d
//             the cell, from sums_of()                       publish(): d to x of the next step
//             push() or publish(): the state to              receive(), multiply(), sync_block()
//             x of the next step                             send_sums() for the next step
//
// Forward in a cluster, x has two buffers by turns, and an mbarrier for each counts the bytes that come
// in. Why that is enough: a thread pushes to the next step's buffer, which held the x of the step
// before, after its receive() and a sync_block(). By then the blocks have sent it their x of this
// step, after all of their threads had multiplied with the one before. The sums are safe likewise:
// receive() lasts until every thread of the block has pushed, which it does after its sums_of().
//
// Backward in a cluster, a block's x is its own, and what is exchanged are sums: two buffers and an
// mbarrier each. Whoever sends those of step k + 2 has collected all of step k + 1, and these were sent
// after their block had collected those of step k.
//
// In a grid x lies in global memory, in two buffers, and a team has a flag that counts its blocks: each
// adds one when its part of a step's x is there; receive() waits for all of them, and copies. So
// whoever writes x of step k + 1 knows that all have copied that of step k - 1: they had, when they
// counted themselves for step k.
//
// No block ends before it has received all that is sent to it, since at the last step nobody sends.
#pragma once

#include "cuda/flags.cuh"
#include "cuda/on_chip.cuh"
#include "cuda/params.cuh"

namespace fastbptt {

namespace {

// Whom a block shares W with.
enum class Reach { kBlock, kCluster, kGrid };

template <typename Product, typename Step, typename Place, bool kTransposed, Reach kReach>
struct Exchange : OnChip<Product, Step, Place, kTransposed> {
  using Base = OnChip<Product, Step, Place, kTransposed>;
  using Base::kGroup;
  using Base::rank, Base::team, Base::tiling, Base::lane, Base::unit;
  using typename Base::Group;
  using typename Base::scalar_t;
  using typename Base::x_t;
  static constexpr bool kGrid = kReach == Reach::kGrid;

  const GridMemory& memory;
  // What the thread sends of the sums: four units beside each other of a lane, for an owner and some of
  // those that follow; packed, to take one register.
  int sends = 0;
  // Where the thread begins to copy a grid's x: a row, and 16 bytes of it; packed.
  int copies = 0;

  __device__ Exchange(const Tiling& tiling, const GridMemory& memory)
      : Base(tiling), memory(memory) {
    if constexpr (kTransposed) {
      const int warp = threadIdx.x / kWarp, quads = tiling.units / 4;  // of an owner and a lane
      const int quad = warp % tiling.send_warps * kWarp + threadIdx.x % kWarp, lane = quad / quads;
      const bool has = lane < tiling.lanes && warp < senders() * tiling.send_warps;
      const int owner = has ? warp / tiling.send_warps : tiling.cluster;
      sends = owner << 16 | (has ? lane : 0) << 12 | (quad - lane * quads);
    }
    if constexpr (kGrid) {
      const int chunks = tiling.column_units / kGroup, row = int(threadIdx.x) / chunks;
      copies = row << 16 | (int(threadIdx.x) - row * chunks);
    }
  }

  __device__ void begin_step() {
    Base::begin_step();
    sends = opaque(sends);
    copies = opaque(copies);
  }

  // Owners that are sent to at the same time.
  __device__ int senders() const { return int(blockDim.x) / kWarp / tiling.send_warps; }

  // The clusters of a grid may be of one block.
  __device__ bool is_alone() const {
    return kReach == Reach::kBlock || (kGrid && tiling.cluster == 1);
  }
  __device__ Barrier* barrier(int step) const { return this->template at<Barrier>(0) + step % 2; }
  // Two phases of one barrier are two steps apart; step 0 has none.
  static __device__ int parity(int step) { return (step - 1) / 2 % 2; }
  __device__ int buffer(int step) const {
    return kGrid || kTransposed || is_alone() ? 0 : step % 2;
  }

  // --- Before the first step -----------------------------------------------------------------------

  // Ends with a barrier of the block, or the cluster. initial(lane, unit): x of step 0.
  template <typename Initial, typename PlaceOf>
  __device__ void start(Initial&& initial, PlaceOf&& place_of) {
    if (!is_alone() && threadIdx.x == 0) {
      for (int step = 0; step < 2; ++step) barrier_init(barrier(step), 1);
      fence_barrier_init();
    }
    this->compute_places(0, place_of);
    fill(0, initial);
    // What is padding in the other one stays zero.
    if (buffer(1) != 0) fill(1, [](int, int) { return 0.0f; });
    if (is_alone()) {
      sync_block();
    } else {
      sync_cluster();
    }
  }

  template <typename Initial>
  __device__ void fill(int to_buffer, Initial&& initial) const {
    const int stride = tiling.shared.x_stride;
    x_t* const to = this->x(to_buffer);
    for (int lane = 0; lane < tiling.lanes; ++lane) {
      for (int i = threadIdx.x; i < stride; i += blockDim.x) {
        to[lane * stride + i] = Product::to_x(initial(lane, i));
      }
    }
  }

  // --- x ---------------------------------------------------------------------------------------------

  // Until x of a step is there. Collective over the block.
  __device__ void receive(int step) const {
    if constexpr (kGrid) {
      if (step == 0) return;
      if (threadIdx.x == 0) wait_flag(flag(), uint32_t(tiling.team() * step));
      sync_block();
      copy_x(step);
      sync_block();
    } else if (step > 0) {
      if (kTransposed) return;  // publish() has a barrier
      if (is_alone()) return sync_block();
      barrier_wait(barrier(step), parity(step));
    }
  }

  // To be called once before a step's pushes: how many bytes come in for x of the step.
  __device__ void announce(int step) const {
    if (kGrid || is_alone() || threadIdx.x > 0) return;
    const int numbers = tiling.cluster * tiling.pairs();
    barrier_arrive_expect_bytes(barrier(step), numbers * int(sizeof(x_t)));
  }

  // Puts the state of the thread's pair into x of a step, in all blocks. Collective over the warp.
  __device__ void push(int step, float value) const {
    if (kGrid || is_alone()) {
      if (this->has_pair()) put(step, 0, value);
      return;
    }
    const Group sent = gather(value);
    if (!this->has_pair()) return;
    // Each of the group's threads sends it to other blocks.
    const int member = threadIdx.x % kGroup;
    const x_t* const to =
        this->x(buffer(step)) + lane * tiling.shared.x_stride + this->own_unit() - member;
    const uint32_t address = cluster_address(to), counter = cluster_address(barrier(step));
    FASTBPTT_UNROLL
    for (int i = 0; i < kMaxCluster; i += kGroup) {
      const int peer = member + i;
      if (peer >= tiling.cluster) continue;
      store_async(map_address(address, peer), sent, map_address(counter, peer));
    }
  }

  // Puts a number of the thread's pair into its place of x: the block's own, or the grid's.
  __device__ void put(int step, int gate, float value) const {
    if constexpr (kGrid) {
      const int column = gate * tiling.team() * tiling.units + this->own_unit();
      x_of_grid(step)[lane * row_numbers() + column] = Product::to_x(value);
    } else {
      const int column = gate * tiling.gate_columns + (kTransposed ? unit() : this->own_unit());
      this->x(buffer(step))[lane * tiling.shared.x_stride + column] = Product::to_x(value);
    }
  }

  // After all puts of a step. Collective over the block: also a barrier for what its threads wrote.
  __device__ void publish(bool is_last) const {
    sync_block();
    if constexpr (kGrid) {
      if (!is_last && threadIdx.x == 0) add_to_flag(flag());
    }
  }

  __device__ Flag* flag() const { return memory.flags + team * kFlagStride; }
  static constexpr int kGates = kTransposed ? Step::kGates : 1;
  __device__ int row_numbers() const { return kGates * tiling.team() * tiling.units; }
  __device__ x_t* x_of_grid(int step) const {
    const int64_t index = team * 2 + step % 2;
    return static_cast<x_t*>(memory.x) + index * tiling.lanes * row_numbers();
  }

  // The block's columns, from global memory: 16 bytes of a gate's of a lane after another.
  __device__ void copy_x(int step) const {
    constexpr int kAtOnce = 2;  // loads that do not wait for each other
    const int rows = tiling.lanes * kGates, chunks = tiling.column_units / kGroup;
    const int team_units = tiling.team() * tiling.units;
    const x_t* const from = x_of_grid(step) + this->first_column_unit();
    int row = copies >> 16, chunk = copies & 0xffff;
#pragma unroll 1
    while (row < rows) {
      Group loaded[kAtOnce];
      int to[kAtOnce];
      FASTBPTT_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        const int lane = row / kGates, gate = row % kGates;
        to[i] = row < rows
                    ? lane * tiling.shared.x_stride + gate * tiling.gate_columns + chunk * kGroup
                    : -1;
        if (row >= rows) continue;
        loaded[i] = load_fresh(reinterpret_cast<const Group*>(from + row * team_units) + chunk);
        row += tiling.copy_rows, chunk += tiling.copy_chunks;
        if (chunk >= chunks) chunk -= chunks, ++row;
      }
      FASTBPTT_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        if (to[i] >= 0) *reinterpret_cast<Group*>(this->x(0) + to[i]) = loaded[i];
      }
    }
  }

  // The numbers of kGroup threads beside each other, for each of them.
  static __device__ Group gather(float value) {
    uint32_t word;
    int mask = 1;
    if constexpr (sizeof(x_t) == 2) {
      const float other = shuffle_xor(value, 1);
      const bool is_high = threadIdx.x & 1;
      word = Product::pack(is_high ? other : value, is_high ? value : other);
      mask = 2;
    } else {
      word = bits_of_float(Product::to_x(value));
    }
    const uint32_t second = shuffle_xor(word, mask);
    const bool is_second = threadIdx.x & unsigned(mask);
    const uint32_t low = is_second ? second : word, high = is_second ? word : second;
    const uint32_t other_low = shuffle_xor(low, 2 * mask), other_high = shuffle_xor(high, 2 * mask);
    if (threadIdx.x & unsigned(2 * mask)) return {other_low, other_high, low, high};
    return {low, high, other_low, other_high};
  }

  // --- Sums, backward --------------------------------------------------------------------------------

  __device__ float* partials(int step, int sender) const {
    return this->template at<float>(tiling.shared.partials) +
           (step % 2 * tiling.cluster + sender) * tiling.pairs();
  }

  // After the product for a step and a barrier of the block: what its columns add to the sums of the
  // cluster's units goes to the blocks that have them. Four rows at a time, whose unit has one owner.
  __device__ void send_sums(int step) const {
    if (is_alone()) return;
    if (threadIdx.x == 0) {
      const int numbers = tiling.cluster * tiling.pairs();
      barrier_arrive_expect_bytes(barrier(step), numbers * int(sizeof(float)));
    }
    const int lane = sends >> 12 & 15, first = 4 * (sends & 0xfff);
    const uint32_t counter = cluster_address(barrier(step));
    const uint32_t to = cluster_address(partials(step, rank()) + lane * tiling.units + first);
#pragma unroll 1
    for (int owner = sends >> 16; owner < tiling.cluster; owner += senders()) {
      const float* from =
          this->sums() + lane * tiling.shared.sum_stride + owner * tiling.units + first;
      Packed<float, 4> total = *reinterpret_cast<const Packed<float, 4>*>(from);
      for (int i = 1; i < tiling.column_warps; ++i) {
        from += tiling.lanes * tiling.shared.sum_stride;
        const auto more = *reinterpret_cast<const Packed<float, 4>*>(from);
        FASTBPTT_UNROLL
        for (int j = 0; j < 4; ++j) total.values[j] += more.values[j];
      }
      store_async(map_address(to, owner), total, map_address(counter, owner));
    }
  }

  // Until a step's sums are there.
  __device__ void collect(int step) const {
    if (!is_alone() && step > 0) barrier_wait(barrier(step), parity(step));
  }
  // That of the thread's pair: the blocks' in a fixed order.
  __device__ float sum(int step) const {
    if (step == 0) return 0;
    float total[1];
    if (is_alone()) {
      this->sums_of(0, total);
    } else {
      const float* from = partials(step, 0) + threadIdx.x;
      total[0] = *from;
#pragma unroll 4
      for (int i = 1; i < tiling.cluster; ++i) total[0] += from[i * tiling.pairs()];
    }
    return total[0];
  }
};

}  // namespace
}  // namespace fastbptt
