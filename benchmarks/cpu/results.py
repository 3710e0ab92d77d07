"""One row's measurement, the summary over rows, and the file that holds them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

import fastbptt

from ..common.contenders import build
from ..common.files import Record, save, write_text
from ..common.rows import BACKWARD, MODES, Row
from ..common.timing import Quartiles, Step, interleave, paired_ratios
from ..common.workload import OURS, Mismatch, Workload
from .bound import LARGE, PEAK, SGEMM, Bound
from .peers import of_kinds

__all__ = ["Record", "failures", "load", "measure", "save", "summarise", "write_text"]

_rounded = Quartiles.rounded


def measure(
    row: Row, mode: str, *, peers: Sequence[str], min_rounds: int, budget_s: float
) -> Record:
    """Checks and then times a row in one mode.

    Returns its record. ``isa`` and ``threads``: those of our kernels. ``ms``: quartiles of every
    contender's milliseconds a call. ``speedup``: of each peer's time over ours, paired in the same
    round. ``reach``: of each peer's time over sgemm's, the speedup that ours would have at its
    speed. ``over_sgemm``: of our time over sgemm's. ``bound``: see
    :meth:`benchmarks.cpu.bound.Bound.record`. A row that computes the wrong thing has ``error``
    and no times.
    """
    record: Record = row.described(mode)
    with torch.set_grad_enabled(mode == BACKWARD):
        work = Workload(row, mode)
        try:
            steps: dict[str, Step] = dict(build(work, of_kinds(peers)))
        except Mismatch as mismatch:
            return record | {"error": str(mismatch)}
        bound = Bound(row, mode, work.cell.gates, work.resets)
        steps |= bound.steps
        seconds = interleave(steps, min_rounds=min_rounds, budget_s=budget_s)
    ours, sgemm = seconds[OURS], seconds[SGEMM]
    theirs = {name: t for name, t in seconds.items() if name != OURS and name not in bound.steps}
    timed = {OURS: ours, **theirs, SGEMM: sgemm}
    return record | {
        "error": None,
        "rounds": len(ours),
        "isa": fastbptt._C.cpu_isa(),
        "threads": torch.get_num_threads(),
        "ms": {name: _rounded(Quartiles.of(times), 1e3) for name, times in timed.items()},
        "speedup": {name: _rounded(paired_ratios(times, ours)) for name, times in theirs.items()},
        "reach": {name: _rounded(paired_ratios(times, sgemm)) for name, times in theirs.items()},
        "over_sgemm": _rounded(paired_ratios(ours, sgemm)),
        "bound": bound.record(ours, seconds),
    }


def _mean_and_least(medians: Mapping[str, float]) -> Record:
    """Of medians by their rows' names."""
    least = min(medians, key=medians.__getitem__)
    return {
        "rows": len(medians),
        "geometric_mean": float(f"{statistics.geometric_mean(medians.values()):.5g}"),
        "least": medians[least],
        "least_row": least,
    }


def _in_order(key: tuple[str, str, str]) -> tuple[str, str, int]:
    cell, mode, name = key
    return cell, name, MODES.index(mode)


def summarise(records: Iterable[Record]) -> list[Record]:
    """For each cell, mode and peer: the geometric mean of the median speedups, and the least."""
    groups: dict[tuple[str, str, str], dict[str, float]] = {}
    for record in records:
        for peer, ratio in record.get("speedup", {}).items():
            group = groups.setdefault((record["cell"], record["mode"], peer), {})
            group[record["row"]] = ratio["median"]
    return [
        {"cell": key[0], "mode": key[1], "peer": key[2], **_mean_and_least(groups[key])}
        for key in sorted(groups, key=_in_order)
    ]


# Rows by their size, and which share counts in them: many sequences are arithmetic.
SHARE_GROUPS: dict[str, tuple[Callable[[Mapping[str, int]], bool], str]] = {
    "B >= 16, H >= 256": (lambda size: size["B"] >= 16 and size["H"] >= 256, "peak_share"),
    "B = 1": (lambda size: size["B"] == 1, "share"),
}
_SHARES_OF = {PEAK: "the FMA peak", LARGE: LARGE}


def summarise_shares(records: Iterable[Record]) -> list[Record]:
    """For each cell, mode and group of rows: the mean share of ``of``, and the least.

    Rows with truncation or resets are left out.
    """
    groups: dict[tuple[str, str, str], dict[str, float]] = {}
    of: dict[str, str] = {}
    for record in records:
        if record["error"] is None and record["truncation"] is None and not record["resets"]:
            bound = record["bound"]
            for name, (belongs, share) in SHARE_GROUPS.items():
                if belongs(record["size"]):
                    of[name] = "the bound" if share == "share" else _SHARES_OF[bound["peak_by"]]
                    group = groups.setdefault((record["cell"], record["mode"], name), {})
                    group[record["row"]] = bound[share]["median"]
    return [
        {"cell": key[0], "mode": key[1], "group": key[2], "of": of[key[2]]}
        | _mean_and_least(groups[key])
        for key in sorted(groups, key=_in_order)
    ]


def failures(results: Record) -> list[Record]:
    """The records of rows that computed the wrong thing."""
    return [record for record in results["records"] if record["error"] is not None]


def load(path: Path) -> Record:
    """Reads what :func:`save` wrote.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is not the results of a comparison.
    """
    results = json.loads(path.read_text(encoding="utf-8"))
    missing = {"machine", "settings", "records"} - set(results if isinstance(results, dict) else ())
    if missing:
        raise ValueError(f"{path} is no results of benchmarks.compare: no {sorted(missing)}")
    return results
