// Prints how the persistent kernels divide recurrences of common sizes on an H100, and how long a step
// should take by counts: the table of docs/cuda_kernels.md. See tools/cuda_table.py.
#include <cstdio>
#include <string>
#include <utility>

#include "cells.h"
#include "cuda/choose.h"

namespace fastbptt {
namespace {

// SMs of each GPC of an H100: those that work are not the same on any two cards.
constexpr int kGpcs[] = {18, 18, 18, 16, 16, 16, 16, 14};
constexpr DeviceLimits kH100{90, 132, 232448};
constexpr int64_t kSharedOfSm = 233472, kRegistersOfSm = 65536, kRegisters = 128;
constexpr double kCyclesPerMicrosecond = 1980;
constexpr int64_t kBatch = 16;

int64_t blocks_at_once(const Tiling& t) {
  const int64_t of_sm =
      std::min(kSharedOfSm / (t.shared.bytes + 1024), kRegistersOfSm / (kRegisters * t.threads()));
  int64_t clusters = 0;
  for (const int sms : kGpcs) clusters += sms / t.cluster;
  return clusters * t.cluster * of_sm;
}

std::string cells_of(const Divided& d) {
  const Plan plan = choose_plan(d, kBatch, /*is_replayed=*/true, Wish{}, kH100, blocks_at_once);
  const double us = double(plan.cycles) / kCyclesPerMicrosecond;
  const Tiling& t = plan.tiling;
  char text[160];
  if (!plan.exists()) {
    std::snprintf(text, sizeof text, " stepwise | | | | %.2f |", us);
    return text;
  }
  const std::string blocks = plan.kernel() == Kernel::kCluster ? std::to_string(t.cluster)
                             : t.cluster == 1
                                 ? std::to_string(t.team())
                                 : std::to_string(t.clusters) + " x " + std::to_string(t.cluster);
  std::snprintf(text, sizeof text, " %s %s | %d | %d | %d | %.2f |", name_of(plan.kernel()),
                blocks.c_str(), t.lanes, int(plan.waves), int(ceil_div(t.shared.bytes, 1024)), us);
  return text;
}

template <typename Cell>
void print_rows(const char* name) {
  const std::pair<const char*, Arithmetic> kinds[] = {
      {"16 bits", Arithmetic::kTensor16}, {"tf32", Arithmetic::kTf32}, {"fp32", Arithmetic::kFma}};
  for (const auto& [kind, arithmetic] : kinds) {
    for (const int64_t H : {64, 128, 256, 512, 768, 1024, 2048}) {
      const std::string forward = cells_of(Divided::forward<Cell>(arithmetic, H));
      const std::string backward = cells_of(Divided::backward<Cell>(arithmetic, H));
      std::printf("| %s | %s | %d |%s%s\n", name, kind, int(H), forward.c_str(), backward.c_str());
    }
  }
}

}  // namespace
}  // namespace fastbptt

int main() {
  using namespace fastbptt;
  std::puts(
      "| cell | arithmetic | H | forward | lanes | waves | KB | µs | backward | lanes | waves | KB "
      "| µs |\n"
      "|---|---|--:|---|--:|--:|--:|--:|---|--:|--:|--:|--:|");
  print_rows<Elman<Tanh>>("RNN");
  print_rows<Gru>("GRU");
  print_rows<Lstm>("LSTM");
}
