"""``python -m fastbptt``: what is installed, what runs here, and how fast; for bug reports."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import fastbptt
from fastbptt import _C, _compiler

T, B, H = 35, 32, 256  # of the timing, with as many inputs as hidden units
ROUNDS, LEAST_ROUNDS = 15, 3
BUDGET_S = 2.0  # where another program has the cores, a pass may take seconds
SETTINGS = ("FASTBPTT_", "OMP_", "MKL_", "KMP_", "GOMP_", "CUDA_VISIBLE_DEVICES")


def openmp_runtimes() -> list[str]:
    """The OpenMP libraries in this process, where the system tells; more than one is a mistake."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) > 5}
    names = ("libgomp", "libomp", "libiomp5")
    return sorted(path for path in paths if Path(path).name.startswith(names))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _load() -> str:
    return f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""


def _cuda() -> str:
    built = "kernels built" if _C.cuda_built() else "no kernels in this build"
    if torch.version.cuda is None:
        return f"{built}; torch without CUDA"
    if not torch.cuda.is_available():
        return f"{built}; torch for CUDA {torch.version.cuda}; no device"
    devices = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    names = ", ".join(f"{d.name} (sm_{d.major}{d.minor})" for d in devices)
    return f"{built}; torch for CUDA {torch.version.cuda}; {names}"


def facts() -> dict[str, str]:
    """What a bug report needs, by name."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    compilers = [path for name in _compiler.COMPILERS if (path := shutil.which(name))]
    settings = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith(SETTINGS))
    return {
        "fastbptt": f"{fastbptt.__version__}, {Path(fastbptt.__file__).parent}",
        "torch": f"{torch.__version__}, kernels {torch.backends.cpu.get_cpu_capability()}",
        "python": f"{platform.python_version()}, {platform.platform()}",
        "processor": f"{_processor()}, {cores} cores for this process{_load()}",
        "kernels": f"{_C.cpu_isa()}; {', '.join(_C.cpu_isas())} can run here",
        "threads": str(torch.get_num_threads()),
        "OpenMP": ", ".join(openmp_runtimes()) or "not known",
        "compiler": compilers[0] if compilers else "none: cells from a function run step by step",
        "CUDA": _cuda(),
        "settings": ", ".join(settings) or "none",
    }


def _training_step(module: torch.nn.Module, x: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        module.zero_grad(set_to_none=True)
        module(x)[0].sum().backward()

    return step


def timing() -> tuple[float, float, float]:
    """Milliseconds of a forward and backward pass of a GRU: ours, torch.nn's, and their ratio.

    Medians, of passes in turn; the ratio is that of a round's two.
    """
    torch.manual_seed(0)
    theirs = torch.nn.GRU(H, H)
    ours = fastbptt.GRU(H, H)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, H)
    steps = [_training_step(module, x) for module in (ours, theirs)]
    times: list[list[float]] = [[], []]
    for step in steps:  # the first calls are slower
        step()
    first = time.perf_counter()
    for done in range(ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() - first > BUDGET_S:
            break
        for step, taken in zip(steps, times, strict=True):
            begun = time.perf_counter()
            step()
            taken.append(1e3 * (time.perf_counter() - begun))
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    return statistics.median(times[0]), statistics.median(times[1]), ratio


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the facts and the timing; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastbptt", description=__doc__)
    parser.add_argument("--no-timing", action="store_true", help="print the facts alone")
    args = parser.parse_args(arguments)
    known = facts()
    width = max(map(len, known))
    for name, value in known.items():
        print(f"{name:<{width}}  {value}")
    if len(openmp_runtimes()) > 1:
        print("warning: there is more than one OpenMP library: threads wait for each other")
    if not args.no_timing:
        ours, theirs, ratio = timing()
        print(
            f"{'timing':<{width}}  GRU, T = {T}, B = {B}, I = H = {H}, forward and backward: "
            f"{ours:.2f} ms, torch.nn {theirs:.2f} ms, {ratio:.2f} times as fast"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
