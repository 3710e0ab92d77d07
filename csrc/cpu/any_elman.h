// The Elman cell of whichever nonlinearity: a pass is compiled once for all of them, and only the
// loops over units that call the cell's functions are for each.
#pragma once

#include "cells.h"
#include "params.h"

namespace fastbptt {
namespace {

struct AnyElman : CellTraits {};

// Calls fn with the cell whose functions the units need.
template <typename Cell, typename Fn>
[[gnu::always_inline]] inline void for_phi(CellKind cell, const Fn& fn) {
  if constexpr (std::is_same_v<Cell, AnyElman>) {
    switch (cell) {
      case CellKind::kRelu: return fn(Elman<Relu>{});
      case CellKind::kIdentity: return fn(Elman<Identity>{});
      default: return fn(Elman<Tanh>{});
    }
  } else {
    fn(Cell{});
  }
}

}  // namespace
}  // namespace fastbptt
