"""The one command for a machine with a GPU: builds, tests, checks and measures in one go.

    benchmarks/gpu.sh                  the same as python -m benchmarks.gpu
    benchmarks/gpu.sh --steps build    in a call of its own first, where time is scarce: what it
                                       built is found there by the next one
    benchmarks/gpu.sh --dry-run        its Python on the CPU at tiny sizes, for a look at it

Needs nothing but a torch with CUDA, nvcc and a C++ compiler, and downloads nothing. Every step has
its own limit within the budget, and the next one goes on whatever becomes of it; the benchmark
takes what time is left, the most telling rows first. gpu.json, gpu.md and a log a step are written
as it goes, so that a run that is cut off keeps what it has. The exit status is 1 if a step failed
or a row computed the wrong thing, and 0 if all that ran is right, cut off or not.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from ..common.files import Record
from . import report
from .report import OURS, best, number
from .session import (
    CUT_OFF,
    FAILED,
    PASSED,
    RESERVE_S,
    ROOT,
    SKIPPED,
    Command,
    Outcome,
    Session,
    python,
    started,
)
from .steps import build, cells, probe, sanitizer, scaling, tests

MARK = "@ "  # what gpu.measure begins its lines of results with
STALL_S = 20.0  # no contender takes as long: it hangs
MAX_RESTARTS = 8
MAX_LOST = 2  # processes; a kernel that more are lost with is left out of the rows that follow


def messages(stream: TextIO, log: TextIO, session: Session) -> Iterator[Record | None]:
    """What gpu.measure says, as it says it; None when it has been silent for too long.

    Its other lines go to the log.
    """
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            most = min(session.patience_s, session.left() - RESERVE_S / 2)
            line = lines.get(timeout=max(most, 0.1))
        except queue.Empty:
            yield None
            return
        if not line:
            return
        if line.startswith(MARK):
            yield json.loads(line.removeprefix(MARK))
        else:
            print(line, end="", file=log, flush=True)


def line_of(record: Record) -> str:
    """A record in one line of the terminal."""
    name = f"{record['cell']:<5}{record['precision']:<5} {record['row']:<22} {record['mode']:<16}"
    if top := best(record):
        times, kernel = record["ms"], top[0]
        return (
            f"{name} {number(times[kernel]['median']):>8} ms ({kernel}), {record['peer']} "
            f"{number(times[record['peer']]['median'])} ms: {number(top[1])}x"
        )
    return f"{name} {record['error'] or record.get('skipped') or 'not timed'}"


def measured(session: Session, command: Command, skip: int, lost: Counter[str]) -> tuple[str, int]:
    """Runs gpu.measure: how it ended ("" as it should), and how many measurements lie behind it.

    ``lost`` counts the contenders that it was at when it was lost.
    """
    results, current, ended, at = session.results, None, "", ""
    session.patience_s = STALL_S
    with (
        (session.out / "benchmark.log").open("a", encoding="utf-8") as log,
        started(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        print(f"$ {command}", file=log, flush=True)
        for message in messages(process.stdout, log, session):
            if message is None:
                if session.left() < RESERVE_S:
                    return "", skip
                ended = f"silent for {session.patience_s:.0f} s"
                break
            kind = message.pop("kind")
            if kind == "end":
                results["complete"] = message["complete"]
                return "", skip
            if kind == "at":
                at = message["contender"]
                continue
            if kind == "begin":
                current, skip, at = message["record"], message["index"] + 1, ""
                session.patience_s = message.get("patience_s") or STALL_S
            elif kind == "record":
                current = None
                results["records"].append(message["record"])
                print(line_of(message["record"]), flush=True)
            else:  # facts
                results.update(message)
            session.write()
        else:
            ended = f"ended with status {process.wait()}"
    if current is not None:
        lost[at] += 1
        error = f"its process {ended}{f' at {at}' * bool(at)}, see benchmark.log"
        empty = {"failed": {}, "absent": {}, "accuracy": {}, "plan": {}}
        results["records"].append(current | empty | {"error": error})
        session.write()
    return ended, skip


def benchmark(session: Session, limit_s: float) -> Outcome:
    """The rows, in a process of their own: one that is lost costs the row that it was at."""
    results, skip, restarts = session.results, session.args.skip, 0
    lost: Counter[str] = Counter()
    while True:
        without = [name for name in (OURS, *results["kernels"]) if lost[name] >= MAX_LOST]
        words = ["-m", "benchmarks.gpu.measure", "--skip", str(skip)]
        words += ["--seconds", f"{max(session.left() - RESERVE_S, 0.0):.1f}"]
        words += ["--dry-run"] * session.dry_run
        words += ["--filter", *session.args.filter] if session.args.filter else []
        words += ["--kernels", *session.args.kernels] if session.args.kernels else []
        words += ["--without", *without] if without else []
        before = skip
        ended, skip = measured(session, python(*words), skip, lost)
        if not ended:
            break
        restarts += 1
        if skip == before or restarts > MAX_RESTARTS:
            return FAILED, f"the process {ended}, see benchmark.log"
    failed = len(report.failures(results))
    detail = f"{len(results['records'])} of {results['measurements']} measured, {failed} failed"
    if restarts:
        detail += f", {restarts} lost with their process"
    if without:
        detail += f", then without {' and '.join(without)}"
    return FAILED if failed else PASSED if results["complete"] else CUT_OFF, detail


# In their order, and the most that each may take of what time is left when it begins.
STEPS = {
    "build": (build, 0.6),
    "probe": (probe, 0.15),
    "tests": (tests, 0.25),
    "sanitizer": (sanitizer, 0.25),
    "cells": (cells, 0.15),
    "scaling": (scaling, 0.15),
    "benchmark": (benchmark, 1.0),
}
NEED_BUILD = ("tests", "sanitizer", "cells", "scaling", "benchmark")


def not_built(session: Session, limit_s: float) -> Outcome:
    """In place of a step that would run an older build, or none."""
    return SKIPPED, "the build failed"


def card_facts() -> Record:
    """What gpu.card says, in a process that goes: a context would stay on the card.

    Raises:
        RuntimeError: it fails, for lack of torch for one.
    """
    command = python("-m", "benchmarks.gpu.card").words
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"torch cannot be asked for the card: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _seconds(text: str) -> float:
    value = float(text)
    if not 1 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"must be seconds from 1 to a day, got {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh",
        description="Builds, tests, checks and measures the CUDA path on the card that is there.",
    )
    add = parser.add_argument
    add("--budget", type=_seconds, default=530.0, metavar="SECONDS", help="for all (default: 530)")
    add("--steps", nargs="+", choices=list(STEPS), help="default: all")
    add(
        "--filter",
        nargs="+",
        metavar="TEXT",
        default=[],
        help="measure only rows whose name contains one of these, such as 'lstm fp16 1024,16,256'",
    )
    add(
        "--kernels",
        nargs="+",
        metavar="KERNEL",
        help="time these beside the launcher's choice, as FASTBPTT_CUDA_KERNEL names them "
        "(default: every one there is)",
    )
    add("--skip", type=int, default=0, metavar="N", help="leave out the first N measurements")
    add("--out", type=Path, metavar="DIR", help="default: $OUT, or benchmarks/results/gpu")
    add("--dry-run", action="store_true", help="on the CPU, at tiny sizes, into a temporary folder")
    return parser


def _folder(args: argparse.Namespace) -> Path:
    if args.out is not None:
        return args.out
    if args.dry_run:
        return Path(tempfile.mkdtemp(prefix="fastbptt-gpu-"))
    return Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / "gpu")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the steps; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    args.out = _folder(args).resolve()
    session = Session(args)
    try:
        session.results["card"] = card_facts()
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        parser.error(str(error))
    if session.results["card"]["name"] is None and not args.dry_run:
        parser.error("torch sees no GPU; --dry-run runs without one")
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for log in args.out.glob("*.log"):
            log.unlink()
        *_, last = (name for name in STEPS if name in (args.steps or STEPS))
        for name, (run, share) in STEPS.items():
            if name in NEED_BUILD and session.outcome("build") == FAILED:
                run = not_built
            session.step(name, 1.0 if name == last else share, run)
    except KeyboardInterrupt:
        print(f"\ninterrupted: what was found is in {args.out}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    print(*report.closing(session.results), f"written to {args.out}", sep="\n")
    return 1 if session.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
