// csrc/cuda/graph.h over a made-up runtime. Prints what is wrong.
#include "cuda/graph.h"

#include <cstdio>
#include <memory>

namespace test {

using namespace fastbptt;
using fake::runtime;

int faults = 0;

void check(bool condition, const std::string& what) {
  if (condition) return;
  std::printf("%s\n", what.c_str());
  ++faults;
}

template <typename Body>
std::string error_of(const Body& body) {
  try {
    body();
  } catch (const GraphError& error) {
    return error.what();
  }
  return "";
}

void a_graph_runs_when_replayed() {
  int count = 0;
  {
    const OwnStream stream(0);
    Graph graph(stream, [&] {
      for (int i = 0; i < 3; ++i) fake::launch(stream, [&] { ++count; });
    });
    check(count == 0, "a capture runs what it captures");
    for (int i = 0; i < 2; ++i) graph.replay();
    check(count == 6, "a replay does not run what was captured");
    fake::launch(stream, [&] { ++count; });
    check(count == 7, "the stream is still captured");
  }
  check(runtime.graphs.empty(), "a graph is left over");
}

void whatever_fails_is_told_and_leaves_nothing() {
  for (const char* function : {"cudaStreamBeginCapture", "cudaStreamEndCapture",
                               "cudaGraphInstantiateWithFlags", "cudaGraphLaunch", "a launch"}) {
    const std::string name = function;
    const bool by_launch = name == "a launch";
    runtime.errors = {{name, cudaErrorMemoryAllocation}};
    // As CUDA answers the end of a capture in which something was not allowed.
    if (by_launch) runtime.errors = {{"cudaStreamEndCapture", cudaErrorStreamCaptureInvalidated}};
    int count = 0;
    const OwnStream stream(0);
    const std::string error = error_of([&] {
      Graph graph(stream, [&] {
        fake::launch(stream, [&] { ++count; });
        if (by_launch) throw std::runtime_error("not allowed");
      });
      graph.replay();
    });
    runtime.errors.clear();
    check(error == (by_launch ? "not allowed" : name + ": out of memory"), name + ": " + error);
    check(count == 0, name + " fails, and something has run");
    check(runtime.graphs.empty(), name + " fails, and a graph is left over");
    check(runtime.last == cudaSuccess, name + " fails, and the next call would be blamed");
    fake::launch(stream, [&] { ++count; });
    check(count == 1, name + " fails, and the stream is still captured");
  }
}

void a_failed_launch_of_a_good_capture() {
  const OwnStream stream(0);
  const auto capture = [&] { Graph(stream, [] { throw std::runtime_error("too large"); }); };
  check(error_of(capture) == "too large", "a launch's own error is lost");
  check(runtime.graphs.empty(), "a launch fails, and a graph is left over");
}

void streams_have_one_user_and_are_kept() {
  const int made = runtime.streams;
  cudaStream_t first;
  {
    const OwnStream stream(7);
    first = stream;
    const OwnStream beside(7), elsewhere(8);
    check(beside != first && elsewhere != first && elsewhere != beside, "two users of one stream");
  }
  check(runtime.streams == made + 3, "not as many streams as users");
  {
    const OwnStream a(7), b(7);
    check(a == first || b == first, "a stream was not kept");
  }
  check(runtime.streams == made + 3, "streams are made again");
}

void streams_that_cannot_be_made() {
  const int made = runtime.streams;
  for (const char* function : {"cudaStreamCreateWithFlags", "cudaEventCreateWithFlags"}) {
    runtime.errors = {{function, cudaErrorMemoryAllocation}};
    const std::string error = error_of([] { OwnStream stream(9); });
    runtime.errors.clear();
    check(error == std::string(function) + ": out of memory", std::string(function) + error);
    check(runtime.streams == made, std::string(function) + " fails, and a stream is left over");
    check(runtime.last == cudaSuccess, std::string(function) + " fails, the next call is blamed");
  }
}

void one_stream_after_another() {
  FakeStream caller;
  const OwnStream stream(0);
  runtime.orders.clear();
  check(stream.order(&caller, stream) == cudaSuccess, "an order fails");
  check(stream.order(stream, &caller) == cudaSuccess, "an order fails");
  const std::vector<std::pair<cudaStream_t, cudaStream_t>> expected{{&caller, stream},
                                                                    {stream, &caller}};
  check(runtime.orders == expected, "the streams are not ordered");
  for (const char* function : {"cudaEventRecord", "cudaStreamWaitEvent"}) {
    runtime.errors = {{function, cudaErrorMemoryAllocation}};
    check(stream.order(stream, &caller) != cudaSuccess, std::string(function) + " fails unseen");
    runtime.errors.clear();
  }
}

}  // namespace test

int main() {
  test::a_graph_runs_when_replayed();
  test::whatever_fails_is_told_and_leaves_nothing();
  test::a_failed_launch_of_a_good_capture();
  test::streams_have_one_user_and_are_kept();
  test::streams_that_cannot_be_made();
  test::one_stream_after_another();
  return test::faults > 0;
}
