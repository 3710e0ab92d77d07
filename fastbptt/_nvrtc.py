"""Kernels of a cell on a GPU: compiled by NVRTC, which comes with torch, and run by the driver.

NVRTC needs no GPU and no headers but the package's; the driver is that of the process's torch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from fastbptt import _codegen, _compiler
from fastbptt._compiler import Unavailable

#: What the kernels' sources include.
HEADERS = (
    *("cells.h", "few_rows.cuh", "few_rows.h", "host_device.h", "scalar.h", "unrolled.cuh"),
    *("user_cell/device.cuh", "user_cell/kernels.cuh", "user_cell/operations.h"),
    *("user_cell/product.cuh", "user_cell/step.h"),
)
FLAGS = ("--std=c++17", "-default-device", "-w")


def _places() -> Iterator[Path]:
    """Folders that may have libnvrtc, that of torch's own packages first."""
    for folder in (Path(torch.__file__).parents[1], *map(Path, sys.path)):
        yield from sorted(folder.glob("nvidia/*/lib"))
    yield Path(torch.__file__).parent / "lib"
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home:
            yield from (Path(home, "lib64"), Path(home, "lib"))
    yield Path(sys.prefix, "lib")


def _candidates() -> Iterator[str]:
    major = (torch.version.cuda or "").partition(".")[0]
    for folder in _places():
        # Beside it lies a library that it opens by its name alone.
        for builtins in sorted(folder.glob(f"libnvrtc-builtins*.so.{major}*")):
            if ".alt." not in builtins.name:
                try:
                    ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
                except OSError:
                    continue
        yield from map(str, sorted(folder.glob(f"libnvrtc*.so.{major}*")))
    yield f"libnvrtc.so.{major}" if major else "libnvrtc.so"


@functools.cache
def library() -> ctypes.CDLL:
    """NVRTC, of the CUDA version that torch has.

    Raises:
        Unavailable: there is none.
    """
    for path in _candidates():
        if "builtins" in path or ".alt." in path:
            continue
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    raise Unavailable(
        f"there is no NVRTC (libnvrtc.so) of CUDA {torch.version.cuda}, which compiles cells for a "
        "GPU: neither beside torch nor under CUDA_HOME"
    )


def _check(nvrtc: ctypes.CDLL, result: int) -> None:
    if result:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise Unavailable(f"NVRTC failed: {nvrtc.nvrtcGetErrorString(result).decode()}")


def version(nvrtc: ctypes.CDLL) -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(nvrtc, nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"NVRTC {major.value}.{minor.value}"


def architecture_for(nvrtc: ctypes.CDLL, capability: tuple[int, int]) -> str:
    """What to compile for a device: its own code, or PTX where NVRTC is older than the device."""
    count = ctypes.c_int()
    _check(nvrtc, nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    known = (ctypes.c_int * count.value)()
    _check(nvrtc, nvrtc.nvrtcGetSupportedArchs(known))
    own = 10 * capability[0] + capability[1]
    if own in known:
        return f"sm_{own}"
    older = [each for each in known if each < own]
    if not older:
        raise Unavailable(f"{version(nvrtc)} knows no GPU of compute capability {capability}")
    return f"compute_{max(older)}"


def _compile(nvrtc: ctypes.CDLL, source: str, flags: Sequence[str], is_code: bool) -> bytes:
    include = _compiler.headers()
    texts = (ctypes.c_char_p * len(HEADERS))(*((include / h).read_bytes() for h in HEADERS))
    names = (ctypes.c_char_p * len(HEADERS))(*(h.encode() for h in HEADERS))
    options = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
    program = ctypes.c_void_p()
    _check(
        nvrtc,
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"cell.cu", len(HEADERS), texts, names
        ),
    )

    def result(kind: str) -> bytes:
        size = ctypes.c_size_t()
        _check(nvrtc, getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size)))
        text = ctypes.create_string_buffer(size.value)
        _check(nvrtc, getattr(nvrtc, f"nvrtcGet{kind}")(program, text))
        return text.raw

    try:
        if nvrtc.nvrtcCompileProgram(program, len(flags), options):
            said = result("ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
            raise Unavailable(f"{version(nvrtc)} failed: {said[:2000]}")
        return result("CUBIN" if is_code else "PTX")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def image(source: str, capability: tuple[int, int]) -> bytes:
    """What a driver loads of a source, for a device of such a capability: from the cache, or new.

    Raises:
        Unavailable: there is no NVRTC, or it fails; with its message.
    """
    nvrtc = library()
    architecture = architecture_for(nvrtc, capability)
    flags = [f"--gpu-architecture={architecture}", *FLAGS]
    made_from = (source, _compiler.headers_hash(HEADERS), version(nvrtc), *flags)
    path = _compiler.kept(
        made_from,
        ".cubin",
        lambda _: _compile(nvrtc, source, flags, architecture.startswith("sm_")),
    )
    return _compiler.content(path)


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise Unavailable(f"there is no CUDA driver: {error}") from error


def _message(number: int) -> str:
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(number, ctypes.byref(text))
    return f"CUDA error {number}: {(text.value or b'unknown').decode()}"


def _check_driver(number: int) -> None:
    if number:
        raise Unavailable(_message(number))


class _Module:
    """The kernels of a source on one device, compiled and loaded."""

    def __init__(self, source: str, device: torch.device):
        code = image(source, torch.cuda.get_device_capability(device))
        cuda, self._module, self.context = _driver(), ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # so that the device's own context is there
            _check_driver(cuda.cuCtxGetCurrent(ctypes.byref(self.context)))
            _check_driver(cuda.cuModuleLoadData(ctypes.byref(self._module), code))

    def function(self, name: str) -> int:
        function = ctypes.c_void_p()
        _check_driver(
            _driver().cuModuleGetFunction(
                ctypes.byref(function), self._module, f"fastbptt_{name}".encode()
            )
        )
        assert function.value is not None
        return function.value


@functools.cache
def _products(device: torch.device) -> list[int]:
    """Those kernels of a device that all cells share."""
    module = _Module(_codegen.write_products(), device)
    return [
        module.function("product_{}_{}_{}".format(*kernel)) for kernel in _codegen.PRODUCT_KERNELS
    ]


class CudaKernels:
    """Of a cell, on one device; see :class:`fastbptt._device_layer.Kernels`."""

    def __init__(self, source: str, device: torch.device):
        """Compiles and loads them.

        Raises:
            Unavailable: NVRTC or the driver cannot.
        """
        if torch.version.cuda is None:
            raise Unavailable("torch is not built for CUDA, which cells are compiled for")
        module = _Module(source, device)
        self._device, self._context = device, module.context
        self.forward, self.backward, self.finish = (
            module.function(f"cell_{name}") for name in ("forward", "backward", "finish")
        )
        self.products = _products(device)
        self.launch = ctypes.cast(_driver().cuLaunchKernel, ctypes.c_void_p).value

    @contextmanager
    def stream(self) -> Iterator[int]:
        with torch.cuda.device(self._device):
            # A thread that has not yet used the device may have no context.
            _check_driver(_driver().cuCtxSetCurrent(self._context))
            yield torch.cuda.current_stream().cuda_stream

    @staticmethod
    def error(number: int) -> str:
        return _message(number)
