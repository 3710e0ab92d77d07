// The emulation's streams: launches and products run at once, or are recorded for a graph.
#pragma once

#include <functional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "emulation/runtime.h"

namespace fastbptt {

struct Stream {
  int id = 0;
};

namespace emulation {

// As a graph holds them: the values of a launch's arguments, the addresses of a product's tensors.
struct Recording {
  std::vector<std::function<void()>> launches;
  size_t limit;  // one more fails
};

inline thread_local Stream current_stream;
inline thread_local Recording* recording = nullptr;  // of the launches on the current stream

// There is nothing to order another stream's launch by, and a capture would not have it.
inline void check_stream(Stream stream, const Site& site) {
  if (stream.id == current_stream.id) return;
  throw Fault("a launch at " + site.str() + " on another stream than the current one");
}

template <typename Fn>
void run_or_record(Fn&& fn) {
  if (!recording) return fn();
  if (recording->launches.size() == recording->limit) throw std::runtime_error("a planted fault");
  recording->launches.emplace_back(std::forward<Fn>(fn));
}

}  // namespace emulation
}  // namespace fastbptt
