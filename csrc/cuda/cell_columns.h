// The cells' constants as numbers, for code that has a cell by its kind.
#pragma once

#include "cuda/for_cell.h"

namespace fastbptt {

// How the columns of d lie, and what the backward pass carries; see CellTraits.
struct CellColumns {
  int64_t gates, saved, columns, first_recurrent;
  int64_t input_rotation;  // the input's columns are the gates in torch's order, rotated
  bool has_carry, has_cell_state;
};

inline CellColumns columns_of(CellKind cell) {
  CellColumns result{};
  for_cell(cell, [&](auto c) {
    using Cell = decltype(c);
    result = {Cell::kGates,
              Cell::kSaved,
              Cell::kColumns,
              Cell::kFirstRecurrent,
              (Cell::kGates - Cell::kInputGate[0]) % Cell::kGates,
              Cell::kHasCarry,
              Cell::kHasCellState};
  });
  return result;
}

}  // namespace fastbptt
