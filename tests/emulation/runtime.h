// The machine on which the emulation runs kernels; device.h and launch.h are what kernels see of it.
//
// A block's threads are fibers of one thread of the host: one runs until it waits for others, at a
// barrier or a warp's collective, then another one does. The blocks of a cluster run together, and so
// do those of a whole cooperative grid; all else one after another.
//
// It proves, for the very source of the kernels: indexing and bounds (guard zones around shared memory
// and around what the glue allocates; both full of NaN until written), that every thread gets to the
// same barriers, that arrivals and bytes of an mbarrier add up, that asynchronous copies are waited
// for, fragment layouts, and results. A missing barrier shows where the order in which threads run
// changes what they read: run a kernel under several schedules.
// It does not prove the absence of races beyond the schedules tried; a collective orders more here
// than on a GPU (threads change over nowhere else, memory is always up to date), so that a missing
// fence or a too weak memory order passes: what a thread writes to global memory, all others read at
// once, whether an add_to_flag covers it or not, and by any load. Nor does it say anything about speed,
// registers, bank conflicts, or the rounding of the GPU's approximate functions and of its tensor
// cores' sums.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/grid.h"
#include "emulation/fiber.h"

// CUDA's built-in variables, of the thread that runs.
struct EmulatedIndex {
  unsigned x, y, z;
};
inline EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

namespace fastbptt {

namespace emulation {

// Thrown by launch() for every fault of a kernel that is found.
class Fault : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A place in the source. As a default argument it is that of the call.
struct Site {
  const char* file;
  int line;

  static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Site& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
  }
  bool operator!=(const Site& other) const { return !(*this == other); }
  std::string str() const;
};

// The order in which threads that can run do so (and blocks), and when asynchronous copies and stores
// are carried out: as early or as late as can be, or either way by chance if the order is random. Then
// some warp, another one from time to time, is far slower than the rest: chance alone would keep all
// threads nearly in step.
enum class Order { kForward, kReverse, kRandom };
struct Schedule {
  Order order = Order::kForward;
  bool early_copies = false;
  uint64_t seed = 0;
};

void set_schedule(const Schedule& schedule);

// What of a device limits a launch and is not among what it says of itself.
struct Die {
  int code = 0;  // the architecture that the kernels are compiled for, if less than the device's
  std::vector<int> gpcs;  // SMs of each; a cluster stays in one. None: no bounds between SMs
};
// From then on it is another device, see current_device().
void set_device_limits(const DeviceLimits& limits, const Die& die = {});
int64_t questions();
void refuse_launches(bool refuse);

// --- Memory --------------------------------------------------------------------------------------

constexpr unsigned char kPoison = 0xff;  // every floating-point number made of it is NaN
constexpr size_t kGuard = 4096;          // bytes on either side

// Global memory, poisoned, between guard zones. `what` names it in messages.
void* allocate_guarded(size_t bytes, const std::string& what);
void free_guarded(void* memory);
// Throws if a guard zone was written to since the last call, of memory that is freed by now too.
// Every launch() calls it at its end.
void check_guards();

// --- A launch --------------------------------------------------------------------------------------

struct Block;
struct Cluster;
struct Wave;

// An asynchronous copy to shared memory that is to be carried out.
struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool zero;
};

struct Thread {
  Block* block = nullptr;
  int index = 0;
  Fiber* fiber = nullptr;  // from its first step to its end
  bool ended = false;
  const char* waits_at = nullptr;  // the primitive's name, or null
  Site site{};
  const void* waits_for = nullptr;  // an mbarrier, a flag, or a cluster for its barrier
  uint32_t wanted = 0;              // of the flag
  std::vector<Copy> copies;         // of all groups that are not done, the oldest first
  std::vector<size_t> groups;       // copies in each committed group; the rest is not committed
  bool cluster_arrived = false;
  uint64_t cluster_phase = 0;  // the one it arrived in

  int lane() const { return index % kWarp; }
};

// Each lane puts something into `in`; the last one makes every lane's `out` of it. A lane has taken
// its `out` before the next exchange can be complete.
struct Warp {
  int arrived = 0;
  const char* what = nullptr;
  Site site{};
  bool diverged = false;
  Thread* threads[kWarp] = {};
  int cluster_arrived = 0;
  Site cluster_site{};
  alignas(16) unsigned char in[kWarp][48];
  alignas(16) unsigned char out[kWarp][16];
};

struct MBarrier {
  const void* address;
  int count;
  int pending;         // arrivals
  int64_t bytes = 0;   // expected and not there yet; may be negative for a while
  uint64_t phase = 0;  // how many are complete
  const Thread* made_by;
  bool announced = false;  // to the cluster, by fence_barrier_init
  std::vector<Thread*> waiting;
};

// Of all threads of a block, or of the first ones.
struct BlockBarrier {
  int arrived = 0, threads = 0;
  Site site{};
};

struct Block {
  Cluster* cluster = nullptr;
  int rank = 0;
  EmulatedIndex index{};
  std::vector<unsigned char> memory;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  bool started = false;
  int ended = 0;  // threads
  BlockBarrier all, first;
  bool diverged = false;  // of either
  std::deque<MBarrier> barriers;

  bool has_ended() const { return ended == int(threads.size()); }
  bool holds(const void* address, size_t bytes) const {
    const uintptr_t begin = uintptr_t(shared), at = uintptr_t(address);
    return at >= begin && bytes <= shared_bytes && at - begin <= shared_bytes - bytes;
  }
};

// A store_async on its way.
struct Store {
  Block* block;
  void* to;
  int bytes;
  unsigned char value[16];
  const void* barrier;
  Site site;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  int threads = 0, arrived = 0;
  uint64_t phase = 0;
};

// Clusters that run at the same time: one, or all of a cooperative grid.
struct Wave {
  std::deque<Cluster> clusters;
  bool cooperative = false;
  std::deque<Thread*> ready;
  std::vector<Store> stores;
  std::map<const uint32_t*, std::vector<Thread*>> waiting;  // by flag
  int64_t threads = 0, ended = 0;
  std::mt19937_64 random;
  const Warp* slow = nullptr;  // that the random order holds back
};

// A kernel with its arguments.
struct Call {
  void (*run)(const void* context);
  const void* context;
};

void run_grid(const Call& call, const Grid& grid, const Site& site);
int64_t count_blocks(const Grid& grid);
void check_grid(const Grid& grid);            // throws a Fault if the device cannot run it
int64_t resident_clusters(const Grid& grid);  // 0 if it cannot

// --- What the primitives are made of ---------------------------------------------------------------

Thread& this_thread();
const Schedule& schedule();
[[noreturn]] void fail(const std::string& message, const Site& site);
void require_capability(int capability, const char* what, const Site& site);
void require(bool condition, const char* message, const Site& site);

void sync_block(const Site& site);
void sync_first(int threads, const Site& site);

// The warp's exchange: `exchange` is called once, when all lanes are there. Gives the lane's `out`.
const void* warp_exchange(const char* what, const void* in, size_t bytes, void (*exchange)(Warp&),
                          const Site& site);

void copy_async(void* to, const void* from, int bytes, bool zero, const Site& site);
void commit_async();
void wait_async(int groups);

void cluster_arrive(const Site& site);
void cluster_wait(const Site& site);
void* map_shared(const void* address, int rank, const Site& site);
// Addresses of 32 bits: the block's rank, and what is beyond the begin of its shared memory.
uint32_t cluster_address(const void* pointer, const Site& site);
uint32_t map_address(uint32_t address, int rank, const Site& site);
void* pointer_to(uint32_t address, const Site& site);

void barrier_init(uint64_t* barrier, int count, const Site& site);
void fence_barrier_init();
void barrier_arrive(uint64_t* barrier, int64_t bytes, int arrivals, const Site& site);
void barrier_arrive_remote(uint64_t* barrier, int rank, const Site& site);
void barrier_wait(uint64_t* barrier, int parity, const Site& site);
void add_to_flag(uint32_t* flag, const Site& site);
void wait_flag(const uint32_t* flag, uint32_t value, const Site& site);

void store_async(void* to, const void* value, int bytes, const void* barrier, const Site& site);

}  // namespace emulation
}  // namespace fastbptt
