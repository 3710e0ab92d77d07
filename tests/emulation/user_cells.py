"""The kernels of users' cells, emulated: the very source that NVRTC compiles, as C++ on the CPU.

A library of the emulation's machine is built once, and one for each cell; both are kept in the
cache that compiled cells have.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

from fastbptt import _codegen, _compiler, _nvrtc
from fastbptt._device_layer import DeviceLayer

ROOT = Path(__file__).parents[2]
MACHINE = "fiber runtime memory cluster flags limits user_cell".split()
FLAGS = (
    "-DFASTBPTT_EMULATED -std=c++17 -shared -fPIC -O1 -g1 -fno-strict-aliasing -ffp-contract=fast "
    "-Wall -Wextra -Wno-unknown-pragmas -Wno-unused-variable -Werror"
).split()
INCLUDES = [f"-I{ROOT / folder}" for folder in ("csrc", "tests")]
INCLUDES += [f"-isystem{path}" for path in include_paths()]


def _compiled(sources: Sequence[Path], work: Path) -> bytes:
    made = work / "made.so"
    call = [os.environ.get("CXX", "g++"), *FLAGS, *INCLUDES, *map(str, sources), "-o", str(made)]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return made.read_bytes()


@functools.cache
def machine() -> ctypes.CDLL:
    folder = ROOT / "tests" / "emulation"
    read = [*folder.glob("*.h"), *(folder / f"{name}.cpp" for name in MACHINE)]
    made_from = [path.read_text() for path in sorted(read)]
    path = _compiler.kept(
        [*made_from, *FLAGS],
        ".machine.so",
        lambda work: _compiled([folder / f"{name}.cpp" for name in MACHINE], work),
    )
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # the cells' libraries use it
    library.emulated_error.restype = ctypes.c_char_p
    return library


def set_order(order: str, seed: int = 0) -> None:
    """The order in which threads that can run do so: "forward", "reverse" or "random"."""
    orders = "forward", "reverse", "random"
    machine().emulated_order(orders.index(order), ctypes.c_uint64(seed))


def _kernels(text: str) -> ctypes.CDLL:
    """Those of a source, which includes what emulates them."""

    def make(work: Path) -> bytes:
        (work / "cell.cpp").write_text(text)
        return _compiled([work / "cell.cpp"], work)

    own = ROOT / "tests" / "emulation" / "user_cell.h"
    made_from = (text, _compiler.headers_hash(_nvrtc.HEADERS), own.read_text(), *FLAGS)
    machine()
    return ctypes.CDLL(str(_compiler.kept(made_from, ".emulated.so", make)))


def _address(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value


@functools.cache
def products() -> list[int]:
    emulated = [f"FASTBPTT_EMULATED_PRODUCT{kernel}" for kernel in _codegen.PRODUCT_KERNELS]
    text = [_codegen.write_products(), '#include "emulation/user_cell.h"', *emulated, ""]
    library = _kernels("\n".join(text))
    return [
        _address(library, "fastbptt_emulated_product_{}_{}_{}".format(*kernel))
        for kernel in _codegen.PRODUCT_KERNELS
    ]


class EmulatedKernels:
    """As :class:`fastbptt._device_layer.Kernels`, for tensors of the CPU."""

    def __init__(self, source: str):
        scalar = "double" if "UserCell, double)" in source else "float"
        self._library = _kernels(
            f'{source}\n#include "emulation/user_cell.h"\n'
            f"FASTBPTT_EMULATED_KERNELS(fastbptt::UserCell, {scalar})\n"
        )
        self.forward, self.backward, self.finish = (
            _address(self._library, f"fastbptt_emulated_{name}")
            for name in ("forward", "backward", "finish")
        )
        self.products = products()
        self.launch = _address(machine(), "emulated_launch")

    @contextmanager
    def stream(self) -> Iterator[None]:
        yield None

    def error(self, number: int) -> str:
        return machine().emulated_error().decode()


def layer(program, dtype: torch.dtype, recurrent: int = 0, change=lambda source: source):
    """A cell's layer by emulated kernels, of a source that ``change`` may change."""
    source = change(_codegen.write_kernels(program, recurrent, dtype))
    return DeviceLayer(program, recurrent, EmulatedKernels(source))
