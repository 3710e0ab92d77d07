// What the warps of the persistent kernels do for each other, in the order and by the names that
// csrc/cuda/persistent.cuh has; with the buffers that csrc/cuda/tiling.h gives them.
//
//   exchange_model KERNEL CLUSTERS BLOCKS WARPS PAIRS BEHIND STEPS AHEAD PLACES [CHANGE...]
//
// KERNEL: forward, backward, grid-forward or grid-backward. BLOCKS: of a cluster. WARPS: of a
// block; the first PAIRS of them have a pair of a unit and a lane, the last BEHIND work behind the
// others, on what is carried and on places; all multiply. AHEAD, PLACES: for kAhead and kPlaceSteps.
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
  int clusters, blocks, warps, pairs, behind, steps, ahead, places;
};

// What a block has in shared memory.
struct Block {
  std::vector<Cells> x;                // [buffer][column]
  Cells sums;                          // [the pairs' biases, and then the warps']
  std::vector<Cells> partials;         // [buffer][sender's pair]
  std::vector<int> barriers;           // [buffer]
  std::vector<Cells> inputs, results;  // [slot][pair]
  Cells places;                        // [slot]
};

// The same for all.
struct Memory {
  std::vector<Block> blocks;
  std::vector<Cells> x;  // [buffer][unit of the team], in global memory
  Cells flag;
};

struct Kernel {
  Sizes sizes;
  bool is_grid, is_backward;

  int team() const { return sizes.clusters * sizes.blocks; }
  bool is_alone() const { return sizes.blocks == 1; }
  // Columns of the product that a block has.
  int columns() const { return (is_backward ? sizes.clusters : team()) * sizes.pairs; }
  int biases() const { return is_backward ? 0 : sizes.pairs; }
  int slots() const { return sizes.ahead + fastbptt::kRing - fastbptt::kAhead - slots_fewer(); }
  static int slots_fewer() { return changed("one slot of inputs fewer"); }
  static int result_slots() { return changed("one buffer of results") ? 1 : 2; }
  int place_slots() const { return (changed("places of one time only") ? 1 : 2) * sizes.places; }
  fastbptt::SharedLayout layout() const {
    fastbptt::Tiling tiling{};
    tiling.clusters = sizes.clusters;
    tiling.cluster = sizes.blocks;
    tiling.is_grid = is_grid;
    const auto arithmetic = fastbptt::Arithmetic::kTensor16;
    return fastbptt::shared_layout({arithmetic, 0, 1, is_backward, 0, 0, 0}, tiling);
  }

  Memory allocate(Machine& machine) const {
    Memory memory;
    const auto rows = [&](int count, int cells) {
      std::vector<Cells> result;
      for (int i = 0; i < count; ++i) result.push_back(machine.allocate(cells));
      return result;
    };
    for (int i = 0; i < team(); ++i) {
      Block block;
      block.x = rows(layout().x_buffers, columns());
      block.sums = machine.allocate(biases() + sizes.warps);
      block.partials = rows(2, sizes.blocks * sizes.pairs);
      block.barriers = {machine.add_barrier(), machine.add_barrier()};
      block.inputs = rows(slots(), sizes.pairs);
      block.results = rows(result_slots(), sizes.pairs);
      block.places = machine.allocate(place_slots());
      memory.blocks.push_back(block);
    }
    memory.x = rows(2, team() * sizes.pairs);
    memory.flag = machine.allocate(1);
    machine.preset(memory.flag, 0);
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
  static constexpr int kZero = 0xfe, kBias = 0xfd;  // what padding is, and what biases are

  // --- The kernels -------------------------------------------------------------------------------

  void forward() {
    if (has_pair()) write("biases", {own_.sums[warp_]}, kBias);
    start();
    for (int step = 0; step < sizes.ahead; ++step) fetch(step);
    for (int step = 0; step < sizes.steps; ++step) {
      const bool is_last = step + 1 == sizes.steps;
      const bool sends = !is_last || changed("push at the last step");
      at(step);
      if (changed("fetch before x is there")) fetch(step + sizes.ahead);
      receive(step);
      if (changed("fetch before the barrier")) fetch(step + sizes.ahead);
      multiply(step, [&] {
        if (changed("push before all have read") && sends) push(step + 1);
      });
      wait_and_sync("sync after the product");
      if (sends) announce(step + 1, columns());
      if (has_pair()) {
        read("inputs", {input(step, warp_)}, step);
        read("biases", {own_.sums[warp_]}, kBias);
        read("sums", sums(), step);
        read("a place", {place(step)}, step);
        if (sends && !changed("push before all have read")) push(step + 1);
        write("results", {result(step, warp_)}, step);
      }
      if (is_grid) publish(is_last);
      work_behind(step);
    }
    sync("sync at the end");
    store(sizes.steps - 1);
  }

  void backward() {
    start();
    for (int k = 0; k < sizes.ahead; ++k) fetch(k);
    if (changed("fetch before the barrier")) fetch(sizes.ahead);
    wait_copies("wait for the first inputs", sizes.ahead - 1);
    sync("sync after the first inputs");
    for (int k = 0; k < sizes.steps; ++k) {
      const bool is_last = k + 1 == sizes.steps && !changed("sums sent at the last step");
      at(k);
      if (has_pair()) {
        collect(k);
        read("a place", {place(k)}, k);
        read("inputs", {input(k, warp_)}, k);
        if (k > 0 && is_alone()) read("sums", sums(), k);
        if (k > 0 && !is_alone()) read("partial sums", own_.partials[partials_of(k)], k);
        if (!is_last) put(k + 1);
        write("results", {result(k, warp_)}, k);
      }
      work_behind(k);
      publish(is_last);
      if (is_last) break;
      at(k + 1);
      receive(k + 1);
      if (changed("fetch before the barrier")) fetch(k + 1 + sizes.ahead);
      multiply(k + 1, [&] {
        if (changed("send before all have added")) send_sums(k + 1);
      });
      wait_and_sync("sync after the product");
      if (!changed("send before all have added")) send_sums(k + 1);
    }
    store(sizes.steps - 1);
  }

  // Each waits for its own copies, before a barrier that all of them have passed then.
  void wait_and_sync(const std::string& name) {
    const bool is_behind = changed("inputs waited for behind the barrier");
    const int except = sizes.ahead - 1 + changed("inputs waited for a step later");
    if (!is_behind) wait_copies("wait for inputs", except);
    sync(name);
    if (is_behind) wait_copies("wait for inputs", except);
  }

  void work_behind(int step) {
    if (!is_behind()) return;
    const bool is_early = changed("results stored without a barrier");
    store(step - (changed("results stored a step later") ? 2 : 1) + is_early);
    const bool has_fetched =
        changed("fetch before the barrier") || (!is_backward && changed("fetch before x is there"));
    if (!has_fetched) fetch(step + sizes.ahead);
    const int at = changed("places a step earlier") ? 0 : changed("places a step later") ? 2 : 1;
    if (step % sizes.places == at) compute_places(step - at + sizes.places);
  }

  // --- exchange.cuh ------------------------------------------------------------------------------

  // Mbarriers and what they belong to. Step 0 has none.
  static bool is_single() { return changed("one buffer at a time"); }
  static int buffer_of(int step) { return is_single() ? 0 : step % 2; }
  static int global_buffer(int step) { return changed("one buffer of x") ? 0 : step % 2; }
  static int phase(int step) { return is_single() ? step - 1 : (step - 1) / 2; }
  int barrier(int step) const { return own_.barriers[buffer_of(step)]; }
  int x_buffer(int step) const {
    const bool is_pushed = !is_grid && !is_backward && !is_alone();
    return is_pushed && !changed("one buffer of pushed x") ? buffer_of(step) : 0;
  }
  static int partials_of(int step) {
    return changed("one buffer of partial sums") ? 0 : buffer_of(step);
  }

  void start() {
    where_ = " (at the start)";
    if (!is_alone() && warp_ == 0) {
      for (const int barrier : own_.barriers) {
        add(Operation::kInit, "initialize", {}, 0, barrier);
      }
    }
    compute_places(0);
    fill(x_buffer(0), is_backward ? kZero : 0);
    if (x_buffer(1) != 0) fill(x_buffer(1), kZero);
    if (is_alone() || changed("no cluster barrier at the start")) {
      sync("sync at the start");
    } else {
      add(Operation::kSyncCluster, "cluster barrier at the start");
    }
  }
  void fill(int buffer, int with) { write("fill x", mine(own_.x.at(buffer)), with); }

  void receive(int step) {
    if (step == 0) return;
    if (is_grid) {
      const int awaited = team() * step - changed("the flag waited for one short");
      if (warp_ == 0 || changed("each warp waits for the flag")) {
        add(Operation::kWaitFlag, "wait for the flag", memory_.flag, awaited);
      }
      sync("sync after the flag");
      copy_x(step);
      sync("sync after the copy");
    } else if (!is_backward) {
      if (is_alone()) return sync("sync before x");
      if (changed("no wait for x")) return;
      add(Operation::kWaitBarrier, "wait for x", {}, phase(step), barrier(step));
    }
  }
  void copy_x(int step) {
    const int first = is_backward ? rank_ * columns() : 0;
    const Cells& all = memory_.x[global_buffer(step)];
    const Cells own(all.begin() + first, all.begin() + first + columns());
    read("global x", mine(own), step);
    write("copy x", mine(own_.x.at(0)), step);
  }

  void announce(int step, int bytes) {
    if (warp_ > 0 || is_alone() || (is_grid && !is_backward)) return;
    if (changed("no announcement")) return;
    add(Operation::kAnnounce, "announce", {}, bytes, barrier(step));
  }
  void push(int step) {
    if (!has_pair()) return;
    if (is_grid || is_alone()) return put(step);
    std::vector<int> sent;
    for (int peer = first_of_cluster(); peer < first_of_cluster() + sizes.blocks; ++peer) {
      const Block& to = memory_.blocks[peer];
      const int cell = to.x.at(x_buffer(step))[rank_ * sizes.pairs + warp_];
      sent.push_back(send("push", peer, cell, step));
    }
    send("push", sent);
  }
  void put(int step) {
    if (is_grid) {
      const Cells& x = memory_.x[global_buffer(step)];
      return write("global x", {x[block_ * sizes.pairs + warp_]}, step);
    }
    write("x", {own_.x.at(x_buffer(step))[warp_]}, step);
  }
  void publish(bool is_last) {
    const bool counts = is_grid && !is_last && warp_ == 0;
    const bool is_early = changed("flag before the barrier");
    if (counts && is_early) add_to_flag();
    sync("sync to publish");
    if (counts && !is_early) add_to_flag();
  }
  void add_to_flag() { add(Operation::kAddToFlag, "add to the flag", memory_.flag); }

  void collect(int step) {
    if (is_alone() || step == 0 || changed("no wait for partial sums")) return;
    add(Operation::kWaitBarrier, "wait for partial sums", {}, phase(step), barrier(step));
  }
  // Of each owner's pairs; all warps share in it.
  void send_sums(int step) {
    if (is_alone()) return;
    announce(step, sizes.blocks * sizes.pairs);
    std::vector<int> sent;
    for (int i = warp_; i < sizes.blocks * sizes.pairs; i += sizes.warps) {
      const int owner = first_of_cluster() + i / sizes.pairs, pair = i % sizes.pairs;
      const Cells& to = memory_.blocks[owner].partials[partials_of(step)];
      sent.push_back(send("partial sum", owner, to[rank_ * sizes.pairs + pair], step));
    }
    if (sent.empty()) return;
    read("sums", sums(), step);
    send("send partial sums", sent);
  }

  // --- on_chip.cuh -------------------------------------------------------------------------------

  bool has_pair() const { return warp_ < sizes.pairs; }
  int from_end() const { return sizes.warps - 1 - warp_; }
  bool is_behind() const { return from_end() < sizes.behind; }
  // The pairs that the warp carries: a stretch, which need not be its own.
  int first_carried() const { return is_behind() ? from_end() * stretch() : sizes.pairs; }
  int end_carried() const { return std::min(first_carried() + stretch(), sizes.pairs); }
  int stretch() const { return (sizes.pairs + sizes.behind - 1) / sizes.behind; }
  bool carries() const { return first_carried() < sizes.pairs; }

  Cells sums() const { return {own_.sums.begin() + biases(), own_.sums.end()}; }
  int input(int step, int pair) const { return own_.inputs[step % slots()][pair]; }
  int result(int step, int pair) const { return own_.results[step % result_slots()][pair]; }
  int place(int step) const { return own_.places[step % place_slots()]; }

  void compute_places(int first) {
    if (!is_behind()) return;
    for (int i = from_end(); i < sizes.places; i += sizes.behind) {
      write("compute a place", {place(first + i)}, first + i);
    }
  }
  // Where a step's rows have no two numbers in four aligned bytes, the kernels copy at once: that is
  // one of the times at which these copies land.
  void fetch(int step) {
    if (carries() && step < sizes.steps) {
      read("a place to fetch by", {place(step)}, step);
      std::vector<int> copies;
      for (int pair = first_carried(); pair < end_carried(); ++pair) {
        Store copy{"fetch" + where_, block_, input(step, pair), step};
        copy.warp = number_;
        copy.group = copies_;
        copies.push_back(machine_.add_store(copy));
      }
      send("fetch", copies);
    }
    ++copies_;
  }
  void store(int step) {
    if (!carries() || step < 0) return;
    read("a place to store by", {place(step)}, step);
    for (int pair = first_carried(); pair < end_carried(); ++pair) {
      read("results", {result(step, pair)}, step);
    }
  }
  // Until at most so many of the warp's latest groups are not there.
  void wait_copies(const std::string& name, int except) {
    if (!changed("no " + name)) add(Operation::kWaitCopies, name, {}, copies_ - except);
  }
  template <typename BeforeSums>
  void multiply(int step, const BeforeSums& before_sums) {
    read("x", own_.x.at(x_buffer(step)), step);
    before_sums();
    const int first = changed("sums over the biases") ? 0 : biases();
    write("sums", {own_.sums[first + warp_]}, step);
  }

  // --- Operations --------------------------------------------------------------------------------

  // What comes next is of it.
  void at(int step) { where_ = " (step " + std::to_string(step) + ")"; }
  int first_of_cluster() const { return block_ - rank_; }
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
  int send(const char* name, int to_block, int cell, int step) {
    const int counter = memory_.blocks[to_block].barriers[buffer_of(step)];
    return machine_.add_store({name + where_, to_block, cell, step, counter, phase(step)});
  }
  void send(const char* name, const std::vector<int>& sent) {
    add(Operation::kSend, name, {}, 0, kNone, sent);
  }
  void add(Operation::Kind kind, const std::string& name, const Cells& cells = {}, int value = 0,
           int barrier = kNone, const std::vector<int>& sent = {}) {
    const bool is_number = value >= kBias && kind != Operation::kWrite && kind != Operation::kRead;
    if (is_number || sizes.steps >= kBias) throw std::length_error("too many steps");
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
  const auto [clusters, blocks, warps, pairs, behind, steps, ahead, places] = numbers;
  const Sizes sizes{clusters, blocks, warps, pairs, behind, steps, ahead, places};
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
