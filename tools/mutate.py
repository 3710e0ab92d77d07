"""Breaks the sources in a hundred places, one after another, and counts what the tests find.

    python tools/mutate.py
    python tools/mutate.py --count 20 --seed 3 --only cpp

In a copy of the repository, build/mutants, the CPU's C++ is compiled once with a switch in each
place (tools/mutants.py), and files of Python are changed. The tests run on each mutant until one
fails, crashes or takes far longer than it did on the unbroken sources: those that come by it, fast
ones first, or all of them where none was seen to. One on which all of them pass is printed. Places
are drawn by --seed, half of them in C++. What the copy's folder holds of an earlier run with the
same arguments is not done again.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mutants
from mutants import Mutant
from scratch_copy import ROOT, ScratchCopy, optimized_by, tracked_files

WORK = ROOT / "build" / "mutants"
# Arguments of pytest. Each is run until it fails, and then the next: what finds most first.
GROUPS = (
    (
        "tests/kernels/test_rnn.py",
        "tests/kernels/test_tangent_steps.py",
        "tests/cells/test_compiled_networks.py",
        "tests/modules",
        "tests/truncation",
    ),
    (
        *("tests/kernels", "tests/derivatives", "tests/capture", "tests/cells", "tests/faults"),
        "--ignore=tests/cells/test_nvrtc.py",  # what a GPU alone runs, and holds headers to a list
    ),
)
# What a GPU alone runs, what only makes it faster, what is not run in the tests' processor.
LEFT_OUT = re.compile(
    r"csrc/cuda/|csrc/user_cell/(product|step|steps|kernels|device)\.|csrc/cpu/(split|schedule|isa_)"
    r"|fastbptt/(_nvrtc|_device_layer|__main__|_builds|opacus|onnx|flops)\.|\.(cuh|cu|pyi)$"
)
# What takes so many times as long as on the unbroken sources, and so many seconds to begin, hangs.
NOT_SLOWER, COLLECTED = 4, 180
FIRST = 50  # tests of those that come by a mutant


def sources(root: Path) -> list[str]:
    found = [*root.glob("csrc/**/*"), *root.glob("fastbptt/*.py")]
    paths = (str(path.relative_to(root)) for path in sorted(found) if path.is_file())
    return [path for path in paths if not LEFT_OUT.search(path)]


def choose(seed: int, count: int, only: str | None) -> list[Mutant]:
    """Half of them in C++ and half in Python; of each kind and file as many as chance has it."""
    everything = mutants.all_of(ROOT, sources(ROOT))
    draw = random.Random(seed)
    parts = [[m for m in everything if m.is_cpp], [m for m in everything if not m.is_cpp]]
    of_cpp = {"cpp": count, "python": 0}.get(only, count // 2)
    drawn = [draw.sample(part, n) for part, n in zip(parts, (of_cpp, count - of_cpp), strict=True)]
    return [mutant for part in drawn for mutant in part]


def with_switches(numbered: dict[int, Mutant]) -> dict[str, str]:
    """The texts of the files that have mutants, and of the header that these include."""
    by_path: dict[str, dict[int, Mutant]] = {}
    for number, mutant in numbered.items():
        by_path.setdefault(mutant.path, {})[number] = mutant
    texts = {"csrc/mutant.h": mutants.HEADER}
    for path, own in by_path.items():
        text = mutants.with_all((ROOT / path).read_text(), own)
        texts[path] = f'#include "mutant.h"\n#line 1\n{text}'
    return texts


def build(copy: ScratchCopy, numbered: dict[int, Mutant]) -> dict[int, Mutant]:
    """Builds with as many of these as compile, and gives them: types may lack the operation."""
    log = copy.folder.parent / "build.log"
    while True:
        copy.update(with_switches(numbered))
        flags = [*optimized_by("-O2"), "-include", str(copy.folder / "csrc" / "mutant.h")]
        print(f"building {len(numbered)} mutants of C++, see {log}", flush=True)
        with log.open("w") as out:
            try:
                copy.build(lambda source, flags=flags: flags, stdout=out, stderr=out)
                return numbered
            except subprocess.CalledProcessError:
                pass
        # The places that the compiler names, in errors and in how it came to them.
        named = set(re.findall(r"((?:csrc)/[\w/.]+):(\d+)", log.read_text()))
        wrong = [n for n, m in numbered.items() if (m.path, str(m.line)) in named]
        if not wrong:
            sys.exit(f"error: the copy does not build, see {log}")
        for number in wrong:
            print(f"does not compile: {numbered.pop(number)}", flush=True)


def state_of_files() -> str:
    """What differs where a file does: mutants have other numbers then, and tests come by others."""
    digest = hashlib.sha256()
    for name in tracked_files():
        digest.update(name.encode() + (ROOT / name).read_bytes())
    return digest.hexdigest()[:16]


def tests_near(number: int, measured: Sequence[dict]) -> dict[str, float]:
    """The seconds of the tests that come by a mutant."""
    everything = itertools.chain.from_iterable(group.items() for group in measured)
    return {name: seconds for name, (seconds, numbers) in everything if number in numbers}


def in_turns(tests: Mapping[str, float]) -> list[str]:
    """The fastest of each file, and so on: what is found at all, tests of many files find."""
    by_file: dict[str, list[str]] = {}
    for name in sorted(tests, key=tests.get):
        by_file.setdefault(name.partition("::")[0], []).append(name)
    turns = itertools.zip_longest(*by_file.values())
    return [name for turn in turns for name in turn if name is not None]


class Tree:
    """A copy in which tests run, one mutant at a time."""

    def __init__(self, built: ScratchCopy, folder: Path) -> None:
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        hidden = shutil.ignore_patterns("build", "__pycache__", ".pytest_cache")
        shutil.copytree(built.folder, folder, ignore=hidden)
        (folder / "build").mkdir()

    def fails(
        self, tests: Sequence[str], limit: float, *options: str, **environment: str
    ) -> str | None:
        """How the tests fail, or take more than so many seconds, or None."""
        # Not the user's cache: a cell's library has the switches of the headers.
        environment |= {"FASTBPTT_CACHE": str(self.folder / "build" / "cells")}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options]
        names = self.folder / "build" / "tests.txt"
        names.write_text("\n".join(tests))
        try:
            done = subprocess.run(
                [*command, f"@{names}"],
                cwd=self.folder,
                env=os.environ | {"GOMP_SPINCOUNT": "0", "CPPFLAGS": ""} | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=limit,
            )
        except subprocess.TimeoutExpired:
            return "hangs"
        if done.returncode == 0:
            return None
        said = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        return said[0] if said else f"status {done.returncode}"

    def measure(self, group: int, drawn: Sequence[Mutant]) -> dict[str, Sequence]:
        """Of each test the seconds where nothing is broken, and the mutants it comes by.

        Ends the program if a test fails.
        """
        reached = self.folder / "build" / "reached"
        reached.write_bytes(bytes(len(drawn)))
        lines = [
            (str(self.folder / mutant.path), mutant.line, number)
            for number, mutant in enumerate(drawn)
            if not mutant.is_cpp
        ]
        reached.with_suffix(".lines").write_text(json.dumps(lines))
        plugin = ("-p", "tools.mutants_reached")
        environment = {"FASTBPTT_MUTANTS_REACHED": str(reached)}
        if said := self.fails(GROUPS[group], 3600, *plugin, **environment):
            sys.exit(f"error: the tests fail without a mutant: {said}")
        return json.loads(reached.with_suffix(".json").read_text())

    def judge(self, number: int, mutant: Mutant, measured: Sequence[dict]) -> str | None:
        """What finds the mutant, or None."""
        runs: list[tuple[Sequence[str], float]] = []
        near = tests_near(number, measured)
        if mutant.is_cpp and not near:
            return None  # no test comes by it
        names = in_turns(near)
        # What hangs mostly does so in a first one.
        for part in (names[:FIRST], names[FIRST : 10 * FIRST], names[10 * FIRST :]):
            if part:
                runs.append((part, sum(near[name] for name in part)))
        if not near:  # in a process of its own, perhaps
            took = [sum(seconds for seconds, _ in group.values()) for group in measured]
            runs += zip(GROUPS, took, strict=True)
        environment = {}
        path = self.folder / mutant.path
        before = path.read_text()
        if mutant.is_cpp:
            environment["FASTBPTT_MUTANT"] = str(number)
        else:
            path.write_text(before[: mutant.begin] + mutant.text + before[mutant.end :])
        try:
            for tests, seconds in runs:
                if said := self.fails(tests, NOT_SLOWER * seconds + COLLECTED, **environment):
                    return said
            return None
        finally:
            path.write_text(before)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the places (default: 0)")
    parser.add_argument("--only", choices=["cpp", "python"], help="default: half of each")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    options = parser.parse_args(arguments)

    drawn = choose(options.seed, options.count, options.only)
    built = ScratchCopy(WORK / "built")
    numbered = {i: mutant for i, mutant in enumerate(drawn) if mutant.is_cpp}
    numbered = build(built, numbered)
    numbered |= {i: mutant for i, mutant in enumerate(drawn) if not mutant.is_cpp}

    name = f"{options.seed}-{options.count}-{options.only}"
    results = WORK / f"found-{name}.json"
    measurements = WORK / f"measured-{name}-{state_of_files()}.json"
    known = json.loads(results.read_text()) if results.exists() else {}
    left = {i: mutant for i, mutant in numbered.items() if str(mutant) not in known}
    trees = [Tree(built, WORK / f"tree{i}") for i in range(max(options.jobs, 1))]
    if not measurements.exists():
        with ThreadPoolExecutor(len(trees)) as pool:
            everything = itertools.repeat(drawn)
            groups = range(len(GROUPS))
            each = list(pool.map(Tree.measure, itertools.cycle(trees), groups, everything))
        measurements.write_text(json.dumps(each))
    measured = json.loads(measurements.read_text())
    free = list(trees)

    def judge(item: tuple[int, Mutant]) -> None:
        tree = free.pop()
        said = tree.judge(*item, measured)
        free.append(tree)
        known[str(item[1])] = said
        print(f"{item[1]}: {said or 'NOT FOUND'}", flush=True)
        results.write_text(json.dumps(known, indent=1))

    def duration(item: tuple[int, Mutant]) -> float:
        near = tests_near(item[0], measured)
        return sum(near.values()) if near else math.inf

    with ThreadPoolExecutor(len(trees)) as pool:
        list(pool.map(judge, sorted(left.items(), key=duration)))
    found = [said for mutant in numbered.values() if (said := known[str(mutant)])]
    print(f"{len(found)} of {len(numbered)} mutants found")
    return 0 if len(found) == len(numbered) else 1


if __name__ == "__main__":
    sys.exit(main())
