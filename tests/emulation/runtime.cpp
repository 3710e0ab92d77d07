// The scheduler, block barriers and warps' exchanges; the memories are in memory.cpp, what clusters
// have of their own in cluster.cpp.
#include "emulation/runtime.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <sstream>

#include "emulation/scheduler.h"

namespace fastbptt::emulation {
namespace {

constexpr int kMaxThreads = 1024, kMaxCluster = 16;
constexpr int64_t kMaxBlocks = (int64_t(1) << 31) - 1, kMaxBlocksYZ = 65535;

DeviceLimits limits{90, 132, 232448};  // an H100's
Schedule current_schedule;
FiberPool fibers;
std::mutex one_launch;

// Of the launch that runs.
const Call* call = nullptr;
Thread* running = nullptr;
std::exception_ptr thrown;
Cluster cluster;

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

// Nobody can go on: says why, and where everybody is.
std::string describe_standstill() {
  bool barriers = false, lanes = false, returned = false;
  std::ostringstream places;
  for (const auto& block : cluster.blocks) {
    std::map<std::string, std::vector<int>> groups;
    bool waits_at_barrier = false;
    for (const Thread& thread : block->threads) {
      std::string what = "returned";
      if (!thread.ended) {
        what = std::string("wait at ") + thread.waits_at + " (" + thread.site.str() + ")" +
               describe_barrier(thread.waits_for);
        waits_at_barrier |= std::strcmp(thread.waits_at, "sync_block") == 0;
      }
      groups[what].push_back(thread.index);
    }
    for (const Warp& warp : block->warps) lanes |= warp.diverged;
    barriers |= block->diverged;
    returned |= block->ended > 0 && !block->has_ended() && waits_at_barrier;
    places << "\n" << block_name(*block) << ":";
    for (const auto& [what, threads] : groups) {
      places << "\n  threads " << ranges(threads) << " " << what;
    }
  }
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

Thread* next_ready() {
  auto& ready = cluster.ready;
  if (ready.empty()) return nullptr;
  if (current_schedule.order == Order::kRandom) {
    std::swap(ready.front(), ready[cluster.random() % ready.size()]);
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
  ++cluster.ended;
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

void run_cluster() {
  while (Thread* next = next_thread()) {
    resume(next);
    if (thrown) std::rethrow_exception(std::exchange(thrown, nullptr));
  }
  if (cluster.ended < cluster.threads) throw Fault(describe_standstill());
  end_cluster(cluster);
}

// Blocks [first, first + cluster) of a row, none of them started.
void prepare(const Grid& grid, EmulatedIndex first) {
  cluster.blocks.resize(size_t(grid.cluster));
  cluster.stores.clear();
  cluster.ready.clear();
  cluster.threads = grid.cluster * grid.threads;
  cluster.ended = cluster.arrived = 0;
  cluster.phase = 0;
  for (int rank = 0; rank < grid.cluster; ++rank) {
    auto& slot = cluster.blocks[size_t(rank)];
    if (!slot) slot = std::make_unique<Block>();
    Block& block = *slot;
    block.cluster = &cluster;
    block.rank = rank;
    block.index = {first.x + unsigned(rank), first.y, first.z};
    block.started = block.diverged = false;
    block.ended = block.arrived = 0;
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
      cluster.ready.push_back(&thread);
    }
  }
  if (current_schedule.order == Order::kReverse) {
    std::reverse(cluster.ready.begin(), cluster.ready.end());
  }
}

// Threads that a fault left on their stacks are not run to their end.
void abandon_threads() {
  for (const auto& block : cluster.blocks) {
    for (Thread& thread : block->threads) {
      if (!thread.fiber) continue;
      thread.fiber->reset();
      fibers.give_back(thread.fiber);
      thread.fiber = nullptr;
    }
  }
}

}  // namespace

std::string Site::str() const {
  const char* name = std::strrchr(file, '/');
  return std::string(name ? name + 1 : file) + ":" + std::to_string(line);
}

void set_schedule(const Schedule& schedule) {
  const std::lock_guard<std::mutex> lock(one_launch);
  current_schedule = schedule;
  cluster.random.seed(schedule.seed);
}

void set_device_limits(const DeviceLimits& new_limits) { limits = new_limits; }

const Schedule& schedule() { return current_schedule; }
Thread& this_thread() { return *running; }
Cluster& this_cluster() { return cluster; }

// Early or late, by the schedule.
bool is_early() {
  return current_schedule.order == Order::kRandom ? cluster.random() & 1
                                                  : current_schedule.early_copies;
}

void fail(const std::string& message, const Site& site) {
  throw Fault(message + "\n" + block_name(*running->block) + ", thread " +
              std::to_string(running->index) + " (" + site.str() + ")");
}

void require(bool condition, const char* message, const Site& site) {
  if (!condition) fail(message, site);
}

void require_capability(int capability, const char* what, const Site& site) {
  if (limits.capability >= capability) return;
  fail(std::string(what) + " needs compute capability " + std::to_string(capability) +
           ", and the device has " + std::to_string(limits.capability),
       site);
}

void wait(const char* what, const Site& site) {
  Thread* self = running;
  self->waits_at = what;
  self->site = site;
  Thread* next = next_thread();
  if (next != self) resume(next);
}

void sync_block(const Site& site) {
  Thread& thread = *running;
  Block& block = *thread.block;
  if (block.arrived == 0) block.site = site;
  block.diverged |= block.site != site;
  if (++block.arrived == int(block.threads.size()) && !block.diverged) {
    block.arrived = 0;
    make_ready(block.threads.size(), [&](size_t i) { return &block.threads[i]; });
  }
  wait("sync_block", site);
}

const void* warp_exchange(const char* what, const void* in, size_t bytes, void (*exchange)(Warp&),
                          const Site& site) {
  Thread& thread = *running;
  Warp& warp = thread.block->warps[size_t(thread.index / kWarp)];
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

void check_grid(const Grid& grid) {
  const auto check = [](bool condition, const char* what, int64_t is, int64_t limit) {
    if (condition) return;
    throw Fault(std::string(what) + " is " + std::to_string(is) + ", the limit is " +
                std::to_string(limit));
  };
  const Blocks& blocks = grid.blocks;
  check(blocks.x > 0 && blocks.x <= kMaxBlocks, "the grid's number of blocks along x", blocks.x,
        kMaxBlocks);
  check(blocks.y > 0 && blocks.y <= kMaxBlocksYZ, "the grid's number of blocks along y", blocks.y,
        kMaxBlocksYZ);
  check(blocks.z > 0 && blocks.z <= kMaxBlocksYZ, "the grid's number of blocks along z", blocks.z,
        kMaxBlocksYZ);
  check(grid.threads > 0 && grid.threads <= kMaxThreads, "the block's number of threads",
        grid.threads, kMaxThreads);
  check(grid.shared_bytes >= 0 && grid.shared_bytes <= limits.shared_bytes,
        "the block's shared memory in bytes", grid.shared_bytes, limits.shared_bytes);
  const int max_cluster = limits.capability >= 90 ? kMaxCluster : 1;
  check(grid.cluster > 0 && grid.cluster <= max_cluster, "the cluster's number of blocks",
        grid.cluster, max_cluster);
  if (blocks.x % grid.cluster != 0) {
    throw Fault("the grid has " + std::to_string(blocks.x) + " blocks along x, no multiple of " +
                std::to_string(grid.cluster) + ", the cluster's");
  }
}

void run_grid(const Call& new_call, const Grid& grid, const Site& site) {
  const std::lock_guard<std::mutex> lock(one_launch);
  try {
    check_grid(grid);
    call = &new_call;
    blockDim = {unsigned(grid.threads), 1, 1};
    gridDim = {unsigned(grid.blocks.x), unsigned(grid.blocks.y), unsigned(grid.blocks.z)};
    const int64_t clusters_x = grid.blocks.x / grid.cluster;
    const int64_t clusters = clusters_x * grid.blocks.y * grid.blocks.z;
    std::vector<int64_t> shuffled;
    if (current_schedule.order == Order::kRandom) {
      for (int64_t i = 0; i < clusters; ++i) shuffled.push_back(i);
      std::shuffle(shuffled.begin(), shuffled.end(), cluster.random);
    }
    for (int64_t i = 0; i < clusters; ++i) {
      const int64_t c = !shuffled.empty()                           ? shuffled[size_t(i)]
                        : current_schedule.order == Order::kReverse ? clusters - 1 - i
                                                                    : i;
      prepare(grid,
              {unsigned(c % clusters_x * grid.cluster), unsigned(c / clusters_x % grid.blocks.y),
               unsigned(c / clusters_x / grid.blocks.y)});
      run_cluster();
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

DeviceLimits emulated_limits() { return limits; }

}  // namespace fastbptt::emulation
