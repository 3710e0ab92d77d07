// The emulation's body of csrc/cuda/torch/step_graph.h: a capture runs nothing, a replay runs all that
// was captured.
#pragma once

#include <ATen/core/Tensor.h>

#include <limits>
#include <stdexcept>
#include <string>

#include "emulation/recording.h"

namespace fastbptt {

class GraphError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

namespace emulation {

// What goes wrong, or "": the caller's stream is "captured"; there is no "stream"; each step
// "allocates"; the capture fails at its "begin", "inside" or at its "end"; the third "replay" fails.
inline std::string graph_fault;
inline int64_t graph_replays = 0;

inline void fail_if(const char* fault) {
  if (graph_fault == fault) throw GraphError("a planted fault");
}

}  // namespace emulation

inline bool is_capturing(const at::Tensor&) { return emulation::graph_fault == "captured"; }

class GraphStream {
 public:
  explicit GraphStream(const at::Tensor&) {
    emulation::fail_if("stream");
    emulation::current_stream = {1};
  }
  ~GraphStream() { emulation::current_stream = {0}; }
  GraphStream(const GraphStream&) = delete;

  int64_t allocations() const {
    static int64_t count = 0;
    return emulation::graph_fault == "allocates" ? ++count : 0;
  }
};

class StepGraph {
 public:
  template <typename Fn>
  StepGraph(Stream, Fn&& launches) {
    emulation::fail_if("begin");
    const bool fails = emulation::graph_fault == "inside";
    captured_.limit = fails ? 7 : std::numeric_limits<size_t>::max();
    emulation::recording = &captured_;
    std::string failure;
    try {
      launches();
    } catch (const std::exception& error) {
      failure = error.what();
    }
    emulation::recording = nullptr;
    if (!failure.empty()) throw GraphError(failure);
    emulation::fail_if("end");
  }
  StepGraph(const StepGraph&) = delete;

  void replay() {
    if (++replays_ == 3) emulation::fail_if("replay");
    for (const auto& launch : captured_.launches) launch();
    ++emulation::graph_replays;
  }

 private:
  emulation::Recording captured_;
  int64_t replays_ = 0;
};

}  // namespace fastbptt
