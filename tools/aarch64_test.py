"""Builds the package for AArch64 and runs its tests in an emulated processor: `make aarch64-test`.

A cross compiler builds, qemu's user mode emulates; a Python and the packages for AArch64 stand in
build/aarch64, unpacked and not installed. They are fetched once, by apt-get and pip. Arguments go
to pytest, in place of the tests that are named here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOME = ROOT / "build" / "aarch64"
SYSTEM, SITE, PYTHON = HOME / "system", HOME / "site", HOME / "python"
TREE = HOME / "tree"  # the package, and what else of a checkout the tests need
COMPILER = "aarch64-linux-gnu-g++"
#: The last version of torch whose wheels for AArch64 on PyPI need no CUDA.
TORCH = "torch==2.10.0"
#: What torch and the tests below import, without what only other processors need.
PACKAGES = (
    *("filelock", "fsspec", "jinja2", "networkx", "sympy", "typing_extensions"),
    *("expecttest", "hypothesis", "numpy", "pytest", "setuptools"),
)
DEBIAN = ("python3", "libpython3-dev", "python3-distutils", "libgomp1", "libstdc++6")
#: All that qemu emulates but SVE: with it torch's own kernels meet an unknown instruction.
PROCESSOR = "max,sve=off"
#: What half an hour holds: each cell, type and mode of the kernels, and that bits repeat.
TESTS = (
    "tests/kernels/test_rnn.py::test_every_option",
    "tests/kernels/test_rnn.py::test_same_input_same_bits",
    "tests/kernels/test_16_bits.py::test_error_of_modes",
    "tests/kernels/test_16_bits.py::test_same_bits_each_time",
    "tests/kernels/test_accuracy.py::test_float32_error_of_other_nonlinearities",
    "tests/kernels/test_stacks.py::test_without_gradients",
    "tests/kernels/test_tangent_steps.py::test_steps",
    "tests/truncation/test_modes.py::test_float32_error",
    "tests/truncation/test_modes.py::test_same_bits_each_time",
    "tests/truncation/test_resets.py::test_segments_alone",
    "tests/cells/test_compiled.py::test_equals_its_program",
    "tests/cells/test_compiled.py::test_threads_and_repeats",
)
#: The baseline's instructions are no processor's own.
CHOICE = "not baseline"


def say(text: str) -> None:
    print(text, flush=True)


def check_tools() -> None:
    lacking = {
        "g++-aarch64-linux-gnu": shutil.which(COMPILER),
        "qemu-user": shutil.which("qemu-aarch64"),
        "apt": shutil.which("apt-get"),
        "dpkg": shutil.which("dpkg"),
        "ninja-build": shutil.which("ninja"),
    }
    packages = [package for package, found in lacking.items() if not found]
    if packages:
        sys.exit(
            "error: make aarch64-test needs a Debian with a cross compiler and qemu: "
            f"apt-get install {' '.join(packages)}"
        )


def fetch_system() -> None:
    """Debian's Python for AArch64. An apt of its own leaves that of the machine as it is."""
    apt = HOME / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    config = apt / "apt.conf"
    config.write_text(
        'APT::Architecture "arm64";\nAPT::Architectures { "arm64"; };\n'
        f'Dir::State "{apt}";\nDir::State::status "{apt}/status";\nDir::Cache "{apt}/cache";\n'
    )
    quiet = {"env": {**os.environ, "APT_CONFIG": str(config)}, "stdout": subprocess.DEVNULL}
    subprocess.run(["apt-get", "-qq", "update"], check=True, **quiet)
    download = ["apt-get", "-qq", "--yes", "--no-install-recommends", "--download-only", "install"]
    subprocess.run([*download, *DEBIAN], check=True, **quiet)
    for package in sorted((apt / "cache/archives").glob("*.deb")):
        subprocess.run(["dpkg", "-x", package, SYSTEM], check=True)
    shutil.rmtree(apt)


def write_python() -> str:
    """Makes a program that runs that Python, and so what tests start, in qemu; its version."""
    real = next(path for path in SYSTEM.glob("usr/bin/python3.*") if path.name[-1].isdigit())
    PYTHON.write_text(
        f"#!/bin/sh\nexport PYTHONHOME={SYSTEM}/usr PYTHONPATH=${{PYTHONPATH-{SITE}}}\n"
        f'exec qemu-aarch64 -cpu {PROCESSOR} -L {SYSTEM} -0 {PYTHON} {real} "$@"\n'
    )
    PYTHON.chmod(0o755)
    return real.name.removeprefix("python")


def fetch_packages(version: str) -> None:
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (28, 27, 17)]
    target = ["--only-binary=:all:", f"--python-version={version}", "--target", SITE]
    pip = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check", "install"]
    pip += [*platforms, "--platform=manylinux2014_aarch64", *target]
    # pip takes the markers of the processor that it runs on, and torch's ask for CUDA on x86.
    subprocess.run([*pip, "--no-deps", TORCH], check=True)
    subprocess.run([*pip, *PACKAGES], check=True)


def prepare() -> None:
    """Fetches what is not there yet."""
    stamp = HOME / ".fetched"
    wanted = "\n".join((TORCH, *PACKAGES, *DEBIAN))
    if stamp.exists() and stamp.read_text() == wanted:
        write_python()
        return
    say(f"fetching a Python for AArch64 by apt-get and {TORCH} by pip into {HOME} (250 MB)")
    for folder in (SYSTEM, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    HOME.mkdir(parents=True, exist_ok=True)
    fetch_system()
    fetch_packages(write_python())
    stamp.write_text(wanted)


def build() -> None:
    """Builds the package as setup.py does, run by the emulated Python."""
    say(f"building fastbptt with {COMPILER}")
    headers = [SYSTEM / "usr/include", *SYSTEM.glob("usr/include/python3.*")]
    flags = " ".join(f"-idirafter {path}" for path in headers)
    env = {**os.environ, "CC": COMPILER.replace("g++", "gcc"), "CXX": COMPILER}
    env |= {"CFLAGS": flags, "FASTBPTT_CUDA": "0"}
    folders = ["--build-lib", TREE, "--build-temp", HOME / "objects"]
    command = [PYTHON, "setup.py", "-q", "build", *folders]
    with (HOME / "build.log").open("w") as log:
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        sys.exit(f"error: the build failed, see {log.name}")
    # Beside the built package stands what else a checkout has.
    for path in ROOT.iterdir():
        if path.name not in ("fastbptt", "build", ".git") and not (TREE / path.name).exists():
            (TREE / path.name).symlink_to(path)


def run(arguments: list[str]) -> int:
    """Runs the tests, and says where."""
    # Users' cells are compiled by the cross compiler, in this machine's own processor.
    env = {**os.environ, "CXX": COMPILER, "FASTBPTT_CACHE": str(HOME / "cells")}
    script = (
        "import platform, torch, fastbptt, sys, pytest\n"
        f"print('on an emulated', platform.machine(), '({PROCESSOR}, qemu): torch',"
        " torch.__version__, 'and the instruction sets', *fastbptt._C.cpu_isas(), flush=True)\n"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    tests = ["--hypothesis-profile=emulated", *(arguments or [*TESTS, "-k", CHOICE, "-v"])]
    return subprocess.run([PYTHON, "-c", script, *tests], cwd=TREE, env=env).returncode


def main() -> None:
    check_tools()
    prepare()
    build()
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
