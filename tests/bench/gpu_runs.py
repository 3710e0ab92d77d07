"""What the tests of the GPU benchmark share: a run without a card, programs that act a part."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.common.rows import FORWARD
from benchmarks.gpu import measure as gpu_measure
from benchmarks.gpu import session as gpu_session
from benchmarks.gpu.rows import KERNELS, GpuRow, Task

ROOT = Path(__file__).parents[2]

ROW = GpuRow("lstm", 6, 2, 64, precision="fp16")


def bench(kernels=KERNELS) -> gpu_measure.Bench:
    return gpu_measure.Bench(torch.device("cpu"), kernels, dry_run=True)


def session(folder: Path, budget: float = 100, **options) -> gpu_session.Session:
    chosen = {"filter": [], "kernels": None, "steps": None, "skip": 0, "dry_run": False}
    chosen |= options
    made = gpu_session.Session(argparse.Namespace(out=folder, budget=budget, **chosen))
    made.results["card"] = {"name": "a card", "capability": "9.0"}
    return made


def scripted(monkeypatch, run: gpu_session.Session, answers: list[tuple[int | None, str]]) -> list:
    """Programs that answer with a status and lines for the log; their commands."""
    commands = []

    def call(command, log, limit_s):
        status, text = answers[len(commands)]
        commands.append(str(command))
        with log.open("a") as file:
            file.write(text)
        return status

    monkeypatch.setattr(run, "call", call)
    return commands


def record(row: GpuRow = ROW, mode: str = FORWARD, **speedups: float) -> dict:
    found = gpu_measure.identity(Task(row, mode))
    ratios = {n: {"q1": r, "median": r, "q3": r} for n, r in speedups.items()}
    times = dict.fromkeys([*speedups, found["peer"]], {"q1": 1.0, "median": 1.0, "q3": 1.0})
    rest = {"failed": {}, "absent": {}, "accuracy": {}, "error": None, "rounds": 5}
    return found | rest | {"ms": times, "speedup": ratios}
