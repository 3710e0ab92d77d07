// From the number of a cell to its type.
#pragma once

#include "cells.h"
#include "params.h"

namespace fastbptt {
namespace {

// Calls fn(Cell{}).
template <typename Fn>
void for_cell(CellKind cell, Fn&& fn) {
  switch (cell) {
    case CellKind::kTanh: return fn(Elman<Tanh>{});
    case CellKind::kRelu: return fn(Elman<Relu>{});
    case CellKind::kIdentity: return fn(Elman<Identity>{});
    case CellKind::kGru: return fn(Gru{});
    case CellKind::kLstm: return fn(Lstm{});
  }
}

}  // namespace
}  // namespace fastbptt
