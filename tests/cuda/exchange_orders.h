// The exhaustive exploration of a machine: every order of its warps' operations, and of when
// asynchronous stores and copies land.
#pragma once

#include <unordered_set>

#include "exchange_machine.h"

class Orders {
 public:
  explicit Orders(const Machine& machine) : machine_(machine) { count(); }

  // How many states were looked at. Throws a Fault if something goes wrong in one of the orders. Of
  // orders that cannot make a difference only one is looked at; all of them if every_order.
  size_t explore(bool every_order) const {
    std::vector<State> open{machine_.first_state()};
    std::unordered_set<std::string> seen;
    size_t states = 0;
    while (!open.empty()) {
      State state = std::move(open.back());
      open.pop_back();
      while (!every_order && step_independent(state)) ++states;
      if (!seen.insert(state.key()).second) continue;
      ++states;
      bool ended = true, stuck = state.stores.empty();
      for (size_t i = 0; i < state.stores.size(); ++i) machine_.land(open.emplace_back(state), i);
      for (size_t warp = 0; warp < machine_.warps.size(); ++warp) {
        ended &= machine_.has_ended(state, warp);
        if (!machine_.can_step(state, warp)) continue;
        stuck = false;
        machine_.step(open.emplace_back(state), warp);
      }
      if (stuck && !ended) machine_.fail("deadlock", state);
    }
    return states;
  }

 private:
  using Places = Machine::Places;

  // Does something that can happen now and that commutes with all that can happen until it does: no
  // order in which it comes later has to be looked at. False if there is nothing of the kind.
  bool step_independent(State& state) const {
    for (size_t warp = 0; warp < machine_.warps.size(); ++warp) {
      if (!machine_.can_step(state, warp) || !is_independent(state, warp)) continue;
      machine_.step(state, warp);
      return true;
    }
    for (size_t i = 0; i < state.stores.size(); ++i) {
      if (!is_independent(state, state.stores[i])) continue;
      machine_.land(state, i);
      return true;
    }
    return false;
  }

  bool is_independent(const State& state, size_t warp) const {
    const Operation& op = machine_.next(state, warp);
    switch (op.kind) {
      case Operation::kSend:       // it lands at any time afterwards
      case Operation::kAddToFlag:  // flags only grow, and waits are for as much or more
      case Operation::kWaitFlag:
      case Operation::kWaitCopies: return true;
      default: break;
    }
    Barrier barrier;
    if (op.barrier != kNone) barrier = state.barriers[size_t(op.barrier)];
    if (op.kind != Operation::kInit && barrier.arrivals == 0) return false;  // its phase may end
    const auto of_operation = [&](const Operation& other) {
      if (op.kind == Operation::kRead || op.kind == Operation::kWrite) {
        const bool both_read = op.kind == Operation::kRead && other.kind == Operation::kRead;
        return !both_read &&
               std::find_first_of(op.cells.begin(), op.cells.end(), other.cells.begin(),
                                  other.cells.end()) != op.cells.end();
      }
      if (other.barrier != op.barrier) return false;
      if (other.kind == Operation::kWaitBarrier) {
        return op.kind == Operation::kInit ||
               (op.kind == Operation::kAnnounce && machine_.is_over(barrier, other));
      }
      return true;  // kInit, kAnnounce
    };
    const auto of_store = [&](const Store& store) {
      switch (op.kind) {
        case Operation::kInit: return store.barrier == op.barrier;
        case Operation::kAnnounce:
          return store.barrier == op.barrier && store.phase != barrier.phase;
        case Operation::kWaitBarrier: return false;  // no phase ends without an announcement
        default: return std::count(op.cells.begin(), op.cells.end(), store.cell) > 0;
      }
    };
    return !meets(state, reach(state, int(warp), kNone), kNone, of_operation, of_store);
  }

  bool is_independent(const State& state, int number) const {
    const Store& store = machine_.stores[size_t(number)];
    const bool is_counted = store.barrier != kNone;
    Barrier barrier;
    if (is_counted) barrier = state.barriers[size_t(store.barrier)];
    // Without it the phase cannot end if no more bytes are announced than are sent.
    if (is_counted && (!counted_ || barrier.phase != store.phase)) return false;
    const Places places = reach(state, kNone, number);
    if (machine_.block_has_ended(places, store.block)) return false;
    const auto of_operation = [&](const Operation& other) {
      if (is_counted && other.barrier == store.barrier) {
        if (other.kind == Operation::kWaitBarrier) return machine_.is_over(barrier, other);
        return other.kind != Operation::kAnnounce || barrier.arrivals == 0;
      }
      return std::count(other.cells.begin(), other.cells.end(), store.cell) > 0;
    };
    const auto of_store = [&](const Store& other) { return other.cell == store.cell; };
    return !meets(state, places, number, of_operation, of_store);
  }

  // Whether there is such an operation between where the warps are and the places, or such a store
  // under way or sent there.
  template <typename OfOperation, typename OfStore>
  bool meets(const State& state, const Places& places, int except, const OfOperation& of_operation,
             const OfStore& of_store) const {
    for (const uint16_t number : state.stores) {
      if (number != except && of_store(machine_.stores[number])) return true;
    }
    for (size_t warp = 0; warp < machine_.warps.size(); ++warp) {
      for (size_t i = state.places[warp]; i < places[warp]; ++i) {
        const Operation& op = machine_.warps[warp].program[i];
        if (of_operation(op)) return true;
        for (const int number : op.sent) {
          if (of_store(machine_.stores[size_t(number)])) return true;
        }
      }
    }
    return false;
  }

  // How far the warps can get, at most, while one of them, or a store under way, stays where it is.
  Places reach(const State& state, int still_warp, int still_store) const {
    Places places = state.places;
    std::vector<uint8_t> cells = state.cells;  // the flags among them
    const auto may_pass = [&](size_t warp, const Operation& op) {
      switch (op.kind) {
        case Operation::kSync:
        case Operation::kSyncCluster: return false;
        case Operation::kWaitFlag: return cells[size_t(op.cells[0])] >= op.value;
        case Operation::kWaitCopies:
          return still_store == kNone || !machine_.is_copy_of(still_store, warp, op.value);
        case Operation::kWaitBarrier: {
          const Barrier& barrier = state.barriers[size_t(op.barrier)];
          if (!counted_ || machine_.is_over(barrier, op)) return true;
          if (still_store != kNone && machine_.stores[size_t(still_store)].barrier == op.barrier &&
              machine_.stores[size_t(still_store)].phase == barrier.phase)
            return false;
          const auto needs = needs_.find({op.barrier, barrier.phase});
          if (needs == needs_.end()) return true;
          return std::all_of(needs->second.begin(), needs->second.end(),
                             [&](const auto& need) { return places[need.first] > need.second; });
        }
        default: return true;
      }
    };
    for (bool moved = true; moved;) {
      moved = machine_.sync(places);
      for (size_t warp = 0; warp < machine_.warps.size(); ++warp) {
        if (int(warp) == still_warp) continue;
        const auto& program = machine_.warps[warp].program;
        for (; places[warp] < program.size(); ++places[warp]) {
          const Operation& op = program[places[warp]];
          if (!may_pass(warp, op)) break;
          if (op.kind == Operation::kAddToFlag) ++cells[size_t(op.cells[0])];
          moved = true;
        }
      }
    }
    return places;
  }

  void count() {
    std::map<std::pair<int, int>, int> missing;  // bytes announced, less those sent
    std::map<int, int> phases;
    for (size_t warp = 0; warp < machine_.warps.size(); ++warp) {
      const auto& program = machine_.warps[warp].program;
      if (program.size() >= 1 << 16) throw std::length_error("a program is too long");
      for (size_t i = 0; i < program.size(); ++i) {
        if (program[i].kind == Operation::kAnnounce) {
          const std::pair<int, int> of{program[i].barrier, phases[program[i].barrier]++};
          missing[of] += program[i].value;
          needs_[of].push_back({warp, i});
        }
        for (const int number : program[i].sent) {
          const Store& store = machine_.stores[size_t(number)];
          if (store.barrier == kNone) continue;
          --missing[{store.barrier, store.phase}];
          needs_[{store.barrier, store.phase}].push_back({warp, i});
        }
      }
    }
    counted_ = std::all_of(missing.begin(), missing.end(),
                           [](const auto& phase) { return phase.second == 0; });
  }

  const Machine& machine_;
  // Whether as many bytes are announced in each phase of each barrier as are sent for it.
  bool counted_ = false;
  // [barrier, phase]: the operations, of a warp, without which it does not end.
  std::map<std::pair<int, int>, std::vector<std::pair<size_t, size_t>>> needs_;
};
