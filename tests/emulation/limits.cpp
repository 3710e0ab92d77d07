// What the emulated device can run.
#include <algorithm>
#include <numeric>
#include <string>

#include "emulation/launch.h"
#include "emulation/runtime.h"

namespace fastbptt::emulation {
namespace {

constexpr int kMaxThreads = 1024, kMaxCluster = 16;
constexpr int64_t kMaxBlocks = (int64_t(1) << 31) - 1, kMaxBlocksYZ = 65535;
// Of the emulation: a stack is two mappings, and a process may have 65,530 of them.
constexpr int64_t kMaxThreadsAtOnce = 30 << 10;

// Of an SM.
constexpr int64_t kResidentThreads = 2048, kResidentBlocks = 32, kRegisters = 65536;
constexpr int64_t kRegistersOfThread = 128;  // no kernel has more
constexpr int64_t kReserved = 1024;          // bytes of shared memory that the system takes a block

DeviceLimits limits{90, 132, 232448};  // an H100's
Die die;
int device = 0;
int64_t asked = 0;
bool refuses = false;

bool has_clusters() { return limits.capability >= 90 && (die.code == 0 || die.code >= 90); }

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
  const int max_cluster = has_clusters() ? kMaxCluster : 1;
  check(grid.cluster > 0 && grid.cluster <= max_cluster, "the cluster's number of blocks",
        grid.cluster, max_cluster);
  if (blocks.x % grid.cluster != 0) {
    throw Fault("the grid has " + std::to_string(blocks.x) + " blocks along x, no multiple of " +
                std::to_string(grid.cluster) + ", the cluster's");
  }
}

int64_t blocks_of_sm(const Grid& grid) {
  const int64_t threads = int64_t(grid.threads + kWarp - 1) / kWarp * kWarp;
  return std::min({(limits.shared_bytes + kReserved) / (grid.shared_bytes + kReserved),
                   kResidentThreads / threads, kRegisters / (kRegistersOfThread * threads),
                   kResidentBlocks});
}

int64_t count_resident(const Grid& grid) {
  if (die.gpcs.empty()) return limits.multiprocessors / grid.cluster;
  int64_t clusters = 0;
  for (const int sms : die.gpcs) clusters += sms / grid.cluster;
  return clusters * blocks_of_sm(grid);
}

}  // namespace

void set_device_limits(const DeviceLimits& new_limits, const Die& new_die) {
  const auto& gpcs = new_die.gpcs;
  if (!gpcs.empty() && std::accumulate(gpcs.begin(), gpcs.end(), 0) != new_limits.multiprocessors) {
    throw std::invalid_argument("the GPCs' SMs must add up to the device's " +
                                std::to_string(new_limits.multiprocessors));
  }
  limits = new_limits;
  die = new_die;
  ++device;
}

DeviceLimits emulated_limits() { return limits; }
int emulated_device() { return device; }

void require_capability(int capability, const char* what, const Site& site) {
  const std::string needs =
      std::string(what) + " needs compute capability " + std::to_string(capability) + ", and the ";
  if (limits.capability < capability) {
    fail(needs + "device has " + std::to_string(limits.capability), site);
  }
  if (die.code != 0 && die.code < capability) {
    fail(needs + "code is compiled for " + std::to_string(die.code), site);
  }
}

int64_t count_blocks(const Grid& grid) { return grid.blocks.x * grid.blocks.y * grid.blocks.z; }

void check_grid(const Grid& grid) {
  if (refuses && grid.shared_bytes > 0) throw LaunchError("a planted fault");
  check_blocks(grid);
  if (!grid.cooperative) return;
  const int64_t blocks = count_blocks(grid), most = count_resident(grid) * grid.cluster;
  check(blocks <= most, "the cooperative grid's number of blocks", blocks, most);
  check(blocks * grid.threads <= kMaxThreadsAtOnce,
        "the number of threads that the emulation is to run at once", blocks * grid.threads,
        kMaxThreadsAtOnce);
}

int64_t questions() { return asked; }
void refuse_launches(bool refuse) { refuses = refuse; }

int64_t resident_clusters(const Grid& grid) {
  ++asked;
  try {
    check_blocks(grid);
  } catch (const Fault&) {
    return 0;
  }
  return count_resident(grid);
}

}  // namespace fastbptt::emulation
