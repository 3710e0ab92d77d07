#include "cuda/for_cell.h"
#include "cuda/stepwise.cuh"
#include "few_rows.cuh"
#include "few_rows_launch.h"

namespace fastbptt {
namespace {

template <int rows, int columns, int vector>
__global__ void __launch_bounds__(kProductWarps* kWarp, 1) few_rows_kernel(FewRowsProduct p) {
  multiply_few_rows<rows, columns, vector>(p);
}

}  // namespace

void run_few_rows(const FewRowsProduct& product, Stream stream) {
  static constexpr void (*kKernels[])(FewRowsProduct) = {
      few_rows_kernel<4, 4, 4>, few_rows_kernel<8, 8, 4>, few_rows_kernel<16, 8, 4>,
      few_rows_kernel<4, 4, 1>, few_rows_kernel<8, 8, 1>, few_rows_kernel<16, 8, 1>,
  };
  static_assert(std::size(kKernels) == kProductKernels, "of kProductVectors and kProductTiles");
  const FewRowsLaunch how = launch_of(product);
  const Grid grid{{how.blocks_x, how.blocks_y}, int(how.threads), how.shared_bytes};
  launch(kKernels[how.kernel()], grid, stream, product);
}

void run_count_steps(int64_t* further, int64_t by, Stream stream) {
  launch(count_steps_kernel, Grid{{1}, 1}, stream, further, by);
}

template <typename scalar_t>
void Stepwise<scalar_t>::run_initial_states(const Fwd& p, const FwdScratch<scalar_t>& s,
                                            Stream stream) {
  const Grid grid = grid_for(p.sequences.layout.B, p.H > p.R ? p.H : p.R);
  launch(initial_states_kernel<scalar_t>, grid, stream, p, s);
}

template <typename scalar_t>
void Stepwise<scalar_t>::run_forward_step(CellKind cell, const Fwd& p,
                                          const FwdScratch<scalar_t>& s, StepNumber step,
                                          int64_t rows, Stream stream) {
  for_cell(cell, [&](auto c) {
    launch(forward_step_kernel<decltype(c), scalar_t>, grid_for(rows, p.H), stream, p, s, step,
           rows);
  });
}

template <typename scalar_t>
void Stepwise<scalar_t>::run_project_step(const Fwd& p, const FwdScratch<scalar_t>& s,
                                          StepNumber step, int64_t rows, Stream stream) {
  launch(project_step_kernel<scalar_t>, grid_for(rows, p.R), stream, p, s, step, rows);
}

template <typename scalar_t>
void Stepwise<scalar_t>::run_project_back(const Bwd& p, const BwdScratch<scalar_t>& s,
                                          StepNumber step, int64_t lanes, Stream stream) {
  launch(project_back_kernel<scalar_t>, grid_for(lanes, p.R), stream, p, s, step, lanes);
}

template <typename scalar_t>
void Stepwise<scalar_t>::run_backward_step(CellKind cell, const Bwd& p,
                                           const BwdScratch<scalar_t>& s, StepNumber step,
                                           int64_t lanes, Stream stream) {
  for_cell(cell, [&](auto c) {
    launch(backward_step_kernel<decltype(c), scalar_t>, grid_for(lanes, p.H), stream, p, s, step,
           lanes);
  });
}

template <typename scalar_t>
void Stepwise<scalar_t>::run_recompute(CellKind cell, scalar_t* gates, const acc_t* rec,
                                       const scalar_t* b_ih, const scalar_t* b_hh, int64_t rows,
                                       int64_t H, Stream stream) {
  for_cell(cell, [&](auto c) {
    if constexpr (decltype(c)::kSaved > 0) {
      launch(recompute_kernel<decltype(c), scalar_t>, grid_for(rows, H), stream, gates, rec, b_ih,
             b_hh, rows, H);
    }
  });
}

template <typename scalar_t>
void Stepwise<scalar_t>::run_states_before(const Bwd& p, scalar_t* states, int64_t steps,
                                           Stream stream) {
  const Grid grid = grid_for(steps * p.sequences.layout.B, p.R);
  launch(states_before_kernel<scalar_t>, grid, stream, p, states, steps);
}

template <typename scalar_t>
void Stepwise<scalar_t>::run_mask_lanes(const Bwd& p, const scalar_t* mask, scalar_t* d_input,
                                        int64_t I, Stream stream) {
  const Grid grid = grid_for(p.steps * p.num_lanes(), I);
  launch(mask_lanes_kernel<scalar_t>, grid, stream, p, mask, d_input, I);
}

template struct Stepwise<double>;
template struct Stepwise<float>;
template struct Stepwise<half_t>;
template struct Stepwise<bfloat16_t>;

}  // namespace fastbptt
