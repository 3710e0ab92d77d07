// How long the pieces of a recurrent step's chain take on this card, as JSON on the terminal, a line
// as soon as it is known: launches, barriers and exchanges within a block, a cluster and the grid, and
// products. And how many clusters it runs at once. A step of a kernel can be no shorter than the one
// exchange of h that it makes.
//
//     nvcc -O3 -std=c++17 -arch=sm_90 -I csrc -o gpu_probe benchmarks/gpu/probe.cu && ./gpu_probe
//
// Cluster loops exist from sm_90 on; elsewhere their times are null.

#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "probe_kernels.cuh"

namespace {

constexpr int kSteps = 20000, kRepeats = 5, kMaxCluster = 16;
constexpr int kMostBlocks = 1024, kMostBytes = 32 << 10;

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

int attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

using Kernel = void (*)(Args);

struct Launch {
  int blocks = 1, threads = 128, cluster = 1;
  bool cooperative = false;
  int bytes = 0;         // of Args
  int shared_bytes = 0;  // dynamic
};

class Probe {
 public:
  Probe() {
    check(cudaMalloc(&args_.word, sizeof(int)), "cudaMalloc");
    check(cudaMalloc(&args_.flags, kMostBlocks * sizeof(uint32_t)), "cudaMalloc");
    check(cudaMalloc(&args_.buffer, 2 * kMostBytes), "cudaMalloc");
    check(cudaEventCreate(&begin_), "cudaEventCreate");
    check(cudaEventCreate(&end_), "cudaEventCreate");
  }

  // Nanoseconds a step: the least of some runs, or -1 where the kernel cannot run.
  double step_ns(Kernel kernel, const Launch& how) {
    if (how.cluster > 1 && clusters_at_once(kernel, how) * how.cluster < how.blocks) return -1;
    if (run(kernel, how, 10) < 0) return -1;
    if (how.cluster > 1 && !how.cooperative) {
      int there = 0;
      check(cudaMemcpy(&there, args_.word, sizeof(int), cudaMemcpyDeviceToHost), "cudaMemcpy");
      if (there == 0) return -1;
    }
    // Two lengths, so that what a launch costs drops out.
    float least = 1e30f, least_short = 1e30f;
    for (int i = 0; i < kRepeats; ++i) {
      least = std::min(least, run(kernel, how, kSteps));
      least_short = std::min(least_short, run(kernel, how, kSteps / 10));
    }
    return 1e6 * (least - least_short) / (kSteps - kSteps / 10);
  }

  // Microseconds a launch of an empty kernel, one after another, on the card's own clock.
  double launch_us() {
    empty_kernel<<<1, 32>>>();
    float ms = 0;
    check(cudaEventRecord(begin_), "cudaEventRecord");
    for (int i = 0; i < 2000; ++i) empty_kernel<<<1, 32>>>();
    check(cudaEventRecord(end_), "cudaEventRecord");
    check(cudaEventSynchronize(end_), "an empty kernel");
    check(cudaEventElapsedTime(&ms, begin_, end_), "cudaEventElapsedTime");
    return ms / 2;
  }

  // Microseconds from a launch until the host knows that it is done.
  double round_trip_us() {
    using Clock = std::chrono::steady_clock;
    double least = 1e30;
    for (int i = 0; i < 200; ++i) {
      const Clock::time_point start = Clock::now();
      empty_kernel<<<1, 32>>>();
      check(cudaDeviceSynchronize(), "an empty kernel");
      least = std::min(least, std::chrono::duration<double>(Clock::now() - start).count());
    }
    return 1e6 * least;
  }

  // Microseconds a kernel of a graph of empty kernels, each after the one before.
  double graph_us() {
    constexpr int kNodes = 1000;
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    check(cudaStreamCreate(&stream), "cudaStreamCreate");
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    for (int i = 0; i < kNodes; ++i) empty_kernel<<<1, 32, 0, stream>>>();
    check(cudaStreamEndCapture(stream, &graph), "capture");
    check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
    float least = 1e30f;
    for (int i = 0; i < kRepeats; ++i) {
      float ms = 0;
      check(cudaEventRecord(begin_, stream), "cudaEventRecord");
      check(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
      check(cudaEventRecord(end_, stream), "cudaEventRecord");
      check(cudaEventSynchronize(end_), "a graph of empty kernels");
      check(cudaEventElapsedTime(&ms, begin_, end_), "cudaEventElapsedTime");
      least = std::min(least, ms);
    }
    check(cudaGraphExecDestroy(executable), "cudaGraphExecDestroy");
    check(cudaGraphDestroy(graph), "cudaGraphDestroy");
    check(cudaStreamDestroy(stream), "cudaStreamDestroy");
    return 1e3 * least / kNodes;
  }

  // Side by side; 0 where there are none.
  static int clusters_at_once(Kernel kernel, const Launch& how) {
    if (attribute(cudaDevAttrComputeCapabilityMajor) < 9) return 0;
    cudaLaunchAttribute attributes[2];
    const cudaLaunchConfig_t launch = config(how, attributes);
    int clusters = 0;
    if (!allow(kernel, how) ||
        cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch) != cudaSuccess) {
      cudaGetLastError();  // forget it: this size is not to be had
      return 0;
    }
    return clusters;
  }

 private:
  static cudaLaunchConfig_t config(const Launch& how, cudaLaunchAttribute (&attributes)[2]) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(how.blocks);
    config.blockDim = dim3(how.threads);
    config.dynamicSmemBytes = how.shared_bytes;
    config.attrs = attributes;
    if (how.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = how.cluster;
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    }
    if (how.cooperative) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
    return config;
  }

  // Whether the kernel may be launched so.
  static bool allow(Kernel kernel, const Launch& how) {
    constexpr int kPortable = 8;
    const bool is_portable = how.cluster <= kPortable;
    return (is_portable ||
            cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) ==
                cudaSuccess) &&
           cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                how.shared_bytes) == cudaSuccess;
  }

  // Milliseconds, or -1 where such a launch is not to be had.
  float run(Kernel kernel, const Launch& how, int steps) {
    cudaLaunchAttribute attributes[2];
    const cudaLaunchConfig_t launch = config(how, attributes);
    args_.steps = steps;
    args_.bytes = how.bytes;
    float ms = 0;
    check(cudaMemset(args_.word, 0, sizeof(int)), "cudaMemset");
    check(cudaMemset(args_.flags, 0, kMostBlocks * sizeof(uint32_t)), "cudaMemset");
    check(cudaMemset(args_.buffer, 0, 2 * kMostBytes), "cudaMemset");
    check(cudaEventRecord(begin_), "cudaEventRecord");
    if (!allow(kernel, how) || cudaLaunchKernelEx(&launch, kernel, args_) != cudaSuccess) {
      cudaGetLastError();  // forget it
      return -1;
    }
    check(cudaEventRecord(end_), "cudaEventRecord");
    check(cudaEventSynchronize(end_), "a kernel of the probe");
    check(cudaEventElapsedTime(&ms, begin_, end_), "cudaEventElapsedTime");
    return ms;
  }

  Args args_{};
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

// A line a value: what a run that is cut off has found stays.
void print(const std::string& name, double value) {
  if (value < 0) {
    std::printf("\"%s\": null,\n", name.c_str());
  } else {
    std::printf("\"%s\": %.3f,\n", name.c_str(), value);
  }
}

// The name ends with the number that the value is for.
void print(const std::string& name, int number, double value) {
  print(name + "_" + std::to_string(number), value);
}

// How many clusters of blocks as a persistent kernel has them run at once.
void print_clusters(int size, int kilobytes) {
  const Launch how{size, kThreads, size, false, 0, kilobytes << 10};
  print("clusters_at_once_with_" + std::to_string(kilobytes) + "_kb", size,
        Probe::clusters_at_once(persistent_shape_kernel, how));
}

void print_pushes(Probe& probe, int size) {
  for (int bytes : {512, 2 << 10, 8 << 10, 32 << 10}) {
    const Launch how{size, kThreads, size, false, bytes, 128 + 2 * bytes};
    print("cluster_push_" + std::to_string(bytes) + "_bytes_ns", size,
          probe.step_ns(cluster_push_kernel, how));
  }
}

}  // namespace

int main() {
  std::setvbuf(stdout, nullptr, _IOLBF, 1 << 12);
  std::printf("{\n");
  Probe probe;
  const int processors = attribute(cudaDevAttrMultiProcessorCount);
  cudaFuncAttributes shape;
  check(cudaFuncGetAttributes(&shape, persistent_shape_kernel), "cudaFuncGetAttributes");
  print("clusters_at_once_registers", shape.numRegs);
  for (int size : {2, 4, 8, kMaxCluster}) {
    for (int kilobytes : {100, 200}) print_clusters(size, kilobytes);
  }
  print("clock_mhz", 1e3 * kCycles / probe.step_ns(cycles_kernel, {}));
  print("launch_us", probe.launch_us());
  print("launch_round_trip_us", probe.round_trip_us());
  print("graph_kernel_us", probe.graph_us());
  for (int threads : {128, 256, 512, 1024}) {
    print("block_barrier_ns", threads, probe.step_ns(block_barrier_kernel, {1, threads}));
    print("block_exchange_ns", threads, probe.step_ns(block_exchange_kernel, {1, threads}));
  }
  for (int warps : {1, 4, 16}) {
    print("product_8_tiles_ns", warps, probe.step_ns(product_kernel<8>, {1, kWarp * warps}));
    print("product_2_tiles_ns", warps, probe.step_ns(product_kernel<2>, {1, kWarp * warps}));
  }
  for (int size : {2, 4, 8, kMaxCluster}) {
    print("cluster_barrier_ns", size, probe.step_ns(cluster_barrier_kernel, {size, 256, size}));
    print("cluster_exchange_ns", size, probe.step_ns(cluster_exchange_kernel, {size, 256, size}));
    print_pushes(probe, size);
  }
  for (int blocks : {16, 64, processors}) {
    print("grid_barrier_ns", blocks, probe.step_ns(grid_barrier_kernel, {blocks, 256, 1, true}));
    print("grid_counter_ns", blocks, probe.step_ns(grid_counter_kernel, {blocks, 256, 1, true}));
  }
  const int blocks = std::min(processors, 128);
  for (int bytes : {0, 4 << 10, 16 << 10, 32 << 10}) {
    const Launch how{blocks, kThreads, 1, true, bytes};
    print("grid_exchange_ns", bytes, probe.step_ns(grid_exchange_kernel, how));
  }
  // The same by as many clusters as there can be: whether a launch may be both, and what it costs.
  for (int size : {2, 4, 8, kMaxCluster}) {
    Launch how{size, kThreads, size, true, 16 << 10};
    const int most = Probe::clusters_at_once(grid_exchange_kernel, how);
    how.blocks = std::max(1, std::min(most, blocks / size)) * size;
    print("grid_of_clusters_exchange_ns", size, probe.step_ns(grid_exchange_kernel, how));
  }
  std::printf("\"complete\": 1}\n");
  return 0;
}
