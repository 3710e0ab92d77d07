// What the emulated device can run.
#include <string>

#include "emulation/launch.h"
#include "emulation/runtime.h"

namespace fastbptt::emulation {
namespace {

constexpr int kMaxThreads = 1024, kMaxCluster = 16;
constexpr int64_t kMaxBlocks = (int64_t(1) << 31) - 1, kMaxBlocksYZ = 65535;
// Of the emulation: a stack is two mappings, and a process may have 65,530 of them.
constexpr int64_t kMaxThreadsAtOnce = 30 << 10;

DeviceLimits limits{90, 132, 232448};  // an H100's

void check(bool condition, const char* what, int64_t is, int64_t limit) {
  if (condition) return;
  throw Fault(std::string(what) + " is " + std::to_string(is) + ", the limit is " +
              std::to_string(limit));
}

void check_blocks(const Grid& grid) {
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

int64_t count_resident(const Grid& grid) { return limits.multiprocessors / grid.cluster; }

}  // namespace

void set_device_limits(const DeviceLimits& new_limits) { limits = new_limits; }

DeviceLimits emulated_limits() { return limits; }

void require_capability(int capability, const char* what, const Site& site) {
  if (limits.capability >= capability) return;
  fail(std::string(what) + " needs compute capability " + std::to_string(capability) +
           ", and the device has " + std::to_string(limits.capability),
       site);
}

int64_t count_blocks(const Grid& grid) { return grid.blocks.x * grid.blocks.y * grid.blocks.z; }

void check_grid(const Grid& grid) {
  check_blocks(grid);
  if (!grid.cooperative) return;
  const int64_t blocks = count_blocks(grid), most = count_resident(grid) * grid.cluster;
  check(blocks <= most, "the cooperative grid's number of blocks", blocks, most);
  check(blocks * grid.threads <= kMaxThreadsAtOnce,
        "the number of threads that the emulation is to run at once", blocks * grid.threads,
        kMaxThreadsAtOnce);
}

int64_t resident_clusters(const Grid& grid) {
  try {
    check_blocks(grid);
  } catch (const Fault&) {
    return 0;
  }
  return count_resident(grid);
}

}  // namespace fastbptt::emulation
