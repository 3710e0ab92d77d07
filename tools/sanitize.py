"""Runs the CPU kernels' tests under sanitizers, in copies of the repository.

    python tools/sanitize.py
    python tools/sanitize.py --only thread
    python tools/sanitize.py --only address --isa avx2 -- tests/kernels -k packed    for pytest

``address``: the whole extension with AddressSanitizer and UndefinedBehaviorSanitizer. ``thread``:
the kernels and what calls them with ThreadSanitizer, and with threads of the C++ library for those
of OpenMP, whose waits it does not see. Both run a selection of tests/kernels on each instruction
set that the CPU has. ``faults``: one fault at a time is switched on in these builds, an access
beyond the end by one, a workspace used after it was freed and a barrier left out; each must be
found. The builds are in build/sanitize, and take half an hour the first time. Needs GCC with its
sanitizers.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import mutants
from scratch_copy import ROOT, ScratchCopy, optimized_by

import setup

WORK = ROOT / "build" / "sanitize"
# What is run: every kernel, and the ends of its tiles.
TESTS = [
    "tests/kernels/test_operators.py",
    "tests/kernels/test_network_arguments.py",
    "tests/kernels/test_stacks.py",
    "tests/kernels/test_tangent_operators.py",
    "tests/kernels/test_tangent_steps.py",
    "tests/kernels/test_tangent_steps_errors.py",
    "tests/kernels/test_rnn.py::test_every_option",
    "tests/kernels/test_rnn.py::test_batch_and_units_both_shared",
    "tests/kernels/test_rnn.py::test_projections",
    "tests/kernels/test_rnn.py::test_packed_shapes",
]
FINDING = ["test_batch_and_units_both_shared", "test_shapes"]  # what finds the planted faults
# OpenMP's one parallel region, by threads whose beginning and end the sanitizer sees.
REGION = "#pragma omp parallel num_threads(parts)\n  {\n"
THREADS = """\
  const auto each = [&](int id) {
"""
REGION_END = "  }\n  // OpenMP has waited"
THREADS_END = """\
  };
  std::vector<std::thread> others;
  for (int id = 1; id < parts; ++id) others.emplace_back(each, id);
  each(0);
  for (std::thread& other : others) other.join();
  // OpenMP has waited"""

# The C library frees a thread's memory when it has ended, which is not instrumented.
SUPPRESSED = "race:_dl_deallocate_tls\n"


@dataclass(frozen=True)
class Fault:
    """A place to break in a copy, behind the switch of its number, and what then must be said."""

    what: str
    path: str
    old: str
    new: str
    said: str


FAULTS = {
    "address": (
        Fault(
            "an element beyond the end",
            "csrc/cpu/vec.h",
            "if (i < part.n) v[i] = p[i];",
            "if (i < part.n + ::fastbptt::is_mutant(0)) v[i] = p[i];",
            "heap-buffer-overflow",
        ),
        Fault(
            "a workspace used after it was freed",
            "csrc/thread_workspace.h",
            "    return memory_.get();\n  }\n  // Gives back",
            "    void* const memory = memory_.get();\n    if (is_mutant(1)) release();\n"
            "    return memory;\n  }\n  // Gives back",
            "heap-use-after-free",
        ),
    ),
    "thread": (
        Fault(
            "no wait for the other threads' states",
            "csrc/cpu/forward.h",
            "const auto await = [&] { mine.group.await(); };",
            "const auto await = [&] { if (!is_mutant(0)) mine.group.await(); };",
            "data race",
        ),
    ),
}


def replace_once(path: str, changes: dict[str, str]) -> str:
    """A file's text with places changed, each of which must be there once."""
    text = (ROOT / path).read_text()
    for old, new in changes.items():
        if text.count(old) != 1:
            sys.exit(f"error: {path} does not have once {old!r}")
        text = text.replace(old, new)
    return text


def library(name: str) -> str:
    done = subprocess.run(
        ["c++", f"-print-file-name={name}"], check=True, capture_output=True, text=True
    )
    path = done.stdout.strip()
    if not os.path.isabs(path):
        sys.exit(f"error: the compiler has no {name}: install GCC's sanitizers")
    return path


class Sanitized:
    """A copy, built with a sanitizer and with its faults, all of them off."""

    name: str
    runtime: str
    flags: Sequence[str]

    def __init__(self) -> None:
        self.copy = ScratchCopy(WORK / self.name)
        self.copy.update({"csrc/mutant.h": mutants.HEADER, **self.changed()})
        (WORK / "suppressions").write_text(SUPPRESSED)
        self.copy.build(self.flags_of, self.flags)

    def changed(self) -> dict[str, str]:
        """The texts of the copy's files that are not the repository's: with the faults in them."""
        texts = {}
        for fault in FAULTS[self.name]:
            texts[fault.path] = replace_once(fault.path, {fault.old: fault.new})
        return texts

    def flags_of(self, source: str) -> list[str]:
        header = str(self.copy.folder / "csrc" / "mutant.h")
        return [*optimized_by("-O1"), *self.flags, "-fno-omit-frame-pointer", "-include", header]

    def environment(self, isa: str, fault: int | None) -> dict[str, str]:
        # The C++ library too: else torch throws by one that the sanitizer has not seen.
        given = {
            "LD_PRELOAD": f"{library(self.runtime)} {library('libstdc++.so')}",
            "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:abort_on_error=1:"
            "allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0:history_size=7:"
            f"ignore_noninstrumented_modules=1:suppressions={WORK / 'suppressions'}",
            "GOMP_SPINCOUNT": "0",
            "FASTBPTT_CPU_ISA": isa,
        }
        if fault is not None:
            given["FASTBPTT_MUTANT"] = str(fault)
        return os.environ | given

    def run(self, isa: str, arguments: Sequence[str], fault: int | None = None, **options):
        command = [sys.executable, "-m", "pytest", "--all", "-q", "-x", "-p", "no:cacheprovider"]
        environment = self.environment(isa, fault)
        return subprocess.run(
            [*command, *arguments], cwd=self.copy.folder, env=environment, **options
        )

    def isas(self) -> list[str]:
        script = "import fastbptt; print(*fastbptt._C.cpu_isas())"
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=self.copy.folder,
            env=self.environment("baseline", None),
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.split()

    def test(self, isa: str | None, arguments: Sequence[str]) -> bool:
        """Runs tests on that instruction set, or on each."""
        failed = []
        for each in [isa] if isa else self.isas():
            print(f"{self.name} sanitizer, {each}:", flush=True)
            if self.run(each, arguments or ["-n", "2", *TESTS]).returncode:
                failed.append(each)
        if failed:
            print(f"faults or failures on {', '.join(failed)}")
        return not failed

    def find_faults(self) -> bool:
        """Whether each is found, by tests in few seconds."""
        tests = [f"tests/kernels/test_rnn.py::{name}" for name in FINDING]
        found = []
        for number, fault in enumerate(FAULTS[self.name]):
            streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            # The vectors of AVX-512 are loaded under masks, which the sanitizer does not see.
            done = self.run("avx2", ["-s", *tests], number, errors="replace", **streams)
            said = re.search(f"SUMMARY: .*{fault.said}.*", done.stdout)
            found.append(bool(said))
            print(f"{fault.what}: {said[0] if said else 'NOT FOUND'}", flush=True)
        return all(found)


class Address(Sanitized):
    name, runtime = "address", "libasan.so"
    flags = ("-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all")


class Thread(Sanitized):
    name, runtime = "thread", "libtsan.so"
    flags = ("-fsanitize=thread",)

    def changed(self) -> dict[str, str]:
        team = "csrc/cpu/team.cpp"
        text = replace_once(team, {REGION: THREADS, REGION_END: THREADS_END})
        text = "#include <vector>\n" + text.replace("omp_get_thread_num()", "id")
        return super().changed() | {team: text}

    def flags_of(self, source: str) -> list[str]:
        own = super().flags_of(source)
        if source in (*setup.KERNEL_SOURCES, "csrc/unit_cpu.cpp"):
            return own
        return [flag for flag in own if flag not in self.flags]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=["address", "thread", "faults"], help="default: all")
    parser.add_argument("--isa", help="one instruction set (default: all that the CPU has)")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    options = parser.parse_args()
    passed = []
    for sanitizer in (Address, Thread):
        if options.only in (None, "faults", sanitizer.name):
            sanitized = sanitizer()
            if options.only != "faults":
                passed.append(sanitized.test(options.isa, options.pytest))
            if options.only in (None, "faults"):
                passed.append(sanitized.find_faults())
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
