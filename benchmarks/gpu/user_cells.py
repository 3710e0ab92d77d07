"""Cells from functions on a GPU: their kernels against the plain loop, and in a CUDA graph.

    python -m benchmarks.gpu.user_cells --seconds 40

Forward and backward in float32. A row is checked against float64 before it is timed: the error of
ours may be twice the loop's. "graph" is the same work captured once and replayed, so that it tells
what the launches cost; a built-in module of the same size stands beside the cells that have one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastbptt
from fastbptt import Recurrent, _cell_network, _loops, cells

from ..common import arguments
from ..common.files import Record
from ..common.rows import BACKWARD
from ..common.timing import Quartiles, Step, paired_ratios
from ..common.timing import sample as sample_by_wall_clock
from ..common.workload import OURS, Mismatch, ModuleStep
from .accuracy import errors_of, hold
from .cell_table import BUILT_IN, GRAPH, LOOP
from .measure import interleave, sample_by_events

MARK = "@ "  # what a line of results begins with: libraries print too
MIN_ROUNDS, BUDGET_S = 5, 1.0


class CellRow(NamedTuple):
    """A cell at a size, with what its function takes and the built-in module to set beside it."""

    name: str
    T: int
    B: int
    H: int
    extras: Mapping[str, Any] = {}
    built_in: Callable[..., torch.nn.Module] | None = None

    @property
    def label(self) -> str:
        return f"{self.name} {self.T},{self.B},{self.H}"


ROWS = [
    CellRow("leaky", 200, 32, 128, {"alpha": 0.2, "noise": 0.0}, fastbptt.RNN),
    CellRow("layer_norm_gru", 128, 32, 256),
    CellRow("zoneout_lstm", 128, 16, 128, {"zone_h": 0.1, "zone_c": 0.1}, fastbptt.LSTM),
    CellRow("gru", 200, 32, 128, {}, fastbptt.GRU),
]


@contextmanager
def plain_loop() -> Iterator[None]:
    """Networks of cells run by the loop over their steps within."""
    before = _cell_network.unroll_of
    _cell_network.unroll_of = lambda *_: _loops.unroll  # type: ignore[assignment]
    try:
        yield
    finally:
        _cell_network.unroll_of = before


class Inputs:
    """What a :class:`ModuleStep` is given."""

    mode = BACKWARD

    def __init__(self, row: CellRow, dtype: torch.dtype, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        self.input, self.grad_output = (
            torch.randn(row.T, row.B, row.H, generator=generator).to(device, dtype)
            for _ in range(2)
        )


def module_of(row: CellRow, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)
    cell = getattr(cells, row.name)
    return Recurrent(cell, row.H, row.H, **row.extras).to(device, dtype)


def steps_of(row: CellRow, dtype: torch.dtype, device: torch.device) -> dict[str, ModuleStep]:
    module, work = module_of(row, dtype, device), Inputs(row, dtype, device)

    def by_loop(x: Tensor) -> Any:
        with plain_loop():
            return module(x)

    return {OURS: ModuleStep(work, module), LOOP: ModuleStep(work, module, by_loop)}


class GraphStep:
    """A step captured once; a call replays it."""

    def __init__(self, step: ModuleStep):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what the first calls allocate is no part of it
            for _ in range(2):
                step.clear()
                step.run()
        torch.cuda.current_stream().wait_stream(stream)
        step.clear()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            step.run()

    def clear(self) -> None:
        pass

    def run(self) -> None:
        self.graph.replay()


def measure(row: CellRow, device: torch.device, dry_run: bool) -> Record:
    """A row's record: milliseconds, how many times the loop's time is ours, or the error."""
    record: Record = {"row": row.label, "error": None, "ms": {}, "speedup": {}}
    try:
        steps = steps_of(row, torch.float32, device)
        truth = steps_of(row, torch.float64, device)[LOOP].results()
        errors = {name: errors_of(step.results(), truth) for name, step in steps.items()}
        eps = torch.finfo(torch.float32).eps
        ulps = {name: eps * exact.abs().max().item() for name, exact in truth.items()}
        record["accuracy"] = hold(errors[OURS], errors[LOOP], ulps)
        timed: dict[str, Step] = dict(steps)
        if row.built_in is not None:
            module = row.built_in(row.H, row.H).to(device)
            timed[BUILT_IN] = ModuleStep(Inputs(row, torch.float32, device), module)
        if device.type == "cuda":
            timed[GRAPH] = GraphStep(steps_of(row, torch.float32, device)[OURS])
        sample = sample_by_events if device.type == "cuda" else sample_by_wall_clock
        rounds, budget_s = (2, 0.0) if dry_run else (MIN_ROUNDS, BUDGET_S)
        seconds = interleave(timed, sample, rounds, budget_s)
    except (Mismatch, RuntimeError) as error:
        return record | {"error": str(error).splitlines()[0]}
    record["ms"] = {name: Quartiles.of(s).rounded(1e3) for name, s in seconds.items()}
    record["speedup"] = {
        name: paired_ratios(seconds[LOOP], s).rounded()
        for name, s in seconds.items()
        if name != LOOP
    }
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Measures row after row; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.user_cells")
    add = parser.add_argument
    add("--seconds", type=arguments.seconds, default=60.0, help="begin no row after")
    add("--dry-run", action="store_true", help="tiny sizes, with the CPU in the card's place")
    args = parser.parse_args(argv)
    started, device = time.monotonic(), torch.device("cpu" if args.dry_run else "cuda")
    failed = False
    for row in ROWS:
        if time.monotonic() - started > args.seconds:
            break
        if args.dry_run:
            row = row._replace(T=4, B=2, H=8)
        record = measure(row, device, args.dry_run)
        failed = failed or record["error"] is not None
        print(MARK + json.dumps(record), flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
