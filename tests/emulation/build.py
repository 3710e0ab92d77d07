"""Builds the emulation: the CUDA kernels and their glue as C++, with operators for CPU tensors.

Under AddressSanitizer, by hand (it ends a run at the first fault, so without the broken kernels):
env FASTBPTT_SANITIZE=address ASAN_OPTIONS=detect_leaks=0 \
    LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
    .venv/bin/python -m pytest -s tests/cuda/test_emulation.py -k "not (broken or guards or gpus)"
"""

from __future__ import annotations

import fcntl
import os
import sysconfig
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]

# What is built, from the repository's root. A .cu file is compiled as C++.
SOURCES = [
    "csrc/cuda/torch/unit_cuda.cpp",
    "tests/emulation/unit_operators.cpp",
    "csrc/cuda/lane_bfloat16.cu",
    "csrc/cuda/lane_float.cu",
    "csrc/cuda/lane_half.cu",
    "csrc/cuda/persistent_bfloat16.cu",
    "csrc/cuda/persistent_float.cu",
    "csrc/cuda/persistent_half.cu",
    "csrc/cuda/persistent_tf32.cu",
    "csrc/cuda/stepwise.cu",
    "csrc/cuda/tangent.cu",
    "tests/emulation/fiber.cpp",
    "tests/emulation/runtime.cpp",
    "tests/emulation/memory.cpp",
    "tests/emulation/cluster.cpp",
    "tests/emulation/flags.cpp",
    "tests/emulation/limits.cpp",
    "tests/emulation/test_kernels.cu",
]
FLAGS = [
    "-DFASTBPTT_EMULATED",
    "-Og",  # most of the time is the compiler's: half of that of -O1, and the tests take as long
    "-g1",
    "-fno-strict-aliasing",  # nvcc has none
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Werror",
]


def as_cpp(source: str, folder: Path) -> str:
    """The path of a source that the C++ compiler takes for C++."""
    path = ROOT / source
    if path.suffix != ".cu":
        return str(path)
    wrapper = folder / f"{path.stem}_cu.cpp"
    text = f'#include "{path}"\n'
    if not wrapper.exists() or wrapper.read_text() != text:
        wrapper.write_text(text)
    return str(wrapper)


def load() -> None:
    """Builds what has changed and loads the operators, torch.ops.emulation among them."""
    sanitizer = os.environ.get("FASTBPTT_SANITIZE")
    folder = ROOT / "build" / ("emulation-" + sanitizer if sanitizer else "emulation")
    folder.mkdir(parents=True, exist_ok=True)
    flags = [f"-fsanitize={sanitizer}"] if sanitizer else []
    # torch looks for ninja on PATH, which lacks an environment's scripts unless it is activated.
    path = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), path])
    try:
        with open(folder / ".building", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # given up by a process that dies, unlike torch's own
            (folder / "lock").unlink(missing_ok=True)
            cpp_extension.load(
                "fastbptt_emulated",
                [as_cpp(source, folder) for source in SOURCES],
                extra_cflags=FLAGS + flags,
                extra_ldflags=flags,
                extra_include_paths=[str(ROOT / "csrc"), str(ROOT / "tests")],
                build_directory=str(folder),
                is_python_module=False,
            )
    finally:
        os.environ["PATH"] = path
    assert hasattr(torch.ops.emulation, "check_guards")


if __name__ == "__main__":
    os.nice(10)  # beside tests
    load()
