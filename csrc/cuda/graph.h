// CUDA graphs: captured once, replayed often, on streams of our own.
#pragma once

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace fastbptt {

// A graph cannot be had, or not be replayed: none of the launches in question has been made.
class GraphError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void check_graph(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call that asks for the last error would be blamed
  throw GraphError(std::string(call) + ": " + cudaGetErrorString(error));
}

// One of the process's own streams of the current device, for one user at a time. It is none of torch's
// pool: those are given to many, and what another thread launches on a stream while a graph is captured
// on it is captured too. They are kept, since a library keeps a workspace for each stream it has seen.
class OwnStream {
 public:
  explicit OwnStream(int device) : device_(device) {
    {
      const std::lock_guard<std::mutex> lock(idle().mutex);
      std::vector<Held>& streams = idle().streams[device];
      if (!streams.empty()) {
        held_ = streams.back();
        streams.pop_back();
        return;
      }
    }
    // It does not wait for the legacy default stream, nor that one for it.
    check_graph(cudaStreamCreateWithFlags(&held_.stream, cudaStreamNonBlocking),
                "cudaStreamCreateWithFlags");
    const cudaError_t error = cudaEventCreateWithFlags(&held_.event, cudaEventDisableTiming);
    if (error != cudaSuccess) cudaStreamDestroy(held_.stream);
    check_graph(error, "cudaEventCreateWithFlags");
  }
  ~OwnStream() {
    const std::lock_guard<std::mutex> lock(idle().mutex);
    idle().streams[device_].push_back(held_);
  }
  OwnStream(const OwnStream&) = delete;

  operator cudaStream_t() const { return held_.stream; }

  // What is launched on `after` from now on waits for what has been launched on `before`.
  cudaError_t order(cudaStream_t before, cudaStream_t after) const {
    const cudaError_t error = cudaEventRecord(held_.event, before);
    return error == cudaSuccess ? cudaStreamWaitEvent(after, held_.event, 0) : error;
  }

 private:
  struct Held {
    cudaStream_t stream;
    cudaEvent_t event;
  };
  struct Idle {
    std::mutex mutex;
    std::map<int, std::vector<Held>> streams;  // by device
  };

  static Idle& idle() {
    static Idle& streams = *new Idle;  // never destroyed: at its end CUDA may be gone already
    return streams;
  }

  int device_;
  Held held_{};
};

// What `launches` launches on a stream, captured. Relaxed: calls of other threads, and this one's for
// memory, are none of the capture's business.
class Graph {
 public:
  template <typename Fn>
  Graph(cudaStream_t stream, Fn&& launches) : stream_(stream) {
    check_graph(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed),
                "cudaStreamBeginCapture");
    std::string failure;
    try {
      launches();
    } catch (const std::exception& error) {
      failure = error.what();
    }
    cudaGraph_t graph = nullptr;
    cudaError_t error = cudaStreamEndCapture(stream, &graph);  // else it would go on
    if (!failure.empty()) {
      cudaGetLastError();
      if (graph) cudaGraphDestroy(graph);
      throw GraphError(failure);
    }
    check_graph(error, "cudaStreamEndCapture");
    error = cudaGraphInstantiateWithFlags(&graph_, graph, 0);
    cudaGraphDestroy(graph);
    check_graph(error, "cudaGraphInstantiateWithFlags");
  }
  ~Graph() { cudaGraphExecDestroy(graph_); }  // replays on their way are carried out
  Graph(const Graph&) = delete;

  void replay() { check_graph(cudaGraphLaunch(graph_, stream_), "cudaGraphLaunch"); }

 private:
  cudaStream_t stream_;
  cudaGraphExec_t graph_ = nullptr;
};

}  // namespace fastbptt
