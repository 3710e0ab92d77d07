// A machine of warps that exchange through shared and global memory.
//
// Memory is sequentially consistent: missing waits and barriers are found, not missing fences. An
// operation is a point in time: what happens while it lasts might as well happen before or after. A
// warp stands for any thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

using Cells = std::vector<int>;     // places in memory, one byte each
constexpr uint8_t kNothing = 0xff;  // what is in one before it is written
constexpr int kNone = -1;

struct Operation {
  enum Kind {
    kRead,
    kWrite,
    kSync,
    kSyncCluster,
    kInit,
    kAnnounce,
    kWaitBarrier,
    kSend,
    kWaitCopies,
    kAddToFlag,
    kWaitFlag
  };
  Kind kind;
  std::string name;
  Cells cells{};            // that are read or written; the flag
  int value = 0;            // to be read, written, waited for; bytes announced; groups of copies
  int barrier = kNone;      // an mbarrier
  std::vector<int> sent{};  // stores of kSend, by their number
};

// What lands some time after it was sent: a st.async of one byte, which an mbarrier counts in a
// phase, or a cp.async among a warp's groups of those.
struct Store {
  std::string name;
  int block, cell, value;
  int barrier = kNone, phase = 0;
  int warp = kNone, group = 0;
};

struct Warp {
  int cluster, block;
  std::vector<Operation> program;
};

// An mbarrier of one arrival a phase. Before it is initialized it is in none.
struct Barrier {
  uint8_t phase = kNothing, arrivals = 1;  // that are awaited
  int8_t bytes = 0;                        // announced and not there, or less than 0
};

struct State {
  std::vector<uint8_t> cells;
  std::vector<Barrier> barriers;
  std::vector<uint16_t> places;  // each warp's next operation
  std::vector<uint16_t> stores;  // under way, by their number, sorted

  std::string key() const {
    std::string result;
    const auto add = [&](const auto& part) {
      result.append(reinterpret_cast<const char*>(part.data()), part.size() * sizeof(part[0]));
    };
    add(cells), add(barriers), add(places), add(stores);
    return result;
  }
};

// Something has gone wrong: what, and where the warps are then.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Machine {
 public:
  using Places = std::vector<uint16_t>;

  // --- What there is -----------------------------------------------------------------------------

  Cells allocate(int cells) {
    Cells result;
    for (int i = 0; i < cells; ++i) result.push_back(num_cells_++);
    return result;
  }
  int add_barrier() { return num_barriers_++; }
  // A block's stand together, and so do a cluster's.
  int add_warp(int cluster, int block) {
    const size_t number = warps.size();
    warps.push_back({cluster, block, {}});
    crowds_[{Operation::kSync, block}].push_back(number);
    crowds_[{Operation::kSyncCluster, cluster}].push_back(number);
    return int(number);
  }
  std::vector<Operation>& program(int warp) { return warps[size_t(warp)].program; }
  int add_store(const Store& store) {
    stores.push_back(store);
    return int(stores.size()) - 1;
  }
  void preset(const Cells& cells, int value) {
    for (const int cell : cells) presets_.push_back({cell, value});
  }

  std::deque<Warp> warps;
  std::vector<Store> stores;

  // --- What happens ------------------------------------------------------------------------------

  State first_state() const {
    State state;
    state.cells.resize(size_t(num_cells_), kNothing);
    for (const auto& [cell, value] : presets_) state.cells[size_t(cell)] = uint8_t(value);
    state.barriers.resize(size_t(num_barriers_));
    state.places.resize(warps.size());
    sync(state.places);
    return state;
  }
  bool has_ended(const State& state, size_t warp) const {
    return state.places[warp] == warps[warp].program.size();
  }
  const Operation& next(const State& state, size_t warp) const {
    return warps[warp].program[state.places[warp]];
  }
  bool block_has_ended(const Places& places, int block) const {
    for (size_t warp = 0; warp < warps.size(); ++warp) {
      const Warp& of = warps[warp];
      if (of.block == block && places[warp] < of.program.size()) return false;
    }
    return true;
  }
  bool is_copy_of(int store, size_t warp, int groups) const {
    return stores[size_t(store)].warp == int(warp) && stores[size_t(store)].group < groups;
  }
  // Of the phase that is waited for only the parity is known.
  static bool is_over(const Barrier& barrier, const Operation& wait) {
    return barrier.phase % 2 != wait.value % 2;
  }

  bool can_step(const State& state, size_t warp) const {
    if (has_ended(state, warp)) return false;
    const Operation& op = next(state, warp);
    switch (op.kind) {
      case Operation::kSync:
      case Operation::kSyncCluster: return false;  // goes on with all the others
      case Operation::kWaitBarrier: return is_over(state.barriers[size_t(op.barrier)], op);
      case Operation::kWaitFlag: return state.cells[size_t(op.cells[0])] >= op.value;
      case Operation::kWaitCopies:
        return std::none_of(state.stores.begin(), state.stores.end(),
                            [&](int store) { return is_copy_of(store, warp, op.value); });
      default: return true;
    }
  }

  void step(State& state, size_t warp) const {
    const Operation& op = next(state, warp);
    switch (op.kind) {
      case Operation::kRead:
        for (const int cell : op.cells) {
          const int found = state.cells[size_t(cell)];
          if (found == op.value) continue;
          const std::string it = found == kNothing ? "nothing" : std::to_string(found);
          fail(op.name + " reads " + it + " for " + std::to_string(op.value), state);
        }
        break;
      case Operation::kWrite:
        for (const int cell : op.cells) state.cells[size_t(cell)] = uint8_t(op.value);
        break;
      case Operation::kAddToFlag: ++state.cells[size_t(op.cells[0])]; break;
      case Operation::kInit: state.barriers[size_t(op.barrier)] = {0, 1, 0}; break;
      case Operation::kAnnounce: {
        Barrier& barrier = state.barriers[size_t(op.barrier)];
        if (barrier.arrivals == 0) fail("two arrivals in a phase", state);
        --barrier.arrivals;
        barrier.bytes = int8_t(barrier.bytes + op.value);
        end_phase(barrier);
        break;
      }
      case Operation::kSend:
        state.stores.insert(state.stores.end(), op.sent.begin(), op.sent.end());
        std::sort(state.stores.begin(), state.stores.end());
        break;
      default: break;
    }
    ++state.places[warp];
    sync(state.places);
  }

  void land(State& state, size_t at) const {
    const Store& store = stores[state.stores[at]];
    if (block_has_ended(state.places, store.block)) {
      fail(store.name + " lands in an ended block", state);
    }
    if (store.barrier != kNone) {
      Barrier& barrier = state.barriers[size_t(store.barrier)];
      if (barrier.phase != store.phase) fail(store.name + " lands in another phase", state);
      --barrier.bytes;
      end_phase(barrier);
    }
    state.cells[size_t(store.cell)] = uint8_t(store.value);
    state.stores.erase(state.stores.begin() + std::ptrdiff_t(at));
  }

  // Blocks and clusters whose warps are all at a barrier go on: no order of arrivals makes a
  // difference. True if one did.
  bool sync(Places& places) const {
    bool any = false;
    for (bool passed = true; passed;) {
      passed = false;
      for (const auto& [of, crowd] : crowds_) {
        const auto kind = of.first;
        const bool all = std::all_of(crowd.begin(), crowd.end(), [&](size_t warp) {
          const auto& program = warps[warp].program;
          return places[warp] < program.size() && program[places[warp]].kind == kind;
        });
        if (!all) continue;
        for (const size_t warp : crowd) ++places[warp];
        passed = any = true;
      }
    }
    return any;
  }

  [[noreturn]] void fail(std::string what, const State& state) const {
    for (size_t warp = 0; warp < warps.size(); ++warp) {
      what += "\n  block " + std::to_string(warps[warp].block) + " warp " + std::to_string(warp) +
              ": " + (has_ended(state, warp) ? "ended" : next(state, warp).name);
    }
    throw Fault(what);
  }

 private:
  static void end_phase(Barrier& barrier) {
    if (barrier.arrivals == 0 && barrier.bytes == 0) barrier = {uint8_t(barrier.phase + 1), 1, 0};
  }

  int num_cells_ = 0, num_barriers_ = 0;
  std::vector<std::pair<int, int>> presets_;
  // Warps that wait for each other: of a block or a cluster.
  std::map<std::pair<Operation::Kind, int>, std::vector<size_t>> crowds_;
};
