// What a kernel is launched with.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace fastbptt {

constexpr int kWarp = 32;  // threads

struct Blocks {
  int64_t x, y = 1, z = 1;
};

// As in Grid{{blocks}, threads, shared_bytes, cluster, cooperative}.
struct Grid {
  Blocks blocks;
  int threads;               // a block, along x
  int64_t shared_bytes = 0;  // a block
  int cluster = 1;           // blocks of a cluster, along x: a divisor of blocks.x
  // All blocks run at the same time, so that they may wait for each other. The launch is refused if
  // there are more than resident_clusters() clusters.
  bool cooperative = false;
};

// A kernel could not be launched, and the device is as it was: another kernel may run instead.
class LaunchError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct DeviceLimits {
  int capability;        // compute capability, 10 * major + minor
  int multiprocessors;   // SMs
  int64_t shared_bytes;  // the most that a block can ask for
};

}  // namespace fastbptt
