// Times the persistent kernels' recurrences alone, division by division, as the weights of step_model.h
// and the microseconds in docs/cuda_kernels.md were measured. On the terminal a line for each line of
// the standard input:
//
//     cell dtype pass division H B T     such as: lstm fp16 fwd cluster:cluster=4,lanes=2 128 16 512
//
// cell: rnn, gru or lstm; dtype: fp16, tf32 or fp32; pass: fwd or bwd; division: as
// FASTBPTT_CUDA_KERNEL has it. What is computed is not looked at: the tests do that.
//
//     cd csrc/cuda && nvcc -O3 -std=c++17 -arch=sm_90 -I .. -o ../../build/divisions
//         ../../benchmarks/gpu/divisions.cu persistent_half.cu persistent_tf32.cu persistent_float.cu
//         lane_half.cu lane_float.cu
//     echo lstm fp16 fwd cluster 512 16 1024 | build/divisions

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/cell_columns.h"
#include "cuda/persistent.h"

namespace fastbptt {
namespace {

constexpr int kRepeats = 5;
constexpr double kMegahertz = 1980;  // of the clock that the model was fitted at

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

template <typename T>
__global__ void fill_kernel(T* p, size_t n, float scale, unsigned seed) {
  const size_t step = size_t(gridDim.x) * blockDim.x;
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += step) {
    unsigned x = unsigned(i) * 2654435761u + seed;
    x = (x ^ x >> 15) * 2246822519u;
    p[i] = T(scale * (float((x ^ x >> 13) & 0xffff) / 32768.0f - 1.0f));
  }
}

// Memory of a measurement, full of numbers from -scale to scale.
class Numbers {
 public:
  ~Numbers() {
    for (void* p : allocated_) cudaFree(p);
  }
  template <typename T>
  T* make(size_t n, float scale) {
    T* p = nullptr;
    check(cudaMalloc(&p, n * sizeof(T)), "cudaMalloc");
    allocated_.push_back(p);
    fill_kernel<<<256, 256>>>(p, n, scale, 77777u * unsigned(allocated_.size()));
    return p;
  }

 private:
  std::vector<void*> allocated_;
};

struct Asked {
  CellKind cell;
  bool is_backward;
  int64_t H, B, T;
};

template <typename scalar_t>
void fill_common(Recurrence<scalar_t>& p, const Asked& a, const CellColumns& c, Numbers& numbers) {
  const float bound = 1 / std::sqrt(float(a.H));
  p.sequences.layout = Layout{a.T, a.B, a.T * a.B, a.B, 1, nullptr, nullptr};
  p.sequences.direction = 1;
  p.H = p.R = p.ld_out = a.H;
  p.hx = numbers.make<scalar_t>(a.B * a.H, 0.5f);
  p.cx = c.has_cell_state ? numbers.make<scalar_t>(a.B * a.H, 0.5f) : nullptr;
  p.w_hh = numbers.make<scalar_t>(c.gates * a.H * a.H, bound);
  p.b_ih = numbers.make<scalar_t>(c.gates * a.H, bound);
  p.b_hh = numbers.make<scalar_t>(c.gates * a.H, bound);
}

template <typename scalar_t>
FwdRecurrence<scalar_t> forward(const Asked& a, const CellColumns& c, Numbers& numbers) {
  FwdRecurrence<scalar_t> p{};
  fill_common(p, a, c, numbers);
  const size_t rows = a.T * a.B;
  p.ld_pre = c.gates * a.H;
  p.pre = numbers.make<scalar_t>(rows * p.ld_pre, 0.5f);
  p.output = numbers.make<scalar_t>(rows * a.H, 0);
  p.gates = c.saved ? numbers.make<scalar_t>(rows * c.saved * a.H, 0) : nullptr;
  p.c = c.has_cell_state ? numbers.make<scalar_t>(rows * a.H, 0) : nullptr;
  p.h_n = numbers.make<scalar_t>(a.B * a.H, 0);
  p.c_n = numbers.make<scalar_t>(a.B * a.H, 0);
  return p;
}

template <typename scalar_t>
BwdRecurrence<scalar_t> backward(const Asked& a, const CellColumns& c, Numbers& numbers) {
  BwdRecurrence<scalar_t> p{};
  fill_common(p, a, c, numbers);
  const size_t rows = a.T * a.B;
  p.windows = Windows{a.T, a.T, 0, 1, false};
  p.steps = a.T;
  p.output = numbers.make<scalar_t>(rows * a.H, 0.5f);
  p.gates = c.saved ? numbers.make<scalar_t>(rows * c.saved * a.H, 0.5f) : nullptr;
  p.c = c.has_cell_state ? numbers.make<scalar_t>(rows * a.H, 0.5f) : nullptr;
  p.d_output = numbers.make<scalar_t>(rows * a.H, 0.1f);
  p.span_batch_stride = 1;
  p.d.rows = numbers.make<scalar_t>(rows * c.columns * a.H, 0);
  return p;
}

// Microseconds a step: the least of some runs.
template <typename Kernels, typename Params>
double time_of(Kernels, const Asked& a, const Params& p, const Plan& plan, GridMemory memory,
               size_t flag_bytes) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  float least = 1e30f;
  for (int i = 0; i < kRepeats; ++i) {
    if (flag_bytes > 0) check(cudaMemset(memory.flags, 0, flag_bytes), "cudaMemset");
    check(cudaEventRecord(begin), "cudaEventRecord");
    Kernels::run(a.cell, p, plan, memory, nullptr);
    check(cudaEventRecord(end), "cudaEventRecord");
    check(cudaEventSynchronize(end), "a recurrence");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    least = std::min(least, ms);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return 1e3 * least / double(a.T);
}

template <typename Product, typename scalar_t>
void measure(const Asked& a) {
  using Kernels = Persistent<Product, scalar_t>;
  const CellColumns c = columns_of(a.cell);
  const Plan plan =
      Kernels::plan(a.cell, a.is_backward, a.H, a.B, /*is_replayed=*/true, wish_of_environment());
  if (!plan.exists()) {
    std::puts("no such kernel");
    return;
  }
  Numbers numbers;
  GridMemory memory{};
  const size_t flags = plan.launches() * plan.flags(a.B);
  if (plan.tiling.is_grid) {
    memory.flags = numbers.make<uint32_t>(flags, 0);
    memory.x = numbers.make<scalar_t>(plan.x_numbers(a.B, a.is_backward ? int(c.gates) : 1), 0);
  }
  const size_t bytes = flags * sizeof(uint32_t);
  const double us =
      a.is_backward ? time_of(Kernels{}, a, backward<scalar_t>(a, c, numbers), plan, memory, bytes)
                    : time_of(Kernels{}, a, forward<scalar_t>(a, c, numbers), plan, memory, bytes);
  const Tiling& t = plan.tiling;
  std::printf("%s %d x %d, %d units, %d lanes, %d waves, %d warps: %.2f us, expected %.2f\n",
              name_of(plan.kernel()), t.clusters, t.cluster, t.units, t.lanes, int(plan.waves),
              t.warps, us, double(plan.cycles) / kMegahertz);
}

void run(const std::string& line) {
  std::istringstream words(line);
  std::string cell, dtype, pass, division;
  Asked a{};
  if (!(words >> cell >> dtype >> pass >> division >> a.H >> a.B >> a.T)) return;
  a.cell = cell == "lstm" ? CellKind::kLstm : cell == "gru" ? CellKind::kGru : CellKind::kTanh;
  a.is_backward = pass == "bwd";
  setenv("FASTBPTT_CUDA_KERNEL", division.c_str(), 1);
  std::printf("%s: ", line.c_str());
  if (dtype == "fp16") {
    measure<TensorCores<half_t>, half_t>(a);
  } else if (dtype == "tf32") {
    measure<Tf32Cores, float>(a);
  } else {
    measure<PlainFma, float>(a);
  }
  std::fflush(stdout);
}

}  // namespace
}  // namespace fastbptt

int main() {
  try {
    for (std::string line; std::getline(std::cin, line);) fastbptt::run(line);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
