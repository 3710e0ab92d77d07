"""A run of the GPU benchmark: its deadline, its steps, the programs it starts, and its files."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..common.files import ROOT, Record, save, write_text
from . import report

RESERVE_S = 6.0  # of the budget: for the row under way at its end, and for writing
PASSED, FAILED, CUT_OFF, SKIPPED, PRINTED = "passed", "failed", "cut off", "skipped", "printed"
HAZARDS = "hazards"  # said by a tool that cannot judge all that is right: a reader has to
Outcome = tuple[str, str]  # one of these, and in a few words what there is to say


@dataclass(frozen=True)
class Command:
    """A program to run, with what it needs in its environment."""

    words: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        assignments = [f"{name}={shlex.quote(v)}" for name, v in self.environment.items()]
        return " ".join([*assignments, shlex.join(self.words)])


def python(*words: str, **environment: str) -> Command:
    return Command([sys.executable, *words], environment)


def tool(name: str) -> str | None:
    """Where a program of the CUDA toolkit is, on the PATH or not."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


class Session:
    """The run: its deadline, its files, and what it has found."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out, self.dry_run = args, args.out, args.dry_run
        self.deadline = time.monotonic() + args.budget
        self.patience_s = args.budget  # with a program that says what it is at
        words = ["benchmarks/gpu.sh", *["--dry-run"] * args.dry_run]
        for name in ("filter", "kernels", "steps"):
            words += [f"--{name}", *getattr(args, name)] if getattr(args, name) else []
        words += ["--skip", str(args.skip)] if args.skip else []
        self.results: Record = {
            "card": {},
            "machine": {},
            "settings": {
                "command": shlex.join(words),
                "budget_s": args.budget,
                "dry_run": args.dry_run,
            },
            "complete": False,
            "measurements": 0,
            "steps": [],
            "kernels": [],
            "probe": None,
            "ceilings": None,
            "cells": [],
            "cpu_threads": [],
            "peers": {},
            "goals": [],
            "summary": [],
            "records": [],
        }

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def write(self) -> None:
        results = self.results
        results["summary"] = report.summarise(results["records"])
        results["goals"] = report.judge(results["records"])
        save(results, self.out / "gpu.json")
        write_text(self.out / "gpu.md", report.markdown(results))

    def step(self, name: str, share: float, run: Callable[[Session, float], Outcome]) -> None:
        """Runs a step within its share of the time left, and goes on whatever becomes of it."""
        left = self.left()
        limit = min(share * left, left - RESERVE_S)
        record = {"name": name, "outcome": "under way", "seconds": 0.0, "limit_s": round(limit, 1)}
        record["detail"] = ""
        outcome: Outcome = "interrupted", ""
        self.results["steps"].append(record)
        self.write()
        start = time.monotonic()
        try:
            if name not in (self.args.steps or [name]):
                outcome = SKIPPED, "not asked for"
            elif limit < 1:
                outcome = CUT_OFF, "no time left"
            else:
                print(f"== {name}, {limit:.0f} s at most", flush=True)
                outcome = run(self, limit)
        except Exception as error:  # whatever it is, the next step goes on
            outcome = FAILED, f"{type(error).__name__}: {error}"
        finally:
            record["outcome"], record["detail"] = outcome
            record["seconds"] = round(time.monotonic() - start, 1)
            self.write()
            print(f"== {name}: {', '.join(text for text in outcome if text)}", flush=True)

    def outcome(self, name: str) -> str:
        """What became of a step that is over."""
        return next(step["outcome"] for step in self.results["steps"] if step["name"] == name)

    def failed(self) -> bool:
        wrong = any(step["outcome"] == FAILED for step in self.results["steps"])
        return wrong or bool(report.failures(self.results))

    def call(
        self, command: Command, log: Path, limit_s: float, needs_gpu: bool = True
    ) -> int | None:
        """Runs a program, its output behind that of others in a log: exit status, None if cut off.

        A dry run only prints the command of one that needs a GPU.
        """
        print(f"$ {command}", flush=True)
        with log.open("a", encoding="utf-8") as file:
            print(f"$ {command}", file=file, flush=True)
            if self.dry_run and needs_gpu:
                return 0
            with started(command, stdout=file, stderr=subprocess.STDOUT) as process:
                try:
                    return process.wait(max(limit_s, 0.1))
                except subprocess.TimeoutExpired:
                    return None


@contextlib.contextmanager
def started(command: Command, **options: object) -> Iterator[subprocess.Popen]:
    """A program in a process group of its own, which ends with the block.

    In no new session, though: whatever ends this program by force is to end that one too.
    """
    group = {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}
    process = subprocess.Popen(
        command.words,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **command.environment},
        stdin=subprocess.DEVNULL,
        **group,
        **options,
    )
    try:
        yield process
    finally:
        for wanted, patience in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, wanted)
                process.wait(patience)
