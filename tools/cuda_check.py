"""Compiles the CUDA sources without a GPU: `make cuda-check`.

Every kernel for every architecture that setup.py names, and its PTX for newer cards, with a table
of what each takes: registers, shared memory, stack and spills. A spill or a stack is an error; so
are a kernel of the tensor cores' without their instructions, a trap in PTX for newer cards, and a
step of more instructions than tools/cuda_steps.txt allows. The glue is only looked through by the
C++ compiler, since a CPU build of torch has the headers that it includes and no library to link.

--write-limits sets the limits of the steps to what they are, and a margin. --quick compiles each
source for one of the architectures, without optimization and no further than PTX: that the sources
are right, not what becomes of them, in 2 minutes of a core in place of 25.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tools import cuda_steps  # noqa: E402


def read_architectures(setup: str) -> dict[str, bool]:
    """The architectures that setup.py names, as ptxas does, and whether their PTX is kept."""
    (named,) = re.findall(r'^CUDA_ARCHITECTURES = "(.+)"$', setup, re.MULTILINE)
    each = re.findall(r"(\d+)\.(\w+)(\+PTX)?", named)
    return {f"sm_{major}{minor}": bool(ptx) for major, minor, ptx in each}


BUILT = read_architectures((ROOT / "setup.py").read_text())
NEWER = ("sm_100", "sm_120")  # they get the PTX
ARCHITECTURES = (*BUILT, *NEWER)
STANDARDS = (
    "-std=c++17",
    "-std=c++20",
)  # torch takes the first up to 2.11; each compiles all of it
# torch builds extensions with these: it wants every conversion of a 16-bit number written out.
NVCC_FLAGS = [
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


class Toolkit(NamedTuple):
    nvcc: str
    ptxas: str
    nvdisasm: str
    headers: Path


class Compiled(NamedTuple):
    kernels: list[Kernel]
    steps: dict[str, cuda_steps.Counts]
    seconds: dict[str, float]  # of a processor, by architecture


def run(command: list[str]) -> tuple[str, float]:
    """What a command printed, and its processor's seconds; ends the program if it failed."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{text}")
    return text, usage.ru_utime + usage.ru_stime


def find_toolkit() -> Toolkit:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin")) or shutil.which("nvcc")
    if nvcc is None:
        sys.exit(f"cuda-check needs nvcc: it is neither in {home}/bin nor on PATH")
    # What is on PATH may be a script that calls another.
    text, _ = run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull])
    (line,) = re.findall(r"^#\$ TOP=(.+)$", text, re.M)
    top = Path(line.strip())
    of_packages = Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")
    places = [top / "bin", *of_packages, os.environ.get("PATH", os.defpath)]
    nvdisasm = shutil.which("nvdisasm", path=os.pathsep.join(map(str, places)))
    if nvdisasm is None:
        sys.exit("cuda-check needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    return Toolkit(nvcc, str(top / "bin" / "ptxas"), nvdisasm, top / "include")


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


def kernels_of(ptx: str) -> list[tuple[str, str]]:
    """Names and bodies."""
    parts = re.split(r"\.entry (\w+)\(", ptx)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def without_tensor_cores(ptx: str) -> list[str]:
    """The kernels of PTX whose name says that they multiply by tensor cores, and that do not."""
    return [
        name for name, body in kernels_of(ptx) if "Cores" in name and "mma.sync.aligned" not in body
    ]


def with_traps(ptx: str) -> list[str]:
    """The kernels that end the program, as what an architecture lacks does."""
    return [name for name, body in kernels_of(ptx) if re.search(r"\btrap;", body)]


def refuse(what: str, names: list[str], architecture: str) -> None:
    if names:
        sys.exit(f"{architecture}: {what} in {', '.join(readable(names))}")


def compile_kernels(toolkit: Toolkit, source: Path, architecture: str, standard: str) -> Compiled:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The host's code is compiled once: it takes the C++ compiler as long as cicc takes.
        what, result = ("-cubin", "it.cubin") if BUILT[architecture] else ("-c", "it.o")
        command = [toolkit.nvcc, standard, *NVCC_FLAGS, f"-arch={architecture}", what, str(source)]
        command += ["--keep", "--keep-dir", name, "-o", f"{name}/{result}"]
        report, seconds = run(command)
        of_all = {architecture: seconds}
        (ptx,), (machine_code,) = folder.glob("*.ptx"), folder.glob("*.cubin")
        text = ptx.read_text()
        refuse("no tensor-core instructions", without_tensor_cores(text), architecture)
        sass, _ = run([toolkit.nvdisasm, "-c", str(machine_code)])
        if BUILT[architecture]:
            refuse("a trap", with_traps(text), f"PTX of {architecture}")
            for newer in NEWER:
                command = [toolkit.ptxas, "-v", f"-arch={newer}", "-o", f"{name}/newer", str(ptx)]
                more, of_all[newer] = run(command)
                report += more
    kernels = parse_report(report)
    if not kernels:
        sys.exit(f"ptxas reported no kernel of {source} for {architecture}:\n{report}")
    steps = {
        kernel: counts
        for kernel, code in cuda_steps.parse_functions(sass).items()
        if (counts := cuda_steps.count_step(code))
    }
    return Compiled(kernels, steps, of_all)


def check_source(toolkit: Toolkit, source: Path, architecture: str, standard: str) -> None:
    command = [toolkit.nvcc, standard, *NVCC_FLAGS, f"-arch={architecture}", "-Xcicc", "-O0"]
    with tempfile.TemporaryDirectory() as folder:
        run([*command, "-ptx", str(source), "-o", f"{folder}/it.ptx"])


def read_reaches(header: str) -> list[str]:
    """The enumerators of exchange.cuh's Reach, of which a mangled name has the number."""
    (named,) = re.findall(r"^enum class Reach \{(.+)\};", header, re.MULTILINE)
    return [name.strip() for name in named.split(",")]


REACHES = read_reaches((ROOT / "csrc/cuda/exchange.cuh").read_text())


def readable(names: list[str]) -> list[str]:
    """Demangled, without what is the same in all of them."""
    demangled = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    short = [re.sub(r"\(anonymous namespace\)::|fastbptt::|^void ", "", name) for name in demangled]
    short = [re.sub(r"\(Reach\)(\d)", lambda of: REACHES[int(of[1])], name) for name in short]
    return [name.split(">(")[0] + ">" if ">(" in name else name.split("(")[0] for name in short]


def print_table(kernels: list[Kernel]) -> None:
    """A line a kernel, with a number for each architecture."""
    by_name: dict[str, list[Kernel]] = {}
    for name, kernel in zip(readable([k.name for k in kernels]), kernels, strict=True):
        by_name.setdefault(name, []).append(kernel)
    columns = ("registers", "shared", "stack", "spills")
    rows = [(" / ".join(ARCHITECTURES), *columns)]
    for name, each in sorted(by_name.items()):
        each.sort(key=lambda kernel: ARCHITECTURES.index(kernel.architecture))
        rows.append((name, *(" / ".join(str(getattr(k, c)) for k in each) for c in columns)))
    print_rows(rows)


def print_steps(counted: dict[cuda_steps.Key, cuda_steps.Counts]) -> None:
    rows = [(" / ".join(BUILT), "step", "to product", "to barrier")]
    for name in sorted({name for name, _ in counted}):
        each = [counted[name, sm] for sm in BUILT if (name, sm) in counted]
        rows.append((name, *(" / ".join(map(str, column)) for column in zip(*each, strict=True))))
    print_rows(rows)


def print_rows(rows: list[tuple[str, ...]]) -> None:
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    for name, *cells in rows:
        aligned = (f"  {cell:>{width}}" for cell, width in zip(cells, others, strict=True))
        print(f"{name:{first}}" + "".join(aligned))
    print()


def check_glue(cuda_headers: Path) -> None:
    include = Path(include_paths()[0])
    # A CPU build of torch lacks one generated header of c10's CUDA side.
    generated = include / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    flags = [] if generated.exists() else ["-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    flags += [f"-isystem{path}" for path in include_paths()]
    flags += [f"-isystem{cuda_headers}", f"-I{ROOT / 'csrc'}"]
    compiler = os.environ.get("CXX", "c++")
    warnings = ["-Wall", "-Wextra", "-Werror"]
    source = ROOT / "csrc" / "cuda" / "torch" / "unit_cuda.cpp"
    for standard in STANDARDS:
        run([compiler, standard, "-fsyntax-only", *warnings, *flags, str(source)])


def is_tolerated(kernel: Kernel) -> bool:
    """A lane kernel, whose threads keep as much of W as they have registers: a dozen numbers."""
    is_lane = re.search(r"lane_(forward|backward)_kernel", kernel.name) is not None
    return is_lane and kernel.stack <= 48 and kernel.spills <= 160


def main() -> None:
    toolkit = find_toolkit()
    sources = sorted((ROOT / "csrc").rglob("*.cu"))
    ways = list(zip(BUILT, STANDARDS, strict=True))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        glue = pool.submit(check_glue, toolkit.headers)
        if "--quick" in sys.argv:
            each = zip(sources, itertools.cycle(ways), strict=False)
            jobs = [pool.submit(check_source, toolkit, source, *way) for source, way in each]
            for job in [glue, *jobs]:
                job.result()
            print(f"{len(sources)} sources and the glue compile")
            return
        jobs = [
            pool.submit(compile_kernels, toolkit, source, architecture, standard)
            for source in sources
            for architecture, standard in ways
        ]
        of_jobs = zip(len(sources) * [*BUILT], jobs, strict=True)
        compiled = [(architecture, job.result()) for architecture, job in of_jobs]
        glue.result()
    kernels = [kernel for _, each in compiled for kernel in each.kernels]
    print_table(kernels)
    counted = {
        (name, sm): counts
        for sm, each in compiled
        for name, counts in zip(readable([*each.steps]), each.steps.values(), strict=True)
    }
    print_steps(counted)
    if "--write-limits" in sys.argv:
        cuda_steps.LIMITS.write_text(cuda_steps.write_limits(counted))
    too_long = cuda_steps.complaints(counted, cuda_steps.read_limits(cuda_steps.LIMITS.read_text()))
    print(*too_long, sep="\n")
    taken = {sm: sum(each.seconds.get(sm, 0) for _, each in compiled) for sm in ARCHITECTURES}
    seconds = ", ".join(f"{sm} {time:.0f}" for sm, time in taken.items())
    print(f"seconds of one core to compile for {seconds} (of PTX)")
    spilling = [k for k in kernels if k.spills > 0 or k.stack > 0]
    print(f"{len(kernels)} kernels, {len(spilling)} with spills or a stack; the glue compiles")
    spilling = [k for k in spilling if not is_tolerated(k)]
    sys.exit(1 if spilling or too_long else 0)


if __name__ == "__main__":
    main()
