"""Compiles the CUDA sources without a GPU: `make cuda-check`.

Every kernel for every architecture, with a table of what each takes: registers, shared memory,
stack and spills. A spill or a stack is an error, and so is a kernel of the tensor cores' without
their instructions. The glue is only looked through by the C++ compiler, since a
CPU build of torch has the headers that it includes and no library to link.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("sm_80", "sm_90a")
STANDARD = "-std=c++20"
# torch builds extensions with these: it wants every conversion of a 16-bit number written out.
NVCC_FLAGS = [
    STANDARD,
    "-O3",
    "-I" + str(ROOT / "csrc"),
    "-Werror=all-warnings",
    "-Xptxas=-v",
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
]


class Kernel(NamedTuple):
    name: str
    architecture: str
    registers: int
    shared: int  # bytes that are not asked for at launch
    stack: int
    spills: int  # bytes, stores and loads


def run(command: list[str]) -> str:
    """What a command printed; ends the program if it failed."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def find_toolkit() -> tuple[str, Path]:
    """nvcc, and the folder of the toolkit's headers."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin")) or shutil.which("nvcc")
    if nvcc is None:
        sys.exit(f"cuda-check needs nvcc: it is neither in {home}/bin nor on PATH")
    # What is on PATH may be a script that calls another.
    (line,) = re.findall(
        r"^#\$ TOP=(.+)$", run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]), re.M
    )
    return nvcc, Path(line.strip()) / "include"


# As `ptxas -v` words it, kernel by kernel.
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def parse_report(text: str) -> list[Kernel]:
    kernels = []
    for match in REPORT.finditer(text):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        kernels.append(
            Kernel(
                match["name"],
                match["architecture"],
                int(match["registers"]),
                int(shared[1]) if shared else 0,
                int(match["stack"]),
                int(match["stores"]) + int(match["loads"]),
            )
        )
    return kernels


def without_tensor_cores(ptx: str) -> list[str]:
    """The kernels of PTX whose name says that they multiply by tensor cores, and that do not."""
    bodies = re.split(r"\.entry (\w+)\(", ptx)
    named = zip(bodies[1::2], bodies[2::2], strict=True)
    return [name for name, body in named if "Cores" in name and "mma.sync.aligned" not in body]


def compile_kernels(nvcc: str, source: Path, architecture: str) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *NVCC_FLAGS, f"-arch={architecture}", "-c", str(source)]
        report = run([*command, "--keep", "--keep-dir", folder, "-o", f"{folder}/kernels.o"])
        lacking = [
            name
            for ptx in Path(folder).glob("*.ptx")
            for name in without_tensor_cores(ptx.read_text())
        ]
    if lacking:
        sys.exit(f"{architecture}: no tensor-core instructions in {', '.join(readable(lacking))}")
    kernels = parse_report(report)
    if not kernels:
        sys.exit(f"ptxas reported no kernel of {source} for {architecture}:\n{report}")
    return kernels


def readable(names: list[str]) -> list[str]:
    """Demangled, without what is the same in all of them."""
    demangled = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    short = [re.sub(r"\(anonymous namespace\)::|fastbptt::|^void ", "", name) for name in demangled]
    return [name.split(">(")[0] + ">" if ">(" in name else name.split("(")[0] for name in short]


def print_table(kernels: list[Kernel]) -> None:
    """A line a kernel, with a number for each architecture."""
    by_name: dict[str, list[Kernel]] = {}
    for name, kernel in zip(readable([k.name for k in kernels]), kernels, strict=True):
        by_name.setdefault(name, []).append(kernel)
    width = max(map(len, by_name))
    columns = ("registers", "shared", "stack", "spills")
    print(f"{' / '.join(ARCHITECTURES):{width}}" + "".join(f"{c:>12}" for c in columns))
    for name, each in sorted(by_name.items()):
        each.sort(key=lambda kernel: ARCHITECTURES.index(kernel.architecture))
        cells = (" / ".join(str(getattr(kernel, c)) for kernel in each) for c in columns)
        print(f"{name:{width}}" + "".join(f"{cell:>12}" for cell in cells))


def check_glue(cuda_headers: Path) -> None:
    include = Path(include_paths()[0])
    # A CPU build of torch lacks one generated header of c10's CUDA side.
    generated = include / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    flags = [] if generated.exists() else ["-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    flags += [f"-isystem{path}" for path in include_paths()]
    flags += [f"-isystem{cuda_headers}", f"-I{ROOT / 'csrc'}"]
    compiler = os.environ.get("CXX", "c++")
    warnings = ["-Wall", "-Wextra", "-Werror"]
    sources = map(str, sorted((ROOT / "csrc" / "cuda" / "torch").glob("*.cpp")))
    run([compiler, STANDARD, "-fsyntax-only", *warnings, *flags, *sources])


def main() -> None:
    nvcc, cuda_headers = find_toolkit()
    sources = sorted((ROOT / "csrc").rglob("*.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        glue = pool.submit(check_glue, cuda_headers)
        jobs = [
            pool.submit(compile_kernels, nvcc, source, architecture)
            for source in sources
            for architecture in ARCHITECTURES
        ]
        kernels = [kernel for job in jobs for kernel in job.result()]
        glue.result()
    print_table(kernels)
    spilling = [k for k in kernels if k.spills > 0 or k.stack > 0]
    print(f"{len(kernels)} kernels, {len(spilling)} with spills or a stack; the glue compiles")
    sys.exit(1 if spilling else 0)


if __name__ == "__main__":
    main()
