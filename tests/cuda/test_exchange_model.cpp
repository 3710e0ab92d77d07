// The protocols by which the blocks of persistent kernels exchange what they compute.
//
//   exchange_model cluster BLOCKS WARPS STEPS GROUPS [CHANGE...]
//   exchange_model grid CLUSTERS BLOCKS WARPS STEPS GROUPS [CHANGE...]    BLOCKS: of a cluster
//
// Prints how many states there are, or how something goes wrong and where all warps are then; exits
// with 0 or 2. A change makes the protocol another one, in most cases a wrong one.
#include <set>

#include "exchange_machine.h"

std::set<std::string> changes, known_changes;

bool changed(const std::string& name) {
  known_changes.insert(name);
  return changes.count(name) > 0;
}

// The program of one warp, an operation after another.
class Program {
 public:
  Program(Machine& machine, int block) : machine_(machine), operations_(machine.add_warp(block)) {}

  // What comes next is of it.
  void at(int step, int group) {
    where_ = " (step " + std::to_string(step) + ", group " + std::to_string(group) + ")";
  }
  void read(const char* name, const Cells& cells, int value) {
    add(Operation::kRead, name, cells, value);
  }
  void write(const char* name, const Cells& cells, int value) {
    add(Operation::kWrite, name, cells, value);
  }
  void copy(const char* name, const Cells& to, const Cells& from) {
    add(Operation::kCopy, name, to, 0, 0, from);
  }
  void sync(const std::string& name) {
    if (!changed("no " + name)) add(Operation::kSync, name, {}, 0);
  }
  void announce(int barrier, int bytes) {
    if (!changed("no announcement")) add(Operation::kAnnounce, "announce", {}, bytes, barrier);
  }
  void wait_barrier(const char* name, int barrier, int phase) {
    add(Operation::kWaitBarrier, name, {}, phase, barrier);
  }
  void raise_flag(int flag, int value) { add(Operation::kRaise, "raise the flag", {flag}, value); }
  void wait_flags(const Cells& flags, int value) {
    add(Operation::kWaitFlags, "wait for flags", flags, value);
  }
  void send(const char* name, const std::vector<Store>& stores) {
    Cells numbers;
    for (const Store& store : stores) numbers.push_back(machine_.add_store(store));
    add(Operation::kSend, name, numbers, 0);
  }

 private:
  void add(Operation::Kind kind, const std::string& name, const Cells& cells, int value,
           int barrier = 0, const Cells& from = {}) {
    operations_.push_back({kind, name + where_, cells, from, value, barrier});
  }

  Machine& machine_;
  std::vector<Operation>& operations_;
  std::string where_;
};

// What is received step by step in one place or, by turns, in two.
struct Turns {
  int places, first;  // first: the step of the first that comes

  int place(int step) const { return step % places; }
  int phase(int step) const { return (step - first) / places; }
};

// C blocks of W warps, S steps, N groups of lanes by turns: csrc/cuda/on_chip.cuh.
void cluster_kernel(Machine& machine, int C, int W, int S, int N) {
  const Turns turns{changed("one buffer") ? 1 : 2, 1};
  // [block][group][buffer], [block][group] and [block][group][buffer].
  std::vector<std::vector<std::vector<Cells>>> x(C);
  std::vector<std::vector<Cells>> sums(C);
  std::vector<std::vector<std::vector<int>>> barriers(C);
  for (int block = 0; block < C; ++block) {
    for (int group = 0; group < N; ++group) {
      x[block].push_back({machine.allocate(C * W), machine.allocate(C * W)});
      machine.preset(x[block][group][0], group);
      const bool shared = changed("sums shared by the groups") && group > 0;
      sums[block].push_back(shared ? sums[block][0] : machine.allocate(W, /*own=*/true));
      barriers[block].push_back({machine.add_barrier(), machine.add_barrier()});
    }
  }
  for (int block = 0; block < C; ++block) {
    for (int warp = 0; warp < W; ++warp) {
      Program program(machine, block);
      for (int step = 0; step < S; ++step) {
        for (int group = 0; group < N; ++group) {
          const bool last = !changed("push at the last step") && step == S - 1;
          const int here = turns.place(step), next = turns.place(step + 1);
          const int value = step * N + group;  // of x and of the sums
          const auto push = [&] {
            std::vector<Store> stores;
            for (int to = 0; to < C; ++to) {
              stores.push_back({to, x[to][group][next][block * W + warp], value + N,
                                barriers[to][group][next], turns.phase(step + 1)});
            }
            if (!last) program.send("push", stores);
          };
          program.at(step, group);
          if (step > 0) {
            program.wait_barrier("wait for x", barriers[block][group][here], turns.phase(step));
          }
          program.read("read x", x[block][group][here], value);
          const bool early = changed("push before all have read");
          if (early) push();
          program.write("write sums", {sums[block][group][warp]}, value);
          program.sync("sync after sums");
          if (warp == 0 && !last) program.announce(barriers[block][group][next], C * W);
          program.read("read sums", sums[block][group], value);
          if (!early) push();
        }
      }
    }
  }
}

// A clusters of C blocks of W warps, S steps, N groups by turns. x stands in global memory; a block
// copies the columns of its part, adds up the products by them, and sends the sums to the owners of
// the rows among its cluster.
void grid_kernel(Machine& machine, int A, int C, int W, int S, int N) {
  const int blocks = A * C;
  const Turns turns{changed("one buffer") ? 1 : 2, 1};
  const Turns partial_turns{changed("one buffer of partial sums") ? 1 : 2, 0};
  // [group][buffer][block][warp] and [group][block] in global memory.
  std::vector<std::vector<std::vector<Cells>>> x(N);
  std::vector<Cells> flags(N);
  for (int group = 0; group < N; ++group) {
    x[group].resize(2);
    for (int block = 0; block < blocks; ++block) {
      for (auto& buffer : x[group]) buffer.push_back(machine.allocate(W));
      machine.preset(x[group][0][block], group);
    }
    flags[group] = machine.allocate(blocks);
    machine.preset(flags[group], 0);
  }
  // In shared memory: the columns of the own part, [block][column]; [block][group][warp];
  // [block][group][buffer][from][warp], and a barrier of each buffer.
  std::vector<Cells> copies(blocks);
  std::vector<std::vector<Cells>> sums(blocks);
  std::vector<std::vector<std::vector<Cells>>> partials(blocks);
  std::vector<std::vector<std::vector<int>>> barriers(blocks);
  for (int block = 0; block < blocks; ++block) {
    copies[block] = machine.allocate(A * W, /*own=*/true);
    for (int group = 0; group < N; ++group) {
      const bool shared = changed("sums shared by the groups") && group > 0;
      sums[block].push_back(shared ? sums[block][0] : machine.allocate(W, /*own=*/true));
      partials[block].push_back({machine.allocate(C * W), machine.allocate(C * W)});
      barriers[block].push_back({machine.add_barrier(), machine.add_barrier()});
    }
  }
  for (int block = 0; block < blocks; ++block) {
    const int rank = block % C, cluster = block - rank;
    for (int warp = 0; warp < W; ++warp) {
      Program program(machine, block);
      for (int step = 0; step < S; ++step) {
        for (int group = 0; group < N; ++group) {
          const bool last = step == S - 1;
          const int here = turns.place(step), next = turns.place(step + 1);
          const int value = step * N + group;  // of x and of the sums
          program.at(step, group);
          if (step > 0) {
            const int awaited = blocks - int(changed("no wait for the last block's flag"));
            Cells own;
            for (int i = 0; i < awaited; ++i) {
              if (changed("each warp waits for all flags") || i % W == warp) {
                own.push_back(flags[group][i]);
              }
            }
            program.wait_flags(own, step);
            program.sync("sync after flags");
          }
          Cells to, from;
          for (int column = 0; column < A * W; ++column) {
            if (column % W != warp) continue;
            to.push_back(copies[block][column]);
            from.push_back(x[group][here][column / W * C + rank][column % W]);
          }
          program.copy("copy x", to, from);
          program.sync("sync after the copy");
          program.read("read x", copies[block], value);
          program.write("write sums", {sums[block][group][warp]}, value);
          program.sync("sync after sums");
          const int buffer = partial_turns.place(step), phase = partial_turns.phase(step);
          if (C > 1 && warp == 0) program.announce(barriers[block][group][buffer], C * W);
          program.read("read sums", sums[block][group], value);
          if (C > 1) {
            std::vector<Store> stores;
            for (int owner = cluster; owner < cluster + C; ++owner) {
              stores.push_back({owner, partials[owner][group][buffer][rank * W + warp], value,
                                barriers[owner][group][buffer], phase});
            }
            program.send("send partial sums", stores);
            program.wait_barrier("wait for partial sums", barriers[block][group][buffer], phase);
            program.read("read partial sums", partials[block][group][buffer], value);
          }
          if (last) continue;
          program.write("write x", {x[group][next][block][warp]}, value + N);
          program.sync("sync after x");
          if (warp == 0) program.raise_flag(flags[group][block], step + 1);
        }
      }
    }
  }
}

int main(int count, char** arguments) {
  const std::vector<std::string> words(arguments + 1, arguments + count);
  const size_t numbers = words.at(0) == "grid" ? 5 : 4;
  std::vector<int> sizes;
  for (size_t i = 1; i <= numbers; ++i) sizes.push_back(std::stoi(words.at(i)));
  changes.insert(words.begin() + std::ptrdiff_t(numbers) + 1, words.end());
  Machine machine;
  if (numbers == 5) {
    grid_kernel(machine, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]);
  } else {
    cluster_kernel(machine, sizes[0], sizes[1], sizes[2], sizes[3]);
  }
  for (const std::string& name : changes) {
    if (known_changes.count(name)) continue;
    std::fprintf(stderr, "this protocol has no change \"%s\"\n", name.c_str());
    return 1;
  }
  return machine.explore() ? 0 : 2;
}
