// How long the pieces of a recurrent step's chain take on this card, as JSON on the terminal:
// launches, and barriers and exchanges within a block, a cluster and the grid. A step of a kernel
// can be no shorter than the one exchange of h that it makes.
//
//     nvcc -O3 -std=c++17 -arch=sm_90a -o gpu_probe benchmarks/gpu_probe.cu && ./gpu_probe
//
// Each loop hands a value from thread to thread, so that no step can begin before the last one's
// exchange is over. Cluster loops exist from sm_90 on; elsewhere their times are null.

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {

constexpr int kSteps = 20000, kRepeats = 5, kMaxCluster = 16;

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

__global__ void empty_kernel() {}

// A step: a barrier and nothing else.
__global__ void block_barrier_kernel(int steps, int*) {
  for (int k = 0; k < steps; ++k) __syncthreads();
}

// A step: every thread writes a value, waits, and reads its neighbour's from shared memory.
__global__ void block_exchange_kernel(int steps, int* out) {
  __shared__ int h[2][1024];
  int value = threadIdx.x;
  const int peer = (threadIdx.x + 33) % blockDim.x;
  for (int k = 0; k < steps; ++k) {
    h[k & 1][threadIdx.x] = value;
    __syncthreads();
    value = h[k & 1][peer] + 1;
  }
  if (value < 0) *out = value;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define PROBE_CLUSTER 1

__device__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ uint32_t cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

__device__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

// The same address in another block of the cluster.
__device__ uint32_t map_shared(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

__device__ void wait_barrier(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}
#endif

// Each cluster kernel writes 1 to `there` if it was compiled for a card that has clusters.
__global__ void cluster_barrier_kernel(int steps, int* there) {
#ifdef PROBE_CLUSTER
  for (int k = 0; k < steps; ++k) sync_cluster();
  if (blockIdx.x + threadIdx.x == 0) *there = 1;
#endif
}

// A step: every block puts a value a lane into the next block's shared memory; cluster barrier.
__global__ void cluster_exchange_kernel(int steps, int* there) {
#ifdef PROBE_CLUSTER
  __shared__ int h[2][1024];
  int value = threadIdx.x;
  const uint32_t next = (cluster_rank() + 1) % cluster_size();
  const uint32_t base = map_shared(shared_address(&h[0][threadIdx.x]), next);
  sync_cluster();
  for (int k = 0; k < steps; ++k) {
    const uint32_t address = base + (k & 1) * sizeof(h[0]);
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
    sync_cluster();
    value = h[k & 1][threadIdx.x] + 1;
  }
  sync_cluster();  // a peer may still write here
  if (blockIdx.x + threadIdx.x == 0) *there = value < 0 ? 2 : 1;
#endif
}

// A step: every block pushes 128 bytes to each block of the cluster, itself too, with stores that
// complete on the receiver's barrier; the block goes on when all have come. One warp a peer.
__global__ void cluster_push_kernel(int steps, int* there) {
#ifdef PROBE_CLUSTER
  __shared__ int h[2][kMaxCluster][32];
  __shared__ alignas(8) uint64_t barriers[2];
  const uint32_t size = cluster_size(), rank = cluster_rank();
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (uint64_t& barrier : barriers) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barrier))
                   : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  sync_cluster();
  const uint32_t target = map_shared(shared_address(&h[0][rank][lane]), warp);
  const uint32_t target_barrier = map_shared(shared_address(&barriers[0]), warp);
  const uint32_t own_barrier = shared_address(&barriers[0]);
  int value = threadIdx.x;
  for (int k = 0; k < steps; ++k) {
    const uint32_t buffer = k & 1;
    if (threadIdx.x == 0) {
      asm volatile(
          "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(own_barrier + 8 * buffer),
          "r"(128 * size)
          : "memory");
    }
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(
                     target + buffer * static_cast<uint32_t>(sizeof(h[0]))),
                 "r"(value), "r"(target_barrier + 8 * buffer)
                 : "memory");
    wait_barrier(own_barrier + 8 * buffer, (k >> 1) & 1);
    value = h[buffer][(warp + 1) % size][lane] + 1;
    // The next push of a warp says that all of its block have read: two buffers need no more.
    __syncthreads();
  }
  sync_cluster();
  if (blockIdx.x + threadIdx.x == 0) *there = value < 0 ? 2 : 1;
#endif
}

// A step: a barrier over all blocks, by cooperative groups.
__global__ void grid_barrier_kernel(int steps, int*) {
  cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  for (int k = 0; k < steps; ++k) grid.sync();
}

// A step: a barrier over all blocks, by one counter that only grows.
__global__ void grid_counter_kernel(int steps, int* counter) {
  for (int k = 1; k <= steps; ++k) {
    __syncthreads();
    if (threadIdx.x == 0) {
      asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
      int seen = 0;
      do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
      } while (seen < k * static_cast<int>(gridDim.x));
    }
    __syncthreads();
  }
}

using Kernel = void (*)(int, int*);

struct Launch {
  int blocks = 1, threads = 128, cluster = 1;
  bool cooperative = false;
};

class Probe {
 public:
  Probe() {
    check(cudaMalloc(&word_, sizeof(int)), "cudaMalloc");
    check(cudaEventCreate(&begin_), "cudaEventCreate");
    check(cudaEventCreate(&end_), "cudaEventCreate");
  }

  // Nanoseconds a step: the least of some runs, or -1 where the kernel cannot run.
  double step_ns(Kernel kernel, const Launch& how) {
    if (how.cluster > 1 && !fits(kernel, how)) return -1;
    run(kernel, how, 10);
    if (how.cluster > 1) {
      int there = 0;
      check(cudaMemcpy(&there, word_, sizeof(int), cudaMemcpyDeviceToHost), "cudaMemcpy");
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

 private:
  static cudaLaunchConfig_t config(const Launch& how, cudaLaunchAttribute* attribute) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(how.blocks);
    config.blockDim = dim3(how.threads);
    config.attrs = attribute;
    if (how.cluster > 1) {
      attribute->id = cudaLaunchAttributeClusterDimension;
      attribute->val.clusterDim.x = how.cluster;
      attribute->val.clusterDim.y = attribute->val.clusterDim.z = 1;
      config.numAttrs = 1;
    } else if (how.cooperative) {
      attribute->id = cudaLaunchAttributeCooperative;
      attribute->val.cooperative = 1;
      config.numAttrs = 1;
    }
    return config;
  }

  static bool fits(Kernel kernel, const Launch& how) {
    int device = 0, major = 0, clusters = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "attribute");
    if (major < 9) return false;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cudaFuncSetAttribute");
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t launch = config(how, &attribute);
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch) != cudaSuccess) {
      cudaGetLastError();  // forget it: this size is not to be had
      return false;
    }
    return clusters > 0;
  }

  float run(Kernel kernel, const Launch& how, int steps) {
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t launch = config(how, &attribute);
    float ms = 0;
    check(cudaMemset(word_, 0, sizeof(int)), "cudaMemset");
    check(cudaEventRecord(begin_), "cudaEventRecord");
    check(cudaLaunchKernelEx(&launch, kernel, steps, word_), "cudaLaunchKernelEx");
    check(cudaEventRecord(end_), "cudaEventRecord");
    check(cudaEventSynchronize(end_), "a kernel of the probe");
    check(cudaEventElapsedTime(&ms, begin_, end_), "cudaEventElapsedTime");
    return ms;
  }

  int* word_ = nullptr;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

void print(const char* name, int size, double ns) {
  if (ns < 0) {
    std::printf(",\n \"%s_%d\": null", name, size);
  } else {
    std::printf(",\n \"%s_%d\": %.1f", name, size, ns);
  }
}

}  // namespace

int main() {
  int device = 0, processors = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "attribute");
  Probe probe;
  std::printf("{\"launch_us\": %.3f, \"launch_round_trip_us\": %.3f, \"graph_kernel_us\": %.3f",
              probe.launch_us(), probe.round_trip_us(), probe.graph_us());
  for (int threads : {128, 256, 512, 1024}) {
    print("block_barrier_ns", threads, probe.step_ns(block_barrier_kernel, {1, threads}));
    print("block_exchange_ns", threads, probe.step_ns(block_exchange_kernel, {1, threads}));
  }
  for (int size : {2, 4, 8, kMaxCluster}) {
    print("cluster_barrier_ns", size, probe.step_ns(cluster_barrier_kernel, {size, 256, size}));
    print("cluster_exchange_ns", size, probe.step_ns(cluster_exchange_kernel, {size, 256, size}));
    print("cluster_push_ns", size, probe.step_ns(cluster_push_kernel, {size, 32 * size, size}));
  }
  for (int blocks : {16, 64, processors}) {
    print("grid_barrier_ns", blocks, probe.step_ns(grid_barrier_kernel, {blocks, 256, 1, true}));
    print("grid_counter_ns", blocks, probe.step_ns(grid_counter_kernel, {blocks, 256, 1, true}));
  }
  std::printf("}\n");
  return 0;
}
