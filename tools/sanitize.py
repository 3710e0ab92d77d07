"""Runs the CPU kernels' tests under sanitizers, in a copy of the repository.

    python tools/sanitize.py
    python tools/sanitize.py --isa avx2 -- tests/kernels -k packed    one set; arguments for pytest

The whole extension is built with AddressSanitizer and UndefinedBehaviorSanitizer in build/sanitize,
half an hour the first time, and runs a selection of tests/kernels on each instruction set that the
CPU has. Needs GCC with its sanitizers.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from scratch_copy import ROOT, ScratchCopy, optimized_by

WORK = ROOT / "build" / "sanitize"
ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
ADDRESS += ["-fno-omit-frame-pointer"]
# What is run: every kernel, and the ends of its tiles.
TESTS = [
    "tests/kernels/test_operators.py",
    "tests/kernels/test_network_arguments.py",
    "tests/kernels/test_stacks.py",
    "tests/kernels/test_tangent_operators.py",
    "tests/kernels/test_tangent_steps.py",
    "tests/kernels/test_tangent_steps_errors.py",
    "tests/kernels/test_rnn.py::test_every_option",
    "tests/kernels/test_rnn.py::test_projections",
    "tests/kernels/test_rnn.py::test_packed_shapes",
]


def library(name: str) -> str:
    done = subprocess.run(
        ["c++", f"-print-file-name={name}"], check=True, capture_output=True, text=True
    )
    path = done.stdout.strip()
    if not os.path.isabs(path):
        sys.exit(f"error: the compiler has no {name}: install GCC's sanitizers")
    return path


def address_environment() -> dict[str, str]:
    # The C++ library too: else what torch throws is thrown by one that the sanitizer has not seen.
    preloaded = f"{library('libasan.so')} {library('libstdc++.so')}"
    options = "detect_leaks=0:detect_odr_violation=0:abort_on_error=1:allocator_may_return_null=1"
    return os.environ | {
        "LD_PRELOAD": preloaded,
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "GOMP_SPINCOUNT": "0",
    }


def address_copy() -> ScratchCopy:
    copy = ScratchCopy(WORK / "address")
    copy.update()
    return copy


def build_address(copy: ScratchCopy) -> None:
    copy.build([*optimized_by("-O1"), *ADDRESS], ADDRESS)


def runnable_isas(copy: ScratchCopy) -> list[str]:
    script = "import fastbptt; print(*fastbptt._C.cpu_isas())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=copy.folder,
        env=address_environment(),
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.split()


def address(arguments: argparse.Namespace) -> int:
    copy = address_copy()
    build_address(copy)
    failed = []
    for isa in [arguments.isa] if arguments.isa else runnable_isas(copy):
        print(f"AddressSanitizer and UndefinedBehaviorSanitizer, {isa}:", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        own = arguments.pytest or ["-n", "2", *TESTS]
        environment = address_environment() | {"FASTBPTT_CPU_ISA": isa}
        if subprocess.run([*command, *own], cwd=copy.folder, env=environment).returncode:
            failed.append(isa)
    if failed:
        print(f"faults or failures on {', '.join(failed)}")
    return int(bool(failed))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--isa", help="one instruction set (default: all that the CPU has)")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    return address(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
