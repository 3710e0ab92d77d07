// What blocks of a cluster share: its barrier, mbarriers, distributed shared memory.
#include <algorithm>
#include <sstream>

#include "emulation/scheduler.h"

namespace fastbptt::emulation {
namespace {

// In the 64 bits of an mbarrier stands which of its block's records is meant.
constexpr uint64_t kMark = 0xba221e20'00000000u;

constexpr int kSm90 = 90;
constexpr int kAddressBits = 24;

int cluster_size() { return int(this_cluster().blocks.size()); }

Block* owner(const Cluster& cluster, const void* address, size_t bytes) {
  for (const auto& block : cluster.blocks) {
    if (block->holds(address, bytes)) return block.get();
  }
  return nullptr;
}

// The record of an mbarrier of the cluster, or null if that is none.
MBarrier* find(const Cluster& cluster, const void* address) {
  Block* block = owner(cluster, address, 8);
  if (!block || uintptr_t(address) % 8 != 0) return nullptr;
  uint64_t word;
  std::memcpy(&word, address, 8);
  const uint64_t index = word - kMark;
  if (index >= block->barriers.size()) return nullptr;
  MBarrier& barrier = block->barriers[index];
  return barrier.address == address ? &barrier : nullptr;
}

MBarrier& get(const void* address, const Site& site) {
  MBarrier* barrier = find(this_cluster(), address);
  require(barrier, "an mbarrier that is not initialised", site);
  return *barrier;
}

void complete_phase(MBarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  make_ready(barrier.waiting.size(), [&](size_t i) { return barrier.waiting[i]; });
  barrier.waiting.clear();
}

void arrive(MBarrier& barrier, const Site& site) {
  require(barrier.pending > 0, "more arrivals in a phase of an mbarrier than its count", site);
  --barrier.pending;
  complete_phase(barrier);
}

void deliver(const Store& store) {
  MBarrier* barrier = find(*store.block->cluster, store.barrier);
  const char* fault = store.block->has_ended() ? "store_async gets to a block that has ended"
                      : !store.block->started  ? "store_async gets to a block that has not begun"
                      : !barrier ? "store_async to an mbarrier that is not initialised"
                                 : nullptr;
  if (fault) throw Fault(std::string(fault) + " (" + store.site.str() + ")");
  std::memcpy(store.to, store.value, size_t(store.bytes));
  barrier->bytes -= store.bytes;
  complete_phase(*barrier);
}

// barrier.cluster's instructions are aligned: a warp's lanes execute them together.
void check_alignment(Thread& thread, const Site& site) {
  Warp& warp = thread.block->warps[size_t(thread.index / kWarp)];
  const int first = thread.index - thread.lane();
  const int lanes = std::min(kWarp, int(thread.block->threads.size()) - first);
  if (warp.cluster_arrived == 0) warp.cluster_site = site;
  require(warp.cluster_site == site,
          "lanes of a warp arrive at the cluster's barrier at different places", site);
  if (++warp.cluster_arrived == lanes) warp.cluster_arrived = 0;
}

}  // namespace

void cluster_arrive(const Site& site) {
  require_capability(kSm90, "cluster_arrive or sync_cluster", site);
  Thread& thread = this_thread();
  Cluster& cluster = this_cluster();
  require(!thread.cluster_arrived, "cluster_arrive twice without cluster_wait between", site);
  check_alignment(thread, site);
  thread.cluster_arrived = true;
  thread.cluster_phase = cluster.phase;
  if (++cluster.arrived < cluster.threads) return;
  cluster.arrived = 0;
  ++cluster.phase;
  std::vector<Thread*> waiting;
  for (const auto& block : cluster.blocks) {
    for (Thread& other : block->threads) {
      if (other.waits_for == &cluster) waiting.push_back(&other);
    }
  }
  make_ready(waiting.size(), [&](size_t i) { return waiting[i]; });
}

void cluster_wait(const Site& site) {
  require_capability(kSm90, "cluster_wait", site);
  Thread& thread = this_thread();
  Cluster& cluster = this_cluster();
  require(thread.cluster_arrived, "cluster_wait without cluster_arrive before", site);
  if (cluster.phase == thread.cluster_phase) {
    thread.waits_for = &cluster;
    wait("cluster_wait", site);
    thread.waits_for = nullptr;
  }
  thread.cluster_arrived = false;
}

void* map_shared(const void* address, int rank, const Site& site) {
  require_capability(kSm90, "map_shared", site);
  const Block& block = *this_thread().block;
  const auto& blocks = this_cluster().blocks;
  require(block.holds(address, 0),
          "map_shared of an address outside of the block's own shared memory", site);
  require(rank >= 0 && rank < int(blocks.size()), "map_shared to a rank that the cluster has not",
          site);
  const Block& other = *blocks[size_t(rank)];
  require(!other.has_ended(), "map_shared to a block that has ended", site);
  return other.shared + (static_cast<const unsigned char*>(address) - block.shared);
}

uint32_t cluster_address(const void* pointer, const Site& site) {
  const Block* block = owner(this_cluster(), pointer, 1);
  require(block, "an address outside of the cluster's shared memory", site);
  return uint32_t(block->rank) << kAddressBits |
         uint32_t(uintptr_t(pointer) - uintptr_t(block->shared));
}

uint32_t map_address(uint32_t address, int rank, const Site& site) {
  require_capability(kSm90, "map_address", site);
  require(rank >= 0 && rank < cluster_size(), "map_address to a block that the cluster has not",
          site);
  return uint32_t(rank) << kAddressBits | (address & ((1u << kAddressBits) - 1));
}

void* pointer_to(uint32_t address, const Site& site) {
  const uint32_t rank = address >> kAddressBits;
  require(int(rank) < cluster_size(), "an address in no block of the cluster", site);
  const Block& block = *this_cluster().blocks[rank];
  require(!block.has_ended(), "an address in a block that has ended", site);
  return block.shared + (address & ((1u << kAddressBits) - 1));
}

void barrier_init(uint64_t* barrier, int count, const Site& site) {
  require_capability(kSm90, "barrier_init", site);
  Block& block = *this_thread().block;
  require(block.holds(barrier, 8), "an mbarrier outside of the block's shared memory", site);
  require(uintptr_t(barrier) % 8 == 0, "an mbarrier that is not aligned to 8 bytes", site);
  require(count > 0 && count < 1 << 20, "an mbarrier's count must be from 1 to 2^20 - 1", site);
  require(!find(*block.cluster, barrier), "an mbarrier that is initialised twice", site);
  const uint64_t word = kMark + block.barriers.size();
  std::memcpy(barrier, &word, 8);
  block.barriers.push_back({barrier, count, count, 0, 0, &this_thread(), false, {}});
}

void fence_barrier_init() {
  for (MBarrier& barrier : this_thread().block->barriers) {
    barrier.announced |= barrier.made_by == &this_thread();
  }
}

void barrier_arrive(uint64_t* barrier, int64_t bytes, int arrivals, const Site& site) {
  require_capability(kSm90, "barrier_arrive", site);
  require(this_thread().block->holds(barrier, 8),
          "an mbarrier outside of the block's shared memory", site);
  MBarrier& record = get(barrier, site);
  record.bytes += bytes;
  if (arrivals > 0) arrive(record, site);
}

void barrier_arrive_remote(uint64_t* barrier, int rank, const Site& site) {
  MBarrier& record = get(map_shared(barrier, rank, site), site);
  require(record.announced, "fence_barrier_init is missing before another block uses an mbarrier",
          site);
  arrive(record, site);
}

void barrier_wait(uint64_t* barrier, int parity, const Site& site) {
  require_capability(kSm90, "barrier_wait", site);
  Thread& thread = this_thread();
  require(thread.block->holds(barrier, 8), "an mbarrier outside of the block's shared memory",
          site);
  require(parity == 0 || parity == 1, "an mbarrier's parity must be 0 or 1", site);
  MBarrier& record = get(barrier, site);
  while (int(record.phase & 1) == parity) {
    record.waiting.push_back(&thread);
    thread.waits_for = barrier;
    wait("barrier_wait", site);
    thread.waits_for = nullptr;
  }
}

void store_async(void* to, const void* value, int bytes, const void* barrier, const Site& site) {
  require_capability(kSm90, "store_async", site);
  Block* block = owner(this_cluster(), to, size_t(bytes));
  require(block, "store_async to outside of the cluster's shared memory", site);
  require(uintptr_t(to) % unsigned(bytes) == 0, "store_async to a place that is not aligned", site);
  require(block->holds(barrier, 8), "store_async to one block with an mbarrier of another", site);
  const MBarrier& record = get(barrier, site);
  require(record.announced || block == this_thread().block,
          "fence_barrier_init is missing before another block uses an mbarrier", site);
  Store store{block, to, bytes, {}, barrier, site};
  std::memcpy(store.value, value, size_t(bytes));
  if (is_early()) return deliver(store);
  wave().stores.push_back(store);
}

bool deliver_stores(bool idle) {
  auto& stores = wave().stores;
  auto& chance = wave().random;
  if (stores.empty()) return false;
  const bool random = schedule().order == Order::kRandom;
  if (!idle && !(random && chance() % 4 == 0)) return false;
  const size_t index = random ? chance() % stores.size() : 0;
  const Store store = stores[index];
  stores.erase(stores.begin() + std::ptrdiff_t(index));
  deliver(store);
  return true;
}

std::string describe_barrier(const Thread& thread) {
  const MBarrier* record = find(*thread.block->cluster, thread.waits_for);
  if (!record) return "";
  std::ostringstream text;
  text << " for phase " << record->phase << " of an mbarrier, which lacks " << record->pending
       << " of " << record->count << " arrivals and " << record->bytes << " bytes";
  return text.str();
}

}  // namespace fastbptt::emulation
