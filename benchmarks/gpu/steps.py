"""The steps of the GPU benchmark before its measurements: build, tests, sanitizer, probe."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..common.files import Record
from .report import OURS
from .session import (
    CUT_OFF,
    FAILED,
    HAZARDS,
    PASSED,
    PRINTED,
    SKIPPED,
    Command,
    Outcome,
    Session,
    python,
    tool,
)

FOCUS = "lstm"  # the tests to begin with: it has all that the other cells have
CASES_END_S = 12.0  # before a sanitizer's limit: for the case under way, and to sum up
FOUND = 9  # the exit status of a sanitizer that found something
TEST_S = 30  # no test takes as long: it hangs
THREADS = (1, 2, 4, 8, 16)
SCALED = ("64", "256", "1024")  # hidden sizes


def worst(outcomes: Sequence[str]) -> str:
    known = (FAILED, CUT_OFF, HAZARDS, PASSED, SKIPPED)
    return next(outcome for outcome in known if outcome in outcomes)


def build(session: Session, limit_s: float) -> Outcome:
    """The extension, in place, for the card that is there."""
    capability = session.results["card"].get("capability", "9.0")
    environment = {
        "FASTBPTT_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": capability,
        "MAX_JOBS": str(len(os.sched_getaffinity(0))),
    }
    command = python("setup.py", "build_ext", "--inplace", **environment)
    status = session.call(command, session.out / "build.log", limit_s)
    if session.dry_run:
        return PRINTED, ""
    if status is None:
        return FAILED, "not done within its limit, see build.log"
    return (FAILED, f"status {status}, see build.log") if status else (PASSED, "")


def test_counts(log: str) -> str:
    """pytest's last line, or what there is of a run that was cut off."""
    if ended := re.findall(r"^=+ (.*) in [0-9.]+s.*=+$", log, re.MULTILINE):
        return ended[-1]
    words = re.findall(r"\b(PASSED|FAILED|ERROR)\b", log)
    counts = {word: words.count(word) for word in dict.fromkeys(words)}
    return ", ".join(f"{n} {word.lower()}" for word, n in counts.items()) or "none"


def tests(session: Session, limit_s: float) -> Outcome:
    """The CUDA tests, a focused list first, which gets half of the time at most."""
    words = ["-m", "pytest", "tests/cuda/test_cuda.py", "tests/cuda/test_user_cells_cuda.py"]
    words += ["tests/cuda/test_step_graph_cuda.py", "tests/docs/test_limits.py"]
    words += ["--all", "-v", "-rf", "--tb=short", "--no-header", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        # A wrong access ends one of the processes, not all tests.
        words += ["-n", str(max(2, len(os.sched_getaffinity(0)) // 2))]
        if importlib.util.find_spec("pytest_timeout"):  # ends the process of a test that hangs
            words += [f"--timeout={TEST_S}", "--timeout-method=thread"]
    log, end = session.out / "tests.log", time.monotonic() + limit_s
    outcomes, details = [], []
    for expression in (FOCUS, f"not {FOCUS}"):
        start = log.stat().st_size if log.exists() else 0
        left = end - time.monotonic()
        share = left / 2 if expression == FOCUS else left
        # Processes with as many threads as cores each would get in each other's way.
        command = python(*words, "-k", expression, OMP_NUM_THREADS="2")
        status = session.call(command, log, share)
        text = log.read_bytes()[start:].decode(errors="replace")
        outcome = {0: PASSED, 5: SKIPPED, None: CUT_OFF}.get(status, FAILED)
        if outcome == CUT_OFF and re.search(r"\b(FAILED|ERROR)\b", text):
            outcome = FAILED
        outcomes.append(outcome)
        details.append(f"{expression}: {test_counts(text)}{' (cut off)' * (status is None)}")
    if session.dry_run:
        return PRINTED, ""
    return worst(outcomes), "; ".join(details)


def sanitizer(session: Session, limit_s: float) -> Outcome:
    """Small cases of every kernel, under the tools that watch memory and shared memory.

    racecheck knows no mbarrier on which bytes from other blocks arrive: what it reports may be
    right, and is no failure.
    """
    log = session.out / "sanitizer.log"
    program = tool("compute-sanitizer")
    if program is None and not session.dry_run:
        return SKIPPED, "no compute-sanitizer"
    if session.dry_run:  # the cases without the tool
        command = python("-m", "benchmarks.gpu.cases", "--dry-run")
        if session.call(command, log, limit_s, needs_gpu=False) != 0:
            return FAILED, "the cases failed, see sanitizer.log"
    outcomes, details = [], []
    end = time.monotonic() + limit_s
    for name, share in (("memcheck", 0.5), ("racecheck", 1.0)):
        left = share * (end - time.monotonic())
        start = log.stat().st_size if log.exists() else 0
        words = [program or "compute-sanitizer", "--tool", name, "--error-exitcode", str(FOUND)]
        words += ["--kernel-name", "kns=fastbptt"]  # our own kernels alone
        words += [sys.executable, "-m", "benchmarks.gpu.cases"]
        # A moment, not a duration: to start under the tool takes a good part of the time.
        words += ["--deadline", f"{time.monotonic() + left - CASES_END_S:.1f}"]
        # Every tensor an allocation of its own, so that its end is known to the tool.
        status = session.call(Command(words, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}), log, left)
        text = log.read_bytes()[start:].decode(errors="replace")
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
        cases = re.findall(r"^(\d+ of \d+ cases)$", text, re.MULTILINE)
        outcome = {0: PASSED, None: CUT_OFF}.get(status, FAILED)
        if outcome == PASSED and (not summary or not cases or cases[-1].startswith("0 ")):
            outcome = CUT_OFF  # without a verdict, or one of nothing
        if status == FOUND and name == "racecheck" and summary:
            outcome = HAZARDS
        outcomes.append(outcome)
        details.append(f"{name}: {', '.join([*summary[-1:], *cases[-1:]]) or 'no summary'}")
    if session.dry_run:
        return PRINTED, ""
    return worst(outcomes), "; ".join(details)


def probe(session: Session, limit_s: float) -> Outcome:
    """How long launches, barriers and exchanges take here, and how many clusters run at once."""
    compiler = tool("nvcc")
    if compiler is None and not session.dry_run:
        return SKIPPED, "no nvcc"
    target = session.results["card"].get("capability", "9.0").replace(".", "")
    log, end = session.out / "probe.log", time.monotonic() + limit_s
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "gpu_probe")
        words = [compiler or "nvcc", "-O3", "-std=c++17", "-I", "csrc", "-o", program]
        words += ["-gencode", f"arch=compute_{target},code=sm_{target}", "benchmarks/gpu/probe.cu"]
        status = session.call(Command(words), log, limit_s)
        if status == 0:
            status = session.call(Command([program]), log, end - time.monotonic())
            session.results["probe"] = readings(log.read_text(encoding="utf-8")) or None
    if session.dry_run:
        return PRINTED, ""
    if status is None:
        return CUT_OFF, f"{len(session.results['probe'] or {})} readings"
    return (PASSED, "") if status == 0 else (FAILED, f"status {status}, see probe.log")


def scaling(session: Session, limit_s: float) -> Outcome:
    """The CPU kernels on one thread and on more, while nothing else runs on the cores.

    The results are cpu_scaling.json, of the form of benchmarks.scaling; gpu.json has its medians.
    """
    cores = len(os.sched_getaffinity(0))
    threads = [str(n) for n in THREADS if n <= cores]
    cells, sizes = (["rnn"], ["2", "4"]) if session.dry_run else (["lstm", "gru"], SCALED)
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "benchmarks.scaling", "--cells", *cells, "--axes", "H", "--values", *sizes]
        words += ["--threads", *threads, "--rounds", "3", "--budget", "0", "--out", folder]
        log = session.out / "benchmark.log"
        status = session.call(python(*words), log, limit_s, needs_gpu=False)
        found, kept = Path(folder) / "scaling.json", session.out / "cpu_scaling.json"
        if found.exists():
            shutil.copyfile(found, kept)
            records = json.loads(kept.read_text(encoding="utf-8"))["records"]
            session.results["cpu_threads"] = list(medians(records))
    detail = f"{len(session.results['cpu_threads'])} sizes"
    if status is None:
        return CUT_OFF, detail
    return (FAILED, f"status {status}, see benchmark.log") if status else (PASSED, detail)


def cells(session: Session, limit_s: float) -> Outcome:
    """Cells from functions: their kernels against the plain loop, see benchmarks.gpu.user_cells."""
    words = ["-m", "benchmarks.gpu.user_cells", "--seconds", f"{limit_s / 2:.1f}"]
    words += ["--dry-run"] * session.dry_run
    log = session.out / "benchmark.log"
    start = log.stat().st_size if log.exists() else 0
    status = session.call(python(*words), log, limit_s, needs_gpu=False)
    text = log.read_bytes()[start:].decode(errors="replace")
    found = [json.loads(line[2:]) for line in text.splitlines() if line.startswith("@ ")]
    session.results["cells"] = found
    details = [
        f"{r['row']}: {r['error'] or '{:.3g}x'.format(r['speedup'][OURS]['median'])}" for r in found
    ]
    outcome = {0: PASSED, None: CUT_OFF}.get(status, FAILED)
    return outcome, "; ".join(details) or "nothing measured, see benchmark.log"


def medians(records: Sequence[Record]) -> Iterator[Record]:
    """Each size of benchmarks.scaling's records, with its milliseconds by the threads."""
    for record in records:
        for point in record["points"]:
            yield {
                "cell": record["cell"],
                "size": f"{record['at']}, H={point['H']}",
                "ms": {n: quartiles["median"] for n, quartiles in point["ms"].items()},
            }


def readings(text: str) -> Record:
    """The probe's numbers, those before a failure too: it writes one after another."""
    return {name: float(value) for name, value in re.findall(r'"(\w+)": ([0-9.]+)', text)}
