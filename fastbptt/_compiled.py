"""Cells that the user's own compiler, or NVRTC, has made kernels of."""

from __future__ import annotations

import threading
import warnings

import torch

from fastbptt import _codegen, _compiler, _nvrtc
from fastbptt._cpu_layer import CpuLayer, instruction_set
from fastbptt._device_layer import DeviceLayer, fits
from fastbptt._layer import Arguments, Gradients, Kept, Layer
from fastbptt._program import Program

__all__ = ["Arguments", "Gradients", "Kept", "Layer", "available", "layer", "variant"]

#: As in csrc/cpu/gemm.h.
MOST_GATES = 128

_layers: dict[tuple, Layer | None] = {}
_lock = threading.Lock()
_said: set[str] = set()


def variant(device: torch.device | str) -> str | None:
    """What a cell is compiled for, of the instruction sets and devices; None: there is nothing."""
    device = torch.device(device)
    if device.type == "cpu":
        return instruction_set()
    if device.type != "cuda":
        return None
    return f"cuda:{torch.cuda.current_device() if device.index is None else device.index}"


def _make(program: Program, dtype: torch.dtype, recurrent: int, variant: str) -> Layer:
    if program.gates > MOST_GATES:
        raise _compiler.Unavailable(
            f"its function has {program.gates} gates, and kernels at most {MOST_GATES}"
        )
    if variant in _codegen.INSTRUCTION_SETS:
        source = _codegen.write_library(program, recurrent, dtype, variant)
        library = _compiler.library(source, _codegen.INSTRUCTION_SETS[variant][2])
        return CpuLayer(program, dtype, variant, recurrent, library)
    if not fits(program):
        raise _compiler.Unavailable("the cell has too many arguments for a GPU's kernel")
    source = _codegen.write_kernels(program, recurrent, dtype)
    return DeviceLayer(program, recurrent, _nvrtc.CudaKernels(source, torch.device(variant)))


def layer(
    program: Program, dtype: torch.dtype, device: torch.device | str = "cpu", recurrent: int = 0
) -> Layer | None:
    """The compiled cell, or None where there is none: where it should be, a warning says once why.

    Args:
        program: the cell's function, of at most 128 gates.
        dtype: float32 or float64; in others there are no compiled cells.
        device: likewise a CPU or a CUDA GPU.
        recurrent: the number of the state that W_hh sees.
    """
    if dtype not in _codegen.SCALARS:
        return None
    own = variant(device)
    if own is None:
        return None
    key = repr(program), recurrent, dtype, own  # as text: 0.0 and -0.0 are equal
    with _lock:
        if key not in _layers:
            try:
                _layers[key] = _make(program, dtype, recurrent, own)
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
