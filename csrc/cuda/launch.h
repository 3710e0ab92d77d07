// How the host starts kernels and asks the device for its limits.
//
// Calls that fail throw LaunchError, so that another kernel may be tried, unless nothing more can run in
// this process: then a std::runtime_error that is none.
#pragma once

#include "grid.h"

#ifdef FASTBPTT_EMULATED
#include "emulation/launch.h"
#else

#include <cuda_runtime_api.h>
#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>

namespace fastbptt {

using Stream = cudaStream_t;

inline std::string kernel_name(const void* kernel) {
  const char* mangled = nullptr;
#if CUDART_VERSION >= 12030
  if (cudaFuncGetName(&mangled, kernel) != cudaSuccess) cudaGetLastError();
#endif
  if (!mangled) return "a kernel";
  int status = 0;
  char* name = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  const std::string result = status == 0 ? name : mangled;
  std::free(name);
  return result;
}

// Whether every later call of the process fails with it too. By number: old toolkits lack some names.
inline bool is_sticky(cudaError_t error) {
  constexpr int kSticky[] = {226,   // contained
                             700,   // illegal address
                             702,   // launch timeout
                             710,   // assert
                             714,   // hardware stack error
                             715,   // illegal instruction
                             716,   // misaligned address
                             717,   // invalid address space
                             718,   // invalid program counter
                             719,   // launch failure
                             721,   // tensor memory leak
                             810,   // client of a multi-process server terminated
                             911};  // external device
  return std::find(std::begin(kSticky), std::end(kSticky), int(error)) != std::end(kSticky);
}

// what: the call, or the kernel that it was about.
[[noreturn]] inline void throw_error(cudaError_t error, const std::string& what) {
  cudaGetLastError();  // or the next call that asks for the last error would be blamed
  const std::string message = what + ": " + cudaGetErrorString(error);
  if (is_sticky(error)) throw std::runtime_error(message);
  throw LaunchError(message);
}

inline void check_cuda(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw_error(error, call);
}

inline void check_kernel(cudaError_t error, const void* kernel) {
  if (error != cudaSuccess) throw_error(error, kernel_name(kernel));
}

inline int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

inline int device_attribute(cudaDeviceAttr name) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, name, current_device()), "cudaDeviceGetAttribute");
  return value;
}

// Of the current device.
inline DeviceLimits device_limits() {
  return {10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
              device_attribute(cudaDevAttrComputeCapabilityMinor),
          device_attribute(cudaDevAttrMultiProcessorCount),
          device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

// What is known of a kernel on a device, and what it was allowed there.
struct KernelOnDevice {
  // Whether the code that runs there, which need not be compiled for it, can use clusters.
  bool has_clusters;
  int most_shared;  // bytes that a block can ask for
  bool shared_allowed = false;
  bool cluster_allowed = false;
};

// Allows, on the current device, what such a launch needs permission for. Each permission is given
// once, for as much as there is, and never taken back: it holds for all threads of the process, and
// another one may be about to launch the kernel with more.
inline KernelOnDevice prepare_kernel(const void* kernel, const Grid& grid) {
  constexpr int64_t kShared = 48 << 10, kCluster = 8;  // what needs no permission
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, KernelOnDevice> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::pair<const void*, int> key(kernel, current_device());
  auto found = known.find(key);
  if (found == known.end()) {
    cudaFuncAttributes attributes{};
    check_kernel(cudaFuncGetAttributes(&attributes, kernel), kernel);
    const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    found = known
                .emplace(key, KernelOnDevice{attributes.ptxVersion >= 90,
                                             most - int(attributes.sharedSizeBytes)})
                .first;
  }
  KernelOnDevice& facts = found->second;
  if (grid.shared_bytes > kShared && !facts.shared_allowed) {
    check_kernel(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      facts.most_shared),
                 kernel);
    facts.shared_allowed = true;
  }
  if (grid.cluster > kCluster && !facts.cluster_allowed) {
    check_kernel(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
                 kernel);
    facts.cluster_allowed = true;
  }
  return facts;
}

struct LaunchConfig {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};

  LaunchConfig(const void* kernel, const Grid& grid, Stream stream) {
    constexpr int64_t kMost = (int64_t(1) << 31) - 1;  // of what CUDA checks only 32 bits
    if (grid.blocks.x > kMost || grid.blocks.y > kMost || grid.blocks.z > kMost ||
        grid.shared_bytes > kMost) {
      throw LaunchError(kernel_name(kernel) + ": the grid or its shared memory is too large");
    }
    config.gridDim =
        dim3(unsigned(grid.blocks.x), unsigned(grid.blocks.y), unsigned(grid.blocks.z));
    config.blockDim = dim3(unsigned(grid.threads));
    config.dynamicSmemBytes = size_t(grid.shared_bytes);
    config.stream = stream;
    config.attrs = attributes;
    if (grid.cluster > 1) {
      cudaLaunchAttributeValue& value = add(cudaLaunchAttributeClusterDimension);
      value.clusterDim.x = unsigned(grid.cluster);
      value.clusterDim.y = value.clusterDim.z = 1;
    }
    if (grid.cooperative) add(cudaLaunchAttributeCooperative).cooperative = 1;
  }
  LaunchConfig(const LaunchConfig&) = delete;  // config points to attributes

 private:
  cudaLaunchAttributeValue& add(cudaLaunchAttributeID id) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = id;
    return attribute.val;
  }
};

// Runs kernel(args...) on the stream. Throws, with the kernel's name, if it cannot be launched.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), const Grid& grid, Stream stream, const Args&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "as many arguments as the kernel takes");
  const void* address = reinterpret_cast<const void*>(kernel);
  const LaunchConfig launch(address, grid, stream);
  prepare_kernel(address, grid);
  std::tuple<Params...> values(args...);
  std::apply(
      [&](Params&... value) {
        void* pointers[] = {&value..., nullptr};
        check_kernel(cudaLaunchKernelExC(&launch.config, address, pointers), address);
      },
      values);
}

inline int64_t count_resident(const void* kernel, const Grid& grid) {
  if (grid.cooperative && !device_attribute(cudaDevAttrCooperativeLaunch)) return 0;
  Grid asked = grid;
  asked.cooperative = false;  // which the query is not said to know
  const LaunchConfig launch(kernel, asked, nullptr);
  const KernelOnDevice facts = prepare_kernel(kernel, grid);
  if (grid.shared_bytes > facts.most_shared) return 0;
  int count = 0;
  if (grid.cluster > 1) {
    if (!facts.has_clusters) return 0;
    check_kernel(cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config), kernel);
    return count;
  }
  check_kernel(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, grid.threads,
                                                             size_t(grid.shared_bytes)),
               kernel);
  return int64_t(count) * device_attribute(cudaDevAttrMultiProcessorCount);
}

// How many clusters of such a launch (blocks, where cluster is 1) the device can run side by side; 0 if
// it cannot run it at all, for whatever reason it gives.
template <typename... Params>
int64_t resident_clusters(void (*kernel)(Params...), const Grid& grid) {
  try {
    return count_resident(reinterpret_cast<const void*>(kernel), grid);
  } catch (const LaunchError&) {
    return 0;
  }
}

}  // namespace fastbptt

#endif
