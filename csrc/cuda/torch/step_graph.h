// Graphs of steps among torch's streams and memory.
#pragma once

#ifdef FASTBPTT_EMULATED
#include "emulation/step_graph.h"
#else

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/graph.h"
#include "cuda/torch/glue.h"

namespace fastbptt {

using StepGraph = Graph;

// Whether a graph of the caller's is being captured on the current stream.
inline bool is_capturing(const at::Tensor& like) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(current_stream(like), &status) == cudaSuccess) {
    return status != cudaStreamCaptureStatusNone;
  }
  cudaGetLastError();  // the legacy default stream, while one that waits for it is captured
  return true;
}

// A stream on which a graph can be captured, the current one during its life, since the one before may be
// the legacy default stream. What was launched on that one comes first, and what will be comes last:
// so memory that was allocated before and is freed afterwards is never another's in between, since the
// allocator gives it to others in the order of the stream that it was allocated on. What is allocated
// during its life is this stream's, and it has one user at a time.
class GraphStream {
 public:
  explicit GraphStream(const at::Tensor& like)
      : device_(like.device().index()),
        caller_(c10::cuda::getCurrentCUDAStream(device_)),
        own_(device_) {
    check_graph(own_.order(caller_.stream(), own_), "cudaStreamWaitEvent");
    c10::cuda::setCurrentCUDAStream(c10::cuda::getStreamFromExternal(own_, device_));
  }
  ~GraphStream() {
    c10::cuda::setCurrentCUDAStream(caller_);
    if (own_.order(own_, caller_.stream()) != cudaSuccess) cudaStreamSynchronize(own_);
  }
  GraphStream(const GraphStream&) = delete;

  // How often memory of the device has been allocated, by any thread.
  int64_t allocations() const {
    try {
      // The first is the sum of all kinds.
      return c10::cuda::CUDACachingAllocator::getDeviceStats(device_).allocation[0].allocated;
    } catch (const std::exception& error) {  // an allocator that does not count
      throw GraphError(error.what());
    }
  }

 private:
  // Another thread's capture is not to fail by calls that make a graph, as the default mode has it.
  c10::cuda::CUDAStreamCaptureModeGuard mode_{cudaStreamCaptureModeRelaxed};
  c10::DeviceIndex device_;
  c10::cuda::CUDAStream caller_;
  OwnStream own_;
};

}  // namespace fastbptt

#endif
