// Prints how the persistent kernels divide recurrences of common sizes on an H100, and how long a step
// should take by counts: the table of docs/cuda_kernels.md. See tools/cuda_table.py.
#include <cstdio>
#include <string>
#include <utility>

#include "cells.h"
#include "cuda/choose.h"

namespace fastbptt {
namespace {

constexpr DeviceLimits kH100{90, 132, 232448};
constexpr double kCyclesPerMicrosecond = 1700;
constexpr int64_t kBatch = 16;

std::string cells_of(const Divided& d) {
  const auto fits = [](const Tiling&) { return true; };
  const Tiling t = choose_tiling(d, kBatch, Kernel::kAuto, kH100, fits);
  if (t.warps == 0) return " stepwise | | | | |";
  const int held = t.row_tiles * (t.column_tiles - t.extra_tiles) * 4;
  char text[160];
  std::snprintf(text, sizeof text, " %d | %d | %d | %d | %.2f |", t.cluster, t.lanes, held,
                int(ceil_div(t.shared.bytes, 1024)),
                double(step_cycles(d, t)) / kCyclesPerMicrosecond);
  return text;
}

template <typename Cell>
void print_rows(const char* name) {
  constexpr int G = Cell::kGates;
  const std::pair<const char*, Arithmetic> kinds[] = {
      {"16 bits", Arithmetic::kTensor16}, {"tf32", Arithmetic::kTf32}, {"fp32", Arithmetic::kFma}};
  for (const auto& [kind, arithmetic] : kinds) {
    for (const int64_t H : {64, 128, 256, 512}) {
      const std::string forward = cells_of(forward_product(arithmetic, H, G));
      const std::string backward = cells_of(backward_product(arithmetic, H, G));
      std::printf("| %s | %s | %d |%s%s unmeasured |\n", name, kind, int(H), forward.c_str(),
                  backward.c_str());
    }
  }
}

}  // namespace
}  // namespace fastbptt

int main() {
  using namespace fastbptt;
  std::puts(
      "| cell | arithmetic | H | C | lanes | W | KB | µs | C | lanes | W | KB | µs | measured |\n"
      "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|");
  print_rows<Elman<Tanh>>("RNN");
  print_rows<Gru>("GRU");
  print_rows<Lstm>("LSTM");
}
