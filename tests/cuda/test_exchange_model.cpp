// What the warps of the persistent kernels do for each other, in the order and by the names that
// csrc/cuda/persistent.cuh has; with the buffers that csrc/cuda/tiling.h gives them.
//
//   exchange_model KERNEL CLUSTERS BLOCKS WARPS PAIRS GROUPS STEPS AHEAD PLACES [CHANGE...]
//
// KERNEL: forward, backward, grid-forward or grid-backward. BLOCKS: of a cluster. WARPS: of a
// block; PAIRS of them have a pair of a unit and a lane. AHEAD, PLACES: for kAhead and kPlaceSteps.
// Prints how many states there are, or how something goes wrong and where all warps are then; exits
// with 0 or 2. A change makes the protocol another one, in most cases a wrong one; "every order"
// looks at those orders too that cannot make a difference.
#include <cstdio>
#include <set>

#include "cuda/tiling.h"
#include "exchange_orders.h"

std::set<std::string> changes, known_changes;

bool changed(const std::string& name) {
  known_changes.insert(name);
  return changes.count(name) > 0;
}

struct Sizes {
  int clusters, blocks, warps, pairs, groups, steps, ahead, places;
};

// What a block has in shared memory.
struct Block {
  std::vector<Cells> x, sums;                // [buffer][column], [buffer][warp]
  std::vector<std::vector<Cells>> partials;  // [group][buffer][sender's pair]
  std::vector<std::vector<int>> barriers;    // [group][buffer]
  std::vector<Cells> inputs;                 // [slot][pair]
  std::vector<Cells> places;                 // [group][slot]
};

// The same for all.
struct Memory {
  std::vector<Block> blocks;
  std::vector<std::vector<Cells>> x;  // [group][buffer][unit of the team], in global memory
  std::vector<Cells> flags;           // [group][block]
};

struct Kernel {
  Sizes sizes;
  bool is_grid, is_backward;

  int team() const { return sizes.clusters * sizes.blocks; }
  bool is_alone() const { return sizes.blocks == 1; }
  // Columns of the product that a block has.
  int columns() const { return (is_backward ? sizes.clusters : team()) * sizes.pairs; }
  int slots() const { return sizes.ahead + fastbptt::kRing - fastbptt::kAhead - slots_fewer(); }
  static int slots_fewer() { return changed("one slot of inputs fewer"); }
  int place_slots() const { return (changed("places of one time only") ? 1 : 2) * sizes.places; }
  fastbptt::SharedLayout layout() const {
    fastbptt::Tiling tiling{};
    tiling.clusters = sizes.clusters;
    tiling.cluster = sizes.blocks;
    tiling.groups = sizes.groups;
    tiling.is_grid = is_grid;
    const auto arithmetic = fastbptt::Arithmetic::kTensor16;
    return fastbptt::shared_layout({arithmetic, 0, 1, is_backward, 0, 0}, tiling);
  }

  Memory allocate(Machine& machine) const {
    Memory memory;
    const auto rows = [&](int count, int cells) {
      std::vector<Cells> result;
      for (int i = 0; i < count; ++i) result.push_back(machine.allocate(cells));
      return result;
    };
    const fastbptt::SharedLayout shared = layout();
    for (int i = 0; i < team(); ++i) {
      Block block;
      block.x = rows(shared.x_buffers, columns());
      block.sums = rows(shared.sum_buffers, sizes.warps);
      block.inputs = rows(slots(), sizes.pairs);
      block.places = rows(sizes.groups, place_slots());
      for (int group = 0; group < sizes.groups; ++group) {
        block.partials.push_back(rows(2, sizes.blocks * sizes.pairs));
        block.barriers.push_back({machine.add_barrier(), machine.add_barrier()});
      }
      memory.blocks.push_back(block);
    }
    for (int group = 0; group < sizes.groups; ++group) {
      memory.x.push_back(rows(2, team() * sizes.pairs));
      memory.flags.push_back(machine.allocate(team()));
      machine.preset(memory.flags[group], 0);
    }
    return memory;
  }
};

// The program of one warp, an operation after another.
class Program : Kernel {
 public:
  Program(Machine& machine, const Kernel& kernel, const Memory& memory, int block, int warp)
      : Kernel(kernel),
        machine_(machine),
        memory_(memory),
        own_(memory.blocks[block]),
        block_(block),
        rank_(block % sizes.blocks),
        warp_(warp),
        number_(machine.add_warp(block / sizes.blocks, block)) {
    if (is_backward) {
      backward();
    } else {
      forward();
    }
  }

 private:
  static constexpr int kZero = 0xfe;  // what padding is

  // --- The kernels -------------------------------------------------------------------------------

  void forward() {
    start();
    for (int turn = 0; turn < sizes.ahead; ++turn) fetch(turn);
    int turn = 0;
    for (int step = 0; step < sizes.steps; ++step) {
      const bool is_last = step + 1 == sizes.steps;
      const bool sends = !is_last || changed("push at the last step");
      for (int group = 0; group < sizes.groups; ++group, ++turn) {
        at(step, group);
        receive(group, step);
        if (changed("fetch before the barrier")) fetch(turn + sizes.ahead);
        multiply(group, step, [&] {
          if (changed("push before all have read") && sends) push(group, step + 1);
        });
        const bool is_behind = changed("inputs waited for behind the barrier");
        const int except = sizes.ahead - 1 + later();
        if (!is_behind) wait_copies("wait for inputs", except);
        sync("sync after the product");
        if (is_behind) wait_copies("wait for inputs", except);
        if (sends) announce(group, step + 1, columns());
        if (has_pair()) {
          read("a place", {place(group, step)}, step);
          read("inputs", {input(turn, warp_)}, turn);
          read("sums", sums(group), value(group, step));
        }
        if (sends && !changed("push before all have read")) push(group, step + 1);
        if (is_grid) publish(group, step + 1, is_last);
        if (step % sizes.places == 0) compute_places(group, step + sizes.places);
        if (!changed("fetch before the barrier")) fetch(turn + sizes.ahead);
      }
    }
  }

  void backward() {
    start();
    if (is_grid) fill(0, kZero);
    for (int turn = 0; turn < sizes.ahead; ++turn) fetch(turn);
    wait_copies("wait for the first inputs", sizes.ahead - 1);
    sync("sync after the first inputs");
    for (int k = 0; k < sizes.steps; ++k) {
      const bool multiplies = k + 1 < sizes.steps || changed("sums sent at the last step");
      const bool is_late = is_grid && !changed("each group's product behind its cell");
      for (int group = 0; group < sizes.groups; ++group) {
        compute(group, k);
        if (!is_late && multiplies) multiply_and_send(group, k + 1);
      }
      for (int group = 0; is_late && multiplies && group < sizes.groups; ++group) {
        multiply_and_send(group, k + 1);
      }
    }
  }

  void compute(int group, int k) {
    const bool is_last = k + 1 == sizes.steps && !changed("sums sent at the last step");
    const int turn = k * sizes.groups + group;
    at(k, group);
    collect(group, k);
    if (has_pair()) {
      const Cells& sent = is_alone() ? sums(group) : own_.partials[group][buffer_of(k)];
      read("a place", {place(group, k)}, k);
      read("inputs", {input(turn, warp_)}, turn);
      if (k > 0) read(is_alone() ? "sums" : "partial sums", sent, value(group, k));
      if (!is_last) put(group, k + 1);
    }
    if (changed("fetch before the barrier")) fetch(turn + sizes.ahead);
    const bool is_behind = changed("inputs waited for behind the barrier");
    const int except = sizes.ahead - 2 + later();
    if (!is_behind) wait_copies("wait for inputs", except);
    publish(group, k + 1, is_last);
    if (is_behind) wait_copies("wait for inputs", except);
    if (has_pair()) read("a place to store by", {place(group, k)}, k);
    if (k % sizes.places == 0) compute_places(group, k + sizes.places);
    if (!changed("fetch before the barrier")) fetch(turn + sizes.ahead);
  }

  void multiply_and_send(int group, int k) {
    at(k, group);
    receive(group, k);
    multiply(group, k, [&] {
      if (changed("send before all have added")) send_sums(group, k);
    });
    sync("sync after the product");
    if (!changed("send before all have added")) send_sums(group, k);
  }

  // --- exchange.cuh ------------------------------------------------------------------------------

  // Of x, sums and partial sums.
  int value(int group, int step) const { return step * sizes.groups + group; }
  // Mbarriers and what they belong to. Step 0 has none.
  static bool is_single() { return changed("one buffer at a time"); }
  static int buffer_of(int step) { return is_single() ? 0 : step % 2; }
  static int global_buffer(int step) { return changed("one buffer of x") ? 0 : step % 2; }
  static int phase(int step) { return is_single() ? step - 1 : (step - 1) / 2; }
  int barrier(int group, int step) const { return own_.barriers[group][buffer_of(step)]; }
  int x_buffer(int group, int step) const {
    if (is_grid) return 0;
    if (is_backward) return changed("x shared by the groups") ? 0 : group;
    return is_alone() ? group : group * 2 + buffer_of(step);
  }

  void start() {
    where_ = " (at the start)";
    if (!is_alone() && warp_ == 0) {
      for (const auto& of_group : own_.barriers) {
        for (const int barrier : of_group) add(Operation::kInit, "initialize", {}, 0, barrier);
      }
    }
    for (int group = 0; group < sizes.groups; ++group) {
      compute_places(group, 0);
      if (is_grid) continue;
      fill(x_buffer(group, 0), is_backward ? kZero : value(group, 0));
      if (x_buffer(group, 1) != x_buffer(group, 0)) fill(x_buffer(group, 1), kZero);
    }
    if (is_alone() || changed("no cluster barrier at the start")) {
      sync("sync at the start");
    } else {
      add(Operation::kSyncCluster, "cluster barrier at the start");
    }
  }
  void fill(int buffer, int with) { write("fill x", mine(own_.x.at(buffer)), with); }

  void receive(int group, int step) {
    if (is_grid) {
      if (step == 0) {
        fill(0, value(group, 0));
      } else {
        Cells flags = memory_.flags[group];
        if (changed("no wait for the last block's flag")) flags.pop_back();
        if (!changed("each warp waits for all flags")) flags = mine(flags);
        add(Operation::kWaitFlags, "wait for flags", flags, step);
        sync("sync after the flags");
        copy_x(group, step);
      }
      sync("sync after the copy");
    } else if (step > 0 && !is_backward) {
      if (is_alone()) return sync("sync before x");
      if (changed("no wait for x")) return;
      add(Operation::kWaitBarrier, "wait for x", {}, phase(step), barrier(group, step));
    }
  }
  void copy_x(int group, int step) {
    const int first = is_backward ? rank_ * columns() : 0;
    const Cells& all = memory_.x[group][global_buffer(step)];
    const Cells own(all.begin() + first, all.begin() + first + columns());
    read("global x", mine(own), value(group, step));
    write("copy x", mine(own_.x.at(0)), value(group, step));
  }

  void announce(int group, int step, int bytes) {
    if (warp_ > 0 || is_alone() || (is_grid && !is_backward)) return;
    if (changed("no announcement")) return;
    add(Operation::kAnnounce, "announce", {}, bytes, barrier(group, step));
  }
  void push(int group, int step) {
    if (!has_pair()) return;
    if (is_grid || is_alone()) return put(group, step);
    std::vector<int> sent;
    for (int peer = block_ - rank_; peer < block_ - rank_ + sizes.blocks; ++peer) {
      const Block& to = memory_.blocks[peer];
      const int cell = to.x.at(x_buffer(group, step))[rank_ * sizes.pairs + warp_];
      sent.push_back(store("push", peer, cell, group, step));
    }
    send("push", sent);
  }
  void put(int group, int step) {
    if (is_grid) {
      const Cells& x = memory_.x[group][global_buffer(step)];
      return write("global x", {x[block_ * sizes.pairs + warp_]}, value(group, step));
    }
    write("x", {own_.x.at(x_buffer(group, step))[warp_]}, value(group, step));
  }
  void publish(int group, int step, bool is_last) {
    const bool raises = is_grid && !is_last && warp_ == 0;
    const auto raise = [&] {
      if (raises) add(Operation::kRaise, "raise the flag", {memory_.flags[group][block_]}, step);
    };
    const bool is_early = changed("flag before the barrier");
    if (is_early) raise();
    sync("sync to publish");
    if (!is_early) raise();
  }

  void collect(int group, int step) {
    if (is_alone() || step == 0 || changed("no wait for partial sums")) return;
    add(Operation::kWaitBarrier, "wait for partial sums", {}, phase(step), barrier(group, step));
  }
  void send_sums(int group, int step) {
    if (is_alone()) return;
    announce(group, step, sizes.blocks * sizes.pairs);
    if (!has_pair()) return;
    read("sums", sums(group), value(group, step));
    std::vector<int> sent;
    for (int owner = block_ - rank_; owner < block_ - rank_ + sizes.blocks; ++owner) {
      const Cells& to = memory_.blocks[owner].partials[group][buffer_of(step)];
      sent.push_back(store("partial sum", owner, to[rank_ * sizes.pairs + warp_], group, step));
    }
    send("send partial sums", sent);
  }

  // --- on_chip.cuh -------------------------------------------------------------------------------

  const Cells& sums(int group) const {
    const bool is_one = own_.sums.size() == 1 || changed("sums shared by the groups");
    return own_.sums.at(is_one ? 0 : group);
  }
  int input(int turn, int warp) const { return own_.inputs[turn % slots()][warp]; }
  int place(int group, int step) const { return own_.places[group][step % place_slots()]; }

  void compute_places(int group, int first) {
    for (int i = warp_; i < sizes.places; i += sizes.warps) {
      write("compute a place", {place(group, first + i)}, first + i);
    }
  }
  // A thread copies for another one.
  void fetch(int turn) {
    const int step = turn / sizes.groups, group = turn % sizes.groups;
    if (step < sizes.steps && has_pair()) {
      read("a place to fetch by", {place(group, step)}, step);
      Store copy{"fetch" + where_, block_, input(turn, (warp_ + 1) % sizes.pairs), turn};
      copy.warp = number_;
      copy.group = copies_;
      send("fetch", {machine_.add_store(copy)});
    }
    ++copies_;
  }
  static int later() { return changed("inputs waited for a turn later"); }
  // Until at most so many of the warp's latest groups are not there.
  void wait_copies(const std::string& name, int except) {
    if (except < 0) throw std::domain_error("fewer than no groups");
    if (!changed("no " + name)) add(Operation::kWaitCopies, name, {}, copies_ - except);
  }
  template <typename BeforeSync>
  void multiply(int group, int step, const BeforeSync& before_sums) {
    read("x", own_.x.at(x_buffer(group, step)), value(group, step));
    before_sums();
    write("sums", {sums(group)[warp_]}, value(group, step));
  }

  // --- Operations --------------------------------------------------------------------------------

  // What comes next is of it.
  void at(int step, int group) {
    where_ = " (step " + std::to_string(step) + ", group " + std::to_string(group) + ")";
  }
  bool has_pair() const { return warp_ < sizes.pairs; }
  // A warp's part of what a block does together.
  Cells mine(const Cells& cells) const {
    Cells result;
    for (size_t i = warp_; i < cells.size(); i += sizes.warps) result.push_back(cells[i]);
    return result;
  }
  void read(const char* name, const Cells& cells, int value) {
    add(Operation::kRead, std::string("read ") + name, cells, value);
  }
  void write(const char* name, const Cells& cells, int value) {
    add(Operation::kWrite, std::string("write ") + name, cells, value);
  }
  void sync(const std::string& name) {
    if (!changed("no " + name)) add(Operation::kSync, name);
  }
  int store(const char* name, int to_block, int cell, int group, int step) {
    const int counter = memory_.blocks[to_block].barriers[group][buffer_of(step)];
    const int sent = value(group, step);
    return machine_.add_store({name + where_, to_block, cell, sent, counter, phase(step)});
  }
  void send(const char* name, const std::vector<int>& sent) {
    add(Operation::kSend, name, {}, 0, kNone, sent);
  }
  void add(Operation::Kind kind, const std::string& name, const Cells& cells = {}, int value = 0,
           int barrier = kNone, const std::vector<int>& sent = {}) {
    if (value >= kZero && kind != Operation::kWrite) throw std::length_error("too many turns");
    machine_.program(number_).push_back({kind, name + where_, cells, value, barrier, sent});
  }

  Machine& machine_;
  const Memory& memory_;
  const Block& own_;
  const int block_, rank_, warp_, number_;
  int copies_ = 0;  // groups of them that the warp has begun
  std::string where_;
};

int main(int count, char** arguments) {
  const std::vector<std::string> words(arguments + 1, arguments + count);
  const std::string& name = words.at(0);
  int numbers[8];
  for (size_t i = 0; i < 8; ++i) numbers[i] = std::stoi(words.at(i + 1));
  changes.insert(words.begin() + 9, words.end());
  const auto [clusters, blocks, warps, pairs, groups, steps, ahead, places] = numbers;
  const Sizes sizes{clusters, blocks, warps, pairs, groups, steps, ahead, places};
  const Kernel kernel{sizes, name.find("grid") == 0, name.find("backward") != std::string::npos};
  if (!kernel.is_grid && clusters > 1) throw std::domain_error("a team of more than a cluster");
  Machine machine;
  const Memory memory = kernel.allocate(machine);
  for (int block = 0; block < kernel.team(); ++block) {
    for (int warp = 0; warp < sizes.warps; ++warp) {
      const Program program(machine, kernel, memory, block, warp);
    }
  }
  const bool every_order = changed("every order");
  for (const std::string& change : changes) {
    if (known_changes.count(change)) continue;
    std::fprintf(stderr, "this protocol has no change \"%s\"\n", change.c_str());
    return 1;
  }
  try {
    std::printf("%zu states\n", Orders(machine).explore(every_order));
  } catch (const Fault& fault) {
    std::printf("%s\n", fault.what());
    return 2;
  }
  return 0;
}
