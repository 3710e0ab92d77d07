"""Cells that the user's own compiler has made kernels of."""

from __future__ import annotations

import threading
import warnings

import torch

from fastbptt import _codegen, _compiler
from fastbptt._cpu_layer import CpuLayer, instruction_set
from fastbptt._layer import Arguments, Gradients, Kept, Layer
from fastbptt._program import Program

__all__ = ["Arguments", "Gradients", "Kept", "Layer", "available", "instruction_set", "layer"]

#: As in csrc/cpu/gemm.h.
MOST_GATES = 128

_layers: dict[tuple, Layer | None] = {}
_lock = threading.Lock()
_said: set[str] = set()


def layer(
    program: Program, dtype: torch.dtype, device: torch.device | str = "cpu", recurrent: int = 0
) -> Layer | None:
    """The compiled cell, or None where there is none: where it should be, a warning says once why.

    Args:
        program: the cell's function, of at most 128 gates; there are no compiled cells with more.
        dtype: likewise float32 or float64.
        device: likewise the CPU.
        recurrent: the number of the state that W_hh sees.
    """
    is_there = dtype in _codegen.SCALARS and program.gates <= MOST_GATES
    if not is_there or torch.device(device).type != "cpu":
        return None
    isa = instruction_set()
    key = repr(program), recurrent, dtype, isa  # as text: 0.0 and -0.0 are equal
    with _lock:
        if key not in _layers:
            try:
                source = _codegen.write_library(program, recurrent, dtype, isa)
                library = _compiler.library(source, _codegen.INSTRUCTION_SETS[isa][2])
                _layers[key] = CpuLayer(program, dtype, isa, recurrent, library)
            except _compiler.Unavailable as error:
                _layers[key] = None
                message = str(error)
                if message not in _said:
                    _said.add(message)
                    warnings.warn(
                        f"fastbptt could not compile a cell, which runs step by step: {message}",
                        RuntimeWarning,
                        stacklevel=2,
                    )
        return _layers[key]


def available(
    program: Program, dtype: torch.dtype, device: torch.device | str = "cpu", recurrent: int = 0
) -> bool:
    """Whether there is a compiled cell, which is compiled if it was not yet."""
    return layer(program, dtype, device, recurrent) is not None
