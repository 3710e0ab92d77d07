// As much of CUDA's runtime as csrc/cuda/graph.h calls: streams that do at once what is launched on
// them, and graphs.
#pragma once

#include <functional>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorMemoryAllocation = 2,
  cudaErrorStreamCaptureInvalidated = 901,
};
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed = 2 };
constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2;

using FakeLaunches = std::vector<std::function<void()>>;
struct FakeStream {
  FakeLaunches* captured = nullptr;
};
using cudaStream_t = FakeStream*;
using cudaEvent_t = int*;
using cudaGraph_t = FakeLaunches*;
using cudaGraphExec_t = FakeLaunches*;

namespace fake {

struct Runtime {
  std::map<std::string, cudaError_t> errors;  // what a function is to fail with, by its name
  cudaError_t last = cudaSuccess;
  int streams = 0;         // made and not destroyed
  std::set<void*> graphs;  // so are these, whether they can be launched or not
  std::vector<std::pair<cudaStream_t, cudaStream_t>> orders;  // from and to
  std::map<cudaEvent_t, cudaStream_t> events;

  cudaError_t answer(const char* function) {
    const auto found = errors.find(function);
    return found == errors.end() ? cudaSuccess : last = found->second;
  }
};
inline Runtime runtime;

inline void launch(cudaStream_t stream, std::function<void()> work) {
  stream->captured ? stream->captured->push_back(std::move(work)) : work();
}

}  // namespace fake

inline cudaError_t cudaGetLastError() { return std::exchange(fake::runtime.last, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t) { return "out of memory"; }

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  const cudaError_t error = fake::runtime.answer("cudaStreamCreateWithFlags");
  if (error != cudaSuccess) return error;
  ++fake::runtime.streams;
  *stream = new FakeStream;
  return error;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  --fake::runtime.streams;
  delete stream;
  return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new int;
  return fake::runtime.answer("cudaEventCreateWithFlags");
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  fake::runtime.events[event] = stream;
  return fake::runtime.answer("cudaEventRecord");
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  fake::runtime.orders.emplace_back(fake::runtime.events[event], stream);
  return fake::runtime.answer("cudaStreamWaitEvent");
}

inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  const cudaError_t error = fake::runtime.answer("cudaStreamBeginCapture");
  if (error == cudaSuccess) stream->captured = new FakeLaunches;
  return error;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = std::exchange(stream->captured, nullptr);
  fake::runtime.graphs.insert(*graph);
  const cudaError_t error = fake::runtime.answer("cudaStreamEndCapture");
  if (error != cudaSuccess) {
    fake::runtime.graphs.erase(*graph);
    delete std::exchange(*graph, nullptr);
  }
  return error;
}
inline cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph,
                                                 unsigned long long) {
  const cudaError_t error = fake::runtime.answer("cudaGraphInstantiateWithFlags");
  if (error == cudaSuccess) fake::runtime.graphs.insert(*exec = new FakeLaunches(*graph));
  return error;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  if (fake::runtime.graphs.erase(graph)) delete graph;
  return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return cudaGraphDestroy(exec); }
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  const cudaError_t error = fake::runtime.answer("cudaGraphLaunch");
  if (error != cudaSuccess) return error;
  for (const auto& work : *exec) fake::launch(stream, work);
  return error;
}
