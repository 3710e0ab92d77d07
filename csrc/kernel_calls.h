// How the CPU's operators run kernels: memory, order and threads, and what FASTBPTT_VERBOSE tells.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "cpu/kernels.h"
#include "tensors.h"
#include "thread_workspace.h"

namespace fastbptt {

namespace {

enum class Order { kOneByOne, kSideBySide, kInWaves };  // of passes: see Kernel

// Of the directions of a layer, or of the layers of a stack of one direction.
template <typename Params>
Order order_of(const Kernel<Params>& kernel, const std::vector<Params>& passes, size_t layers) {
  const Params& p = passes[0];
  const int count = int(passes.size());
  const StepWork work = kernel.work_of_step(p);
  if (layers == 1) {
    return pays_side_by_side(count, p.threads, work) ? Order::kSideBySide : Order::kOneByOne;
  }
  const bool pays =
      kernel.goes_in_pieces(p) && pays_in_waves(count, p.threads, p.lanes[0].steps, work);
  return pays ? Order::kInWaves : Order::kOneByOne;
}

// With FASTBPTT_VERBOSE=1 each run of a kernel says to stderr what it was.
bool is_verbose() {
  static const bool value = [] {
    const char* text = std::getenv("FASTBPTT_VERBOSE");
    return text && *text && std::strcmp(text, "0") != 0;
  }();
  return value;
}

// What there is to say: the pass and its sizes.
struct Description {
  const char* pass;
  const LayerShape& shape;
  at::ScalarType dtype;
  size_t layers;
};

const char* name_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble: return "float64";
    case at::kFloat: return "float32";
    case at::kHalf: return "float16";
    default: return "bfloat16";
  }
}

template <typename Params>
void report(const Description& what, const Kernel<Params>& kernel,
            const std::vector<Params>& passes, Order order, bool had_company, double ms) {
  const LayerShape& shape = what.shape;
  const int threads = passes[0].threads;
  const Split split = choose_split(threads, kernel.work_of_step(passes[0]));
  std::string how = std::to_string(threads) + (threads == 1 ? " thread" : " threads");
  if (order == Order::kSideBySide) {
    how += ", directions side by side";
  } else if (order == Order::kInWaves) {
    how += ", layers in waves";
  } else if (threads > 1) {
    how += ", steps by " + std::to_string(split.batch_parts) + " of the batch x " +
           std::to_string(split.unit_parts) + " of the units";
  }
  if (!had_company) how += ", left to one";
  const std::string layers =
      what.layers > 1 ? std::to_string(what.layers) + " layers, " : std::string();
  std::fprintf(
      stderr,
      "fastbptt: %s %s, %s, %s, T %lld, B %lld, I %lld, H %lld, %s%lld lanes, %s, %.3f ms\n",
      kCellNames[size_t(shape.cell)], what.pass, name_of(what.dtype), kernels().isa,
      (long long)shape.T, (long long)shape.B, (long long)shape.I, (long long)shape.H,
      layers.c_str(), (long long)passes[0].num_lanes, how.c_str(), ms);
}

template <typename Params>
void run_kernels(const Kernel<Params>& kernel, std::vector<Params>& passes, Order order,
                 const Description& what) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point begin = is_verbose() ? Clock::now() : Clock::time_point();
  std::vector<int64_t> bytes;
  for (const Params& p : passes) bytes.push_back(kernel.workspace(p));
  // One after another they take the same memory.
  char* memory = static_cast<char*>(workspace.reserve(
      order == Order::kOneByOne ? *std::max_element(bytes.begin(), bytes.end())
                                : std::accumulate(bytes.begin(), bytes.end(), int64_t(0))));
  for (size_t i = 0; i < passes.size(); ++i) {
    passes[i].workspace = memory;
    if (order != Order::kOneByOne) memory += bytes[i];
  }
  struct Call {
    const Kernel<Params>& kernel;
    const std::vector<Params>& passes;
    Order order;
  } const call{kernel, passes, order};
  const bool had_company = run_team(
      passes[0].threads,
      [](const void* context, Team& team) {
        const Call& call = *static_cast<const Call*>(context);
        switch (call.order) {
          case Order::kSideBySide: return call.kernel.run_side_by_side(call.passes, team);
          case Order::kInWaves: return call.kernel.run_in_waves(call.passes, team);
          case Order::kOneByOne:
            for (const Params& p : call.passes) call.kernel.run(p, team);
        }
      },
      &call);
  workspace.trim();
  if (!is_verbose()) return;
  const std::chrono::duration<double, std::milli> ms = Clock::now() - begin;
  report(what, kernel, passes, order, had_company, ms.count());
}

}  // namespace
}  // namespace fastbptt
