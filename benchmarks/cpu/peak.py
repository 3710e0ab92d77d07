"""The processor's peak: as many fused multiply-adds a second as its vector units can do.

Measured, as data sheets leave out the clock that a core holds under such a load: a loop in C++
(``peak.cpp``), compiled on first use by this machine's compiler for the instruction set that the
kernels use, in as many threads as they have.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import fastbptt

from ..common.files import ROOT
from ..common.isa import family

SOURCE = Path(__file__).with_name("peak.cpp")
FOLDER = ROOT / "build" / "benchmarks"
FLAGS = ("-O2", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")
# Of the kernels' instruction sets: the width of a register, and what a compiler needs to use it.
VECTORS = {
    "avx512": (64, ("-mavx512f",)),
    "avx2": (32, ("-mavx2", "-mfma")),
    "baseline": (16, ()),
}
FLOPS = 4e8  # a thread and call, about: some milliseconds


class NoPeak(Exception):
    """The peak cannot be measured here; says why."""


def _compiler() -> list[str]:
    words = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(words[0]) is None:
        raise NoPeak(f"there is no C++ compiler {words[0]!r}: name one with CXX=")
    return words


@functools.cache
def _library(isa: str) -> ctypes.CDLL:
    """peak.cpp, compiled and loaded.

    Raises:
        NoPeak: there is no compiler, or it fails.
    """
    width, flags = VECTORS[isa]
    words = [*_compiler(), *FLAGS, *flags, f"-DKVECTOR_BYTES={width}"]
    key = hashlib.sha256(" ".join(words).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    library = FOLDER / f"peak-{isa}-{key}.so"
    try:
        if not library.exists():
            FOLDER.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
                made = Path(folder) / library.name
                command = [*words, str(SOURCE), "-o", str(made)]
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
                os.replace(made, library)
        loaded = ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip() or "nothing said").splitlines()[0]
        raise NoPeak(f"{shlex.join(words[:1])} does not compile {SOURCE.name}: {said}") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise NoPeak(f"{SOURCE.name} cannot be compiled and loaded: {error}") from None
    loaded.fma_flops.argtypes, loaded.fma_flops.restype = (ctypes.c_int64,), ctypes.c_int64
    loaded.fma_run.argtypes, loaded.fma_run.restype = (ctypes.c_int, ctypes.c_int64), None
    return loaded


class PeakStep:
    """Multiply-adds in registers, in so many threads.

    Raises:
        NoPeak: it cannot be compiled here.
    """

    def __init__(self, threads: int) -> None:
        self.isa = family(fastbptt._C.cpu_isa())
        self.threads, self.library = threads, _library(self.isa)
        self.iterations = round(FLOPS / self.library.fma_flops(1))
        self.flops = threads * self.library.fma_flops(self.iterations)

    def clear(self) -> None:
        pass

    def run(self) -> None:
        self.library.fma_run(self.threads, self.iterations)


def unavailable() -> str | None:
    """Why the peak cannot be measured here, or None."""
    try:
        PeakStep(1)
    except NoPeak as reason:
        return str(reason)
    return None
