#include "cuda/for_cell.h"
#include "cuda/tangent.cuh"

namespace fastbptt {
namespace {

// Calls fn(V{}) for the numbers that a backward pass is in.
template <typename scalar_t, typename Fn>
void for_numbers(bool with_tangents, Fn&& fn) {
  with_tangents ? fn(Dual<scalar_t>{}) : fn(scalar_t{});
}

}  // namespace

template <typename scalar_t>
void Tangent<scalar_t>::run_initial_states(const Fwd& p, Stream stream) {
  const Grid grid = grid_for(p.sequences.layout.B, p.H > p.R ? p.H : p.R);
  launch(initial_tangents_kernel<scalar_t>, grid, stream, p);
}

template <typename scalar_t>
void Tangent<scalar_t>::run_forward_step(CellKind cell, const Fwd& p, int64_t t, int64_t rows,
                                         Stream stream) {
  for_cell(cell, [&](auto c) {
    launch(forward_tangent_kernel<decltype(c), scalar_t>, grid_for(rows, p.H), stream, p, t, rows);
  });
}

template <typename scalar_t>
void Tangent<scalar_t>::run_project_step(const Fwd& p, int64_t t, int64_t rows, Stream stream) {
  launch(project_tangent_kernel<scalar_t>, grid_for(rows, p.R), stream, p, t, rows);
}

template <typename scalar_t>
void Tangent<scalar_t>::run_project_back(const Bwd& p, bool with_tangents, int64_t t, int64_t rows,
                                         Stream stream) {
  for_numbers<scalar_t>(with_tangents, [&](auto v) {
    launch(project_back_tangent_kernel<decltype(v), scalar_t>, grid_for(rows, p.R), stream, p, t,
           rows);
  });
}

template <typename scalar_t>
void Tangent<scalar_t>::run_backward_step(CellKind cell, const Bwd& p, bool with_tangents,
                                          int64_t t, int64_t rows, Stream stream) {
  for_cell(cell, [&](auto c) {
    for_numbers<scalar_t>(with_tangents, [&](auto v) {
      launch(backward_tangent_kernel<decltype(c), decltype(v), scalar_t>, grid_for(rows, p.H),
             stream, p, t, rows);
    });
  });
}

template <typename scalar_t>
void Tangent<scalar_t>::run_initial_gradients(CellKind cell, const Bwd& p, bool with_tangents,
                                              Stream stream) {
  const Grid grid = grid_for(p.sequences.layout.B, p.H > p.R ? p.H : p.R);
  for_cell(cell, [&](auto c) {
    using Cell = decltype(c);
    constexpr bool kCarriesH = Cell::kHasCarry && !Cell::kHasCellState;
    for_numbers<scalar_t>(with_tangents, [&](auto v) {
      launch(initial_gradients_kernel<decltype(v), scalar_t>, grid, stream, p, kCarriesH);
    });
  });
}

template struct Tangent<double>;
template struct Tangent<float>;

}  // namespace fastbptt
