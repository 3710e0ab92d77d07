// A machine of warps that exchange through shared and global memory, and its exhaustive exploration:
// every interleaving of their operations, with every order in which asynchronous stores land.
//
// Memory is sequentially consistent: missing waits and barriers are found, not missing fences. An
// operation is a point in time: what happens while it lasts might as well happen before or after.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <stdexcept>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

using Cells = std::vector<int>;     // places in memory, one byte each
constexpr uint8_t kNothing = 0xff;  // what is in one before it is written

struct Operation {
  enum Kind { kRead, kWrite, kCopy, kSync, kAnnounce, kSend, kWaitBarrier, kRaise, kWaitFlags };
  Kind kind;
  std::string name;
  Cells cells{};    // that are read, written, copied to; flags; stores of kSend, by their number
  Cells from{};     // of kCopy
  int value = 0;    // to be read, written, waited for; bytes announced
  int barrier = 0;  // an mbarrier
};

// A st.async of one byte.
struct Store {
  int block, cell, value, barrier, phase;
};

struct Warp {
  int block;
  std::vector<Operation> program;
};

// What an mbarrier of one arrival a phase has in a state.
struct Barrier {
  uint8_t phase, arrivals;
  int8_t bytes;  // announced and not there, or less than 0
};

class Machine {
 public:
  // own: only warps of one block use them, and no stores.
  Cells allocate(int cells, bool own = false) {
    Cells result;
    for (int i = 0; i < cells; ++i) result.push_back(num_cells_++);
    own_.resize(size_t(num_cells_), own);
    return result;
  }
  int add_barrier() { return num_barriers_++; }
  std::vector<Operation>& add_warp(int block) {
    warps_.push_back({block, {}});
    return warps_.back().program;
  }
  int add_store(const Store& store) {
    stores_.push_back(store);
    return int(stores_.size()) - 1;
  }
  void preset(const Cells& cells, int value) {
    for (const int cell : cells) presets_.push_back({cell, value});
  }

  // True if nothing goes wrong.
  bool explore() {
    for (const Warp& warp : warps_) {  // a place in it is a byte, and so is a value
      if (warp.program.size() >= kNothing) throw std::length_error("a program is too long");
    }
    counted_ = count_stores();
    State first(size_t(num_cells_) + 3 * size_t(num_barriers_) + warps_.size(), 0);
    std::fill(first.begin(), first.begin() + num_cells_, char(kNothing));
    for (const auto& [cell, value] : presets_) first[size_t(cell)] = char(value);
    for (int i = 0; i < num_barriers_; ++i) set_barrier(first, i, {0, 1, 0});
    visit(std::move(first));
    while (!open_.empty() && fault_.empty()) {
      const State state = std::move(open_.back());
      open_.pop_back();
      if (step_independent(state)) continue;
      bool stuck = true;
      for (size_t i = fixed(); i < state.size() && fault_.empty(); i += 2) {
        stuck = false;
        land(state, i);
      }
      bool ended = true;
      for (size_t warp = 0; warp < warps_.size() && fault_.empty(); ++warp) {
        if (has_ended(state, warp)) continue;
        ended = false;
        stuck &= !step(state, warp);
      }
      if (stuck && !ended && fault_.empty()) fail("deadlock", state);
    }
    if (fault_.empty()) {
      std::printf("%zu states\n", seen_.size());
    } else {
      std::printf("%s\n", fault_.c_str());
    }
    return fault_.empty();
  }

 private:
  // Cells, barriers, each warp's next operation; then the numbers of the stores under way, sorted.
  using State = std::string;

  size_t fixed() const { return size_t(num_cells_) + 3 * size_t(num_barriers_) + warps_.size(); }
  uint8_t& place(State& state, size_t warp) const {
    return reinterpret_cast<uint8_t&>(state[fixed() - warps_.size() + warp]);
  }
  size_t place(const State& state, size_t warp) const {
    return uint8_t(state[fixed() - warps_.size() + warp]);
  }
  Barrier barrier(const State& state, int i) const {
    Barrier result;
    std::memcpy(&result, &state[size_t(num_cells_ + 3 * i)], 3);
    return result;
  }
  void set_barrier(State& state, int i, Barrier barrier) const {
    if (barrier.arrivals == 0 && barrier.bytes == 0) {
      barrier = {uint8_t(barrier.phase + 1), 1, 0};
    }
    std::memcpy(&state[size_t(num_cells_ + 3 * i)], &barrier, 3);
  }
  const Store& store_at(const State& state, size_t at) const {
    uint16_t number;
    std::memcpy(&number, &state[at], 2);
    return stores_[number];
  }
  bool has_ended(const State& state, size_t warp) const {
    return place(state, warp) == warps_[warp].program.size();
  }
  bool block_has_ended(const State& state, int block) const {
    for (size_t warp = 0; warp < warps_.size(); ++warp) {
      if (warps_[warp].block == block && !has_ended(state, warp)) return false;
    }
    return true;
  }

  void fail(const std::string& what, const State& state) {
    fault_ = what;
    for (size_t warp = 0; warp < warps_.size(); ++warp) {
      const std::string next =
          has_ended(state, warp) ? "ended" : warps_[warp].program[place(state, warp)].name;
      fault_ += "\n  block " + std::to_string(warps_[warp].block) + " warp " +
                std::to_string(warp) + ": " + next;
    }
  }

  // Looks for an operation or a store that can happen now and makes no difference to what all others
  // can do until it does, nor they to it: then no other order has to be looked at.
  bool step_independent(const State& state) {
    for (size_t warp = 0; warp < warps_.size(); ++warp) {
      if (is_independent(state, warp)) return step(state, warp);
    }
    for (size_t i = fixed(); i < state.size(); i += 2) {
      if (!is_independent(state, store_at(state, i))) continue;
      land(state, i);
      return true;
    }
    return false;
  }
  bool is_independent(const State& state, size_t warp) const {
    if (has_ended(state, warp)) return false;
    const Operation& op = warps_[warp].program[place(state, warp)];
    switch (op.kind) {
      case Operation::kSend:   // a store can land at any time afterwards
      case Operation::kRaise:  // flags only grow, and waits are for as much or more
        return true;
      case Operation::kWaitFlags: return can_pass(state, op);
      case Operation::kWaitBarrier:  // unless the next phase may be complete before it is seen
        return can_pass(state, op) && barrier(state, op.barrier).arrivals > 0 &&
               !others_may(state, warp, [&](const Operation& other) {
                 return other.kind == Operation::kAnnounce && other.barrier == op.barrier;
               });
      case Operation::kRead:
      case Operation::kWrite:
        return own_[size_t(op.cells[0])] && !others_may(state, warp, [&](const Operation& other) {
                 return (op.kind != Operation::kRead || other.kind != Operation::kRead) &&
                        std::find_first_of(other.cells.begin(), other.cells.end(), op.cells.begin(),
                                           op.cells.end()) != other.cells.end();
               });
      default: return false;
    }
  }
  // A store that is not the last of its phase, which cannot be complete without it, to a block whose
  // warps all wait for that phase before they use the place.
  bool is_independent(const State& state, const Store& store) const {
    const Barrier now = barrier(state, store.barrier);
    if (!counted_ || now.phase != store.phase || (now.arrivals == 0 && now.bytes == 1))
      return false;
    for (size_t warp = 0; warp < warps_.size(); ++warp) {
      if (warps_[warp].block != store.block) continue;
      const auto& program = warps_[warp].program;
      bool waits = false;
      for (size_t i = place(state, warp); i < program.size() && !waits; ++i) {
        const Operation& op = program[i];
        if (op.kind == Operation::kSend) continue;
        waits = op.kind == Operation::kWaitBarrier && op.barrier == store.barrier &&
                op.value % 2 == store.phase % 2;
        if (std::count(op.cells.begin(), op.cells.end(), store.cell) > 0) return false;
      }
      if (!waits) return false;
    }
    return true;
  }
  // Whether as many bytes are announced in each phase of each barrier as are sent for it.
  bool count_stores() const {
    std::map<std::pair<int, int>, int> sent;
    for (const Store& store : stores_) ++sent[{store.barrier, store.phase}];
    std::map<int, int> phases;
    for (const Warp& warp : warps_) {
      for (const Operation& op : warp.program) {
        if (op.kind != Operation::kAnnounce) continue;
        const auto found = sent.find({op.barrier, phases[op.barrier]++});
        if (found == sent.end() || found->second != op.value) return false;
        sent.erase(found);
      }
    }
    return sent.empty();
  }

  // Whether another warp of the block has such an operation before its next sync, beyond which it
  // cannot get before this one does.
  template <typename Condition>
  bool others_may(const State& state, size_t warp, const Condition& condition) const {
    for (size_t other = 0; other < warps_.size(); ++other) {
      if (other == warp || warps_[other].block != warps_[warp].block) continue;
      const auto& program = warps_[other].program;
      for (size_t i = place(state, other); i < program.size(); ++i) {
        if (program[i].kind == Operation::kSync) break;
        if (condition(program[i])) return true;
      }
    }
    return false;
  }
  bool can_pass(const State& state, const Operation& op) const {
    if (op.kind == Operation::kWaitBarrier) {  // of the phase only the parity is known
      return barrier(state, op.barrier).phase % 2 != op.value % 2;
    }
    return std::all_of(op.cells.begin(), op.cells.end(),
                       [&](int flag) { return uint8_t(state[size_t(flag)]) >= op.value; });
  }

  // A block whose warps are all at a barrier goes on. No order of arrivals makes a difference.
  void sync_blocks(State& state) const {
    for (size_t first = 0; first < warps_.size();) {
      size_t end = first;
      bool all = true;
      for (; end < warps_.size() && warps_[end].block == warps_[first].block; ++end) {
        all &= !has_ended(state, end) &&
               warps_[end].program[place(state, end)].kind == Operation::kSync;
      }
      if (all) {
        for (size_t warp = first; warp < end; ++warp) ++place(state, warp);
      } else {
        first = end;
      }
    }
  }

  void visit(State&& state) {
    sync_blocks(state);
    if (const size_t bytes = state.size() - fixed(); bytes > 0) {
      std::vector<uint16_t> stores(bytes / sizeof(uint16_t));
      std::memcpy(stores.data(), &state[fixed()], bytes);
      std::sort(stores.begin(), stores.end());
      std::memcpy(&state[fixed()], stores.data(), bytes);
    }
    if (seen_.insert(state).second) open_.push_back(std::move(state));
  }

  void land(const State& state, size_t at) {
    const Store& store = store_at(state, at);
    if (block_has_ended(state, store.block)) return fail("a store lands in an ended block", state);
    Barrier now = barrier(state, store.barrier);
    if (now.phase != store.phase) return fail("a store lands in another phase", state);
    State next = state;
    next.erase(at, 2);
    next[size_t(store.cell)] = char(store.value);
    --now.bytes;
    set_barrier(next, store.barrier, now);
    visit(std::move(next));
  }

  // False if the warp's next operation cannot happen yet.
  bool step(const State& state, size_t warp) {
    const Operation& op = warps_[warp].program[place(state, warp)];
    const auto at = [&](int cell) { return uint8_t(state[size_t(cell)]); };
    State next = state;
    ++place(next, warp);
    switch (op.kind) {
      case Operation::kSync: return false;
      case Operation::kWaitFlags:
      case Operation::kWaitBarrier:
        if (!can_pass(state, op)) return false;
        break;
      case Operation::kRead:
        for (const int cell : op.cells) {
          if (at(cell) == op.value) continue;
          fail(op.name + " reads " + (at(cell) == kNothing ? "nothing" : std::to_string(at(cell))) +
                   " for " + std::to_string(op.value),
               state);
          return true;
        }
        break;
      case Operation::kWrite:
      case Operation::kRaise:
        for (const int cell : op.cells) next[size_t(cell)] = char(op.value);
        break;
      case Operation::kCopy:
        for (size_t i = 0; i < op.cells.size(); ++i) {
          next[size_t(op.cells[i])] = state[size_t(op.from[i])];
        }
        break;
      case Operation::kAnnounce: {
        Barrier now = barrier(state, op.barrier);
        if (now.arrivals == 0) {
          fail("two arrivals in a phase", state);
          return true;
        }
        --now.arrivals;
        now.bytes = int8_t(now.bytes + op.value);
        set_barrier(next, op.barrier, now);
        break;
      }
      case Operation::kSend:
        for (const int number : op.cells) {
          const auto store = uint16_t(number);
          next.append(reinterpret_cast<const char*>(&store), 2);
        }
        break;
    }
    visit(std::move(next));
    return true;
  }

  int num_cells_ = 0, num_barriers_ = 0;
  std::vector<bool> own_;  // [cell]
  bool counted_ = false;
  std::deque<Warp> warps_;  // a block's stand together
  std::vector<Store> stores_;
  std::vector<std::pair<int, int>> presets_;
  std::unordered_set<State> seen_;
  std::vector<State> open_;
  std::string fault_;
};
