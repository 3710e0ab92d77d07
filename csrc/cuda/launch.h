// How the host starts kernels and asks the device for its limits.
#pragma once

#include "grid.h"

#ifdef FASTBPTT_EMULATED
#include "emulation/launch.h"
#else

#include <cuda_runtime_api.h>
#include <cxxabi.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <tuple>

namespace fastbptt {

using Stream = cudaStream_t;

inline std::string kernel_name(const void* kernel) {
  const char* mangled = nullptr;
#if CUDART_VERSION >= 12030
  cudaFuncGetName(&mangled, kernel);
#endif
  if (!mangled) return "a kernel";
  int status = 0;
  char* name = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  const std::string result = status == 0 ? name : mangled;
  std::free(name);
  return result;
}

// kernel: the one that the call was about, if any.
inline void check_cuda(cudaError_t error, const void* kernel = nullptr) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call that asks for the last error would be blamed
  throw std::runtime_error((kernel ? kernel_name(kernel) + ": " : std::string("CUDA: ")) +
                           cudaGetErrorString(error));
}

// Of the current device.
inline DeviceLimits device_limits() {
  int device = 0;
  check_cuda(cudaGetDevice(&device));
  const auto attribute = [device](cudaDeviceAttr name) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, name, device));
    return value;
  };
  return {10 * attribute(cudaDevAttrComputeCapabilityMajor) +
              attribute(cudaDevAttrComputeCapabilityMinor),
          attribute(cudaDevAttrMultiProcessorCount),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

// A launch's configuration, with the kernel told to expect it.
struct LaunchConfig {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};

  LaunchConfig(const void* kernel, const Grid& grid, Stream stream) {
    constexpr int64_t kMost = (int64_t(1) << 31) - 1;  // of what CUDA checks only 32 bits
    if (grid.blocks.x > kMost || grid.blocks.y > kMost || grid.blocks.z > kMost ||
        grid.shared_bytes > kMost) {
      throw std::runtime_error(kernel_name(kernel) +
                               ": the grid or its shared memory is too large");
    }
    config.gridDim =
        dim3(unsigned(grid.blocks.x), unsigned(grid.blocks.y), unsigned(grid.blocks.z));
    config.blockDim = dim3(unsigned(grid.threads));
    config.dynamicSmemBytes = size_t(grid.shared_bytes);
    config.stream = stream;
    constexpr int64_t kShared = 48 << 10, kCluster = 8;  // what needs no permission
    if (grid.shared_bytes > kShared) {
      allow(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(grid.shared_bytes));
    }
    if (grid.cluster > kCluster) {
      allow(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
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
  static void allow(const void* kernel, cudaFuncAttribute name, int value) {
    check_cuda(cudaFuncSetAttribute(kernel, name, value), kernel);
  }
};

// Runs kernel(args...) on the stream. Throws, with the kernel's name, if it cannot be launched.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), const Grid& grid, Stream stream, const Args&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "as many arguments as the kernel takes");
  const void* address = reinterpret_cast<const void*>(kernel);
  const LaunchConfig launch(address, grid, stream);
  std::tuple<Params...> values(args...);
  std::apply(
      [&](Params&... value) {
        void* pointers[] = {&value..., nullptr};
        check_cuda(cudaLaunchKernelExC(&launch.config, address, pointers), address);
      },
      values);
}

// How many clusters of such a launch (blocks, where cluster is 1) the device can run side by side; 0
// if it cannot run it at all.
template <typename... Params>
int64_t resident_clusters(void (*kernel)(Params...), const Grid& grid) {
  const void* address = reinterpret_cast<const void*>(kernel);
  const DeviceLimits limits = device_limits();
  if (grid.shared_bytes > limits.shared_bytes) return 0;
  if (grid.cluster > 1 && limits.capability < 90) return 0;
  const LaunchConfig launch(address, grid, nullptr);
  int count = 0;
  if (grid.cluster > 1) {
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&count, address, &launch.config);
    if (error == cudaErrorInvalidClusterSize) {
      cudaGetLastError();
      return 0;
    }
    check_cuda(error, address);
    return count;
  }
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, address, grid.threads,
                                                           size_t(grid.shared_bytes)),
             address);
  return int64_t(count) * limits.multiprocessors;
}

}  // namespace fastbptt

#endif
