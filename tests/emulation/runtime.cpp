// The scheduler, block barriers and warps' exchanges; the memories are in memory.cpp, what clusters
// have of their own in cluster.cpp, flags in flags.cpp, what a device can run in limits.cpp.
#include "emulation/runtime.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <numeric>
#include <sstream>

#include "emulation/scheduler.h"

namespace fastbptt::emulation {
namespace {

Schedule current_schedule;
FiberPool fibers;
std::mutex one_launch;

// Of the launch that runs.
const Call* call = nullptr;
Thread* running = nullptr;
std::exception_ptr thrown;
Wave current_wave;

// "0-31, 40" of {0, ..., 31, 40}.
std::string ranges(const std::vector<int>& numbers) {
  std::ostringstream text;
  for (size_t i = 0; i < numbers.size();) {
    size_t end = i + 1;
    while (end < numbers.size() && numbers[end] == numbers[end - 1] + 1) ++end;
    text << (i ? ", " : "") << numbers[i];
    if (end > i + 1) text << "-" << numbers[end - 1];
    i = end;
  }
  return text.str();
}

std::string block_name(const Block& block) {
  std::ostringstream text;
  text << "block (" << block.index.x << ", " << block.index.y << ", " << block.index.z << ")";
  return text.str();
}

template <typename Body>
void for_each_block(const Body& body) {
  for (Cluster& cluster : current_wave.clusters) {
    for (const auto& block : cluster.blocks) body(*block);
  }
}

// Nobody can go on: says why, and where everybody is.
std::string describe_standstill() {
  bool barriers = false, lanes = false, returned = false;
  std::ostringstream places;
  for_each_block([&](const Block& block) {
    std::map<std::string, std::vector<int>> groups;
    bool waits_at_barrier = false;
    for (const Thread& thread : block.threads) {
      std::string what = "returned";
      if (!thread.ended) {
        what = std::string("wait at ") + thread.waits_at + " (" + thread.site.str() + ")" +
               describe_barrier(thread) + describe_flag(thread);
        waits_at_barrier |= std::strcmp(thread.waits_at, "sync_block") == 0;
      }
      groups[what].push_back(thread.index);
    }
    for (const Warp& warp : block.warps) lanes |= warp.diverged;
    barriers |= block.diverged;
    returned |= block.ended > 0 && !block.has_ended() && waits_at_barrier;
    places << "\n" << block_name(block) << ":";
    for (const auto& [what, threads] : groups) {
      places << "\n  threads " << ranges(threads) << " " << what;
    }
  });
  const char* why = barriers   ? "threads of a block wait at different barriers"
                    : lanes    ? "lanes of a warp are at different places"
                    : returned ? "threads returned while others of their block wait for them"
                               : "deadlock: nobody is left to complete what is waited for";
  return why + places.str();
}

void start_block(Block& block) {
  block.started = true;
  poison_shared(block);
}

Warp& warp_of(const Thread& thread) { return thread.block->warps[size_t(thread.index / kWarp)]; }

Thread* next_ready() {
  auto& ready = current_wave.ready;
  if (ready.empty()) return nullptr;
  if (current_schedule.order == Order::kRandom) {
    auto& random = current_wave.random;
    auto* next = &ready[random() % ready.size()];
    if (random() % uint64_t(4 * current_wave.threads) == 0) current_wave.slow = &warp_of(**next);
    for (int tries = 8; tries > 0 && &warp_of(**next) == current_wave.slow; --tries) {
      next = &ready[random() % ready.size()];
    }
    std::swap(ready.front(), *next);
  }
  Thread* next = ready.front();
  ready.pop_front();
  return next;
}

// The thread to go on with, and CUDA's variables set to it; null if there is none.
Thread* next_thread() {
  deliver_stores(/*idle=*/false);
  Thread* next = next_ready();
  while (!next && deliver_stores(/*idle=*/true)) next = next_ready();
  if (!next) return nullptr;
  Block& block = *next->block;
  if (!block.started) start_block(block);
  running = next;
  threadIdx = {unsigned(next->index), 0, 0};
  blockIdx = block.index;
  return next;
}

void end_thread(Thread& thread) {
  thread.ended = true;
  ++current_wave.ended;
  if (++thread.block->ended == int(thread.block->threads.size())) end_block(*thread.block);
}

void run_threads();

void resume(Thread* thread) {
  if (!thread) return Fiber::resume_host();
  if (!thread->fiber) thread->fiber = fibers.take();
  thread->fiber->resume(run_threads);
}

// What a fiber does for ever: it runs a thread, and goes on with one that has not started, or leaves
// for another fiber until it is taken for a new thread. No exception may leave its stack: the launch
// throws it again.
void run_threads() {
  for (;;) {
    Thread* next = nullptr;
    try {
      call->run(call->context);
      Thread& thread = *running;
      end_thread(thread);
      next = next_thread();
      if (next && !next->fiber) {
        std::swap(next->fiber, thread.fiber);
        continue;
      }
      fibers.give_back(std::exchange(thread.fiber, nullptr));
    } catch (...) {
      thrown = std::current_exception();
    }
    resume(next);
  }
}

void run_wave() {
  while (Thread* next = next_thread()) {
    resume(next);
    if (thrown) std::rethrow_exception(std::exchange(thrown, nullptr));
  }
  if (current_wave.ended < current_wave.threads) throw Fault(describe_standstill());
  end_wave();
}

// The memory of a wave before is used again.
void prepare_wave(const Grid& grid, size_t clusters) {
  current_wave.clusters.resize(clusters);
  current_wave.cooperative = grid.cooperative;
  current_wave.stores.clear();
  current_wave.ready.clear();
  current_wave.waiting.clear();
  current_wave.slow = nullptr;
  current_wave.threads = current_wave.ended = 0;
}

// The grid's cluster of that number, none of its blocks started, to run in the current wave.
void prepare_cluster(Cluster& cluster, const Grid& grid, int64_t number) {
  const int64_t clusters_x = grid.blocks.x / grid.cluster, row = number / clusters_x;
  const bool reverse = current_schedule.order == Order::kReverse;
  cluster.blocks.resize(size_t(grid.cluster));
  cluster.threads = grid.cluster * grid.threads;
  cluster.arrived = 0;
  cluster.phase = 0;
  current_wave.threads += cluster.threads;
  for (int rank = 0; rank < grid.cluster; ++rank) {
    auto& slot = cluster.blocks[size_t(rank)];
    if (!slot) slot = std::make_unique<Block>();
    Block& block = *slot;
    block.cluster = &cluster;
    block.rank = rank;
    block.index = {unsigned(number % clusters_x * grid.cluster + rank),
                   unsigned(row % grid.blocks.y), unsigned(row / grid.blocks.y)};
    block.started = block.diverged = false;
    block.ended = 0;
    block.all = block.first = {};
    block.barriers.clear();
    reserve_shared(block, size_t(grid.shared_bytes));
    block.threads.resize(size_t(grid.threads));
    block.warps.resize(size_t((grid.threads + kWarp - 1) / kWarp));
    for (Warp& warp : block.warps) {
      warp.arrived = warp.cluster_arrived = 0;
      warp.diverged = false;
    }
    for (int i = 0; i < grid.threads; ++i) {
      Thread& thread = block.threads[size_t(i)];
      thread.block = &block;
      thread.index = i;
      thread.ended = thread.cluster_arrived = false;
      thread.waits_at = nullptr;
      thread.waits_for = nullptr;
      thread.copies.clear();
      thread.groups.clear();
    }
  }
  const int threads = cluster.threads;
  for (int i = 0; i < threads; ++i) {
    const int at = reverse ? threads - 1 - i : i;
    Block& block = *cluster.blocks[size_t(at / grid.threads)];
    current_wave.ready.push_back(&block.threads[size_t(at % grid.threads)]);
  }
}

// A thread arrives at a barrier of its block's first `threads`.
void arrive_at(BlockBarrier& barrier, Block& block, int threads, const Site& site) {
  if (barrier.arrived == 0) barrier.site = site, barrier.threads = threads;
  block.diverged |= barrier.site != site || barrier.threads != threads;
  if (++barrier.arrived < threads || block.diverged) return;
  barrier.arrived = 0;
  make_ready(size_t(threads), [&](size_t i) { return &block.threads[i]; });
}

// Threads that a fault left on their stacks are not run to their end.
void abandon_threads() {
  for_each_block([](Block& block) {
    for (Thread& thread : block.threads) {
      if (!thread.fiber) continue;
      thread.fiber->reset();
      fibers.give_back(thread.fiber);
      thread.fiber = nullptr;
    }
  });
}

}  // namespace

std::string Site::str() const {
  const char* name = std::strrchr(file, '/');
  return std::string(name ? name + 1 : file) + ":" + std::to_string(line);
}

void set_schedule(const Schedule& schedule) {
  const std::lock_guard<std::mutex> lock(one_launch);
  current_schedule = schedule;
  current_wave.random.seed(schedule.seed);
}

const Schedule& schedule() { return current_schedule; }
Thread& this_thread() { return *running; }
Wave& wave() { return current_wave; }
Cluster& this_cluster() { return *running->block->cluster; }

// Early or late, by the schedule.
bool is_early() {
  return current_schedule.order == Order::kRandom ? current_wave.random() & 1
                                                  : current_schedule.early_copies;
}

void fail(const std::string& message, const Site& site) {
  throw Fault(message + "\n" + block_name(*running->block) + ", thread " +
              std::to_string(running->index) + " (" + site.str() + ")");
}

void require(bool condition, const char* message, const Site& site) {
  if (!condition) fail(message, site);
}

void wait(const char* what, const Site& site) {
  Thread* self = running;
  self->waits_at = what;
  self->site = site;
  Thread* next = next_thread();
  if (next != self) resume(next);
}

void sync_block(const Site& site) {
  Block& block = *running->block;
  arrive_at(block.all, block, int(block.threads.size()), site);
  wait("sync_block", site);
}

void sync_first(int threads, const Site& site) {
  Block& block = *running->block;
  require(threads > 0 && threads % kWarp == 0 && threads <= int(block.threads.size()),
          "a barrier of the first threads: of so many there is none", site);
  require(running->index < threads, "a barrier of the first threads: this is none of them", site);
  arrive_at(block.first, block, threads, site);
  wait("sync_block", site);
}

const void* warp_exchange(const char* what, const void* in, size_t bytes, void (*exchange)(Warp&),
                          const Site& site) {
  Thread& thread = *running;
  Warp& warp = warp_of(thread);
  require(thread.block->threads.size() % kWarp == 0,
          "a warp's collective in a block whose size is no multiple of a warp's", site);
  if (warp.arrived == 0) {
    warp.what = what;
    warp.site = site;
  }
  warp.diverged |= warp.what != what || warp.site != site;
  std::memcpy(warp.in[thread.lane()], in, bytes);
  warp.threads[thread.lane()] = &thread;
  if (++warp.arrived == kWarp && !warp.diverged) {
    warp.arrived = 0;
    exchange(warp);
    make_ready(kWarp, [&](size_t i) { return warp.threads[i]; });
  }
  wait(what, site);
  return warp.out[thread.lane()];
}

void run_grid(const Call& new_call, const Grid& grid, const Site& site) {
  const std::lock_guard<std::mutex> lock(one_launch);
  try {
    check_grid(grid);
    call = &new_call;
    blockDim = {unsigned(grid.threads), 1, 1};
    gridDim = {unsigned(grid.blocks.x), unsigned(grid.blocks.y), unsigned(grid.blocks.z)};
    const Order order = current_schedule.order;
    std::vector<int64_t> clusters(size_t(count_blocks(grid) / grid.cluster));
    std::iota(clusters.begin(), clusters.end(), int64_t(0));
    if (order == Order::kReverse) std::reverse(clusters.begin(), clusters.end());
    if (order == Order::kRandom) {
      std::shuffle(clusters.begin(), clusters.end(), current_wave.random);
    }
    const size_t at_once = grid.cooperative ? clusters.size() : 1;
    for (size_t first = 0; first < clusters.size(); first += at_once) {
      prepare_wave(grid, at_once);
      for (size_t i = 0; i < at_once; ++i) {
        prepare_cluster(current_wave.clusters[i], grid, clusters[first + i]);
      }
      run_wave();
    }
    check_guards();
  } catch (const Fault& fault) {
    abandon_threads();
    throw Fault("kernel launched at " + site.str() + ": " + fault.what());
  } catch (...) {
    abandon_threads();
    throw;
  }
}

}  // namespace fastbptt::emulation
