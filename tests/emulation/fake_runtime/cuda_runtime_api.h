// As much of CUDA's runtime as csrc/cuda/launch.h calls, with a device that a test makes up.
#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#define CUDART_VERSION 13000

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorIllegalAddress = 700,
  cudaErrorNotSupported = 801,
  cudaErrorInvalidClusterSize = 912,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13,
};
enum cudaLaunchAttributeID {
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
};

using cudaStream_t = void*;
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int ptxVersion;
};
union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
  int cooperative;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace fake {

struct Runtime {
  int device = 0, multiprocessors = 132, capability = 90, cooperative = 1, shared = 232448;
  int ptx_version = 90;
  std::map<std::string, cudaError_t> errors;  // what a function is to fail with, by its name
  std::function<void()> before_launch;        // called once

  // What was asked: [kernel, device] and the value of each attribute that was set.
  std::map<std::pair<const void*, int>, std::map<cudaFuncAttribute, std::vector<int>>> set;
  std::vector<cudaLaunchConfig_t> launches;
  std::vector<cudaLaunchAttribute> attributes;  // of the last one
  cudaError_t last = cudaSuccess;

  cudaError_t answer(const char* function) {
    const auto found = errors.find(function);
    return found == errors.end() ? cudaSuccess : last = found->second;
  }
};
inline Runtime runtime;

}  // namespace fake

inline cudaError_t cudaGetLastError() { return std::exchange(fake::runtime.last, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue     ? "invalid argument"
         : error == cudaErrorIllegalAddress ? "an illegal memory access was encountered"
                                            : "another error";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = fake::runtime.device;
  return fake::runtime.answer("cudaGetDevice");
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  const auto& runtime = fake::runtime;
  *value = name == cudaDevAttrMultiProcessorCount      ? runtime.multiprocessors
           : name == cudaDevAttrComputeCapabilityMajor ? runtime.capability / 10
           : name == cudaDevAttrComputeCapabilityMinor ? runtime.capability % 10
           : name == cudaDevAttrCooperativeLaunch      ? runtime.cooperative
                                                       : runtime.shared;
  return fake::runtime.answer("cudaDeviceGetAttribute");
}
inline cudaError_t cudaFuncGetName(const char** name, const void*) {
  *name = nullptr;
  const cudaError_t error = fake::runtime.answer("cudaFuncGetName");
  if (error == cudaSuccess) *name = "_ZN4test6kernelEi";
  return error;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {0, fake::runtime.ptx_version};
  return fake::runtime.answer("cudaFuncGetAttributes");
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute name, int value) {
  fake::runtime.set[{kernel, fake::runtime.device}][name].push_back(value);
  return fake::runtime.answer("cudaFuncSetAttribute");
}
inline cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                       void**) {
  auto& runtime = fake::runtime;
  if (const auto before = std::exchange(runtime.before_launch, nullptr)) before();
  const auto& allowed =
      runtime.set[{kernel, runtime.device}][cudaFuncAttributeMaxDynamicSharedMemorySize];
  const size_t most = allowed.empty() ? 48 << 10 : size_t(allowed.back());
  if (config->dynamicSmemBytes > most) return runtime.last = cudaErrorInvalidValue;
  runtime.launches.push_back(*config);
  runtime.attributes.assign(config->attrs, config->attrs + config->numAttrs);
  return runtime.answer("cudaLaunchKernelExC");
}
inline cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*,
                                                  const cudaLaunchConfig_t* config) {
  *count = 15;
  const bool one =
      config->numAttrs == 1 && config->attrs->id == cudaLaunchAttributeClusterDimension;
  if (!one) return fake::runtime.last = cudaErrorInvalidValue;
  return fake::runtime.answer("cudaOccupancyMaxActiveClusters");
}
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void*, int,
                                                                 size_t) {
  *count = 2;
  return fake::runtime.answer("cudaOccupancyMaxActiveBlocksPerMultiprocessor");
}
