"""The memory of every row of the grid beside its peer: measurements, table, summary."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..common import machine
from ..common.contenders import TORCH_PEERS
from ..common.files import Record, save, write_text
from ..common.rows import Row
from ..common.workload import CELLS, OURS

Bytes = Mapping[str, int | None]  # as memory.measure returns them
KINDS = ("allocated_peak", "allocated", "resident_peak", "resident")
_PAGES = 2**20  # below this, which pages a process happens to have decides


def measure_row(row: Row, measure: Callable[[Row, str], Bytes]) -> Record:
    """Ours and the row's peer in torch; returns their bytes and the ratios, ours over theirs."""
    peer = next(p for p in TORCH_PEERS if p.applies(row)).label(row)
    found = {label: dict(measure(row, label)) for label in (OURS, peer)}
    ratios: dict[str, float | None] = {}
    for kind in KINDS:
        ours, theirs = found[OURS][kind], found[peer][kind]
        least = _PAGES if kind.startswith("resident") else 1
        known = ours is not None and theirs is not None and theirs >= least
        ratios[kind] = float(f"{ours / theirs:.4g}") if known else None
    return {"cell": row.cell, "row": row.label, "peer": peer, "bytes": found, "ratio": ratios}


def _size(value: int | None) -> str:
    if value is None:
        return "unknown"
    for unit, scale in (("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value} B"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def terminal_line(record: Record) -> str:
    """A record under :data:`TERMINAL_HEAD`."""
    ours, theirs = record["bytes"][OURS], record["bytes"][record["peer"]]
    fields = [f"{record['cell']:<5} {record['row']:<26} {record['peer']:<14}"]
    for kind in ("allocated_peak", "allocated"):
        fields.append(
            f"{_size(ours[kind]):>9} {_size(theirs[kind]):>9} {_ratio(record['ratio'][kind]):>5}"
        )
    return "  ".join([*fields, f"{_ratio(record['ratio']['resident']):>8}"])


TERMINAL_HEAD = (
    f"{'cell':<5} {'T,B,H':<26} {'against':<14}  {'peak':>9} {'theirs':>9} {'ratio':>5}  "
    f"{'extra':>9} {'theirs':>9} {'ratio':>5}  resident"
)


def markdown_table(records: Sequence[Record]) -> str:
    """A line a row."""
    lines = [
        "| cell | T,B,H | against | peak | theirs | ratio | extra | theirs | ratio "
        "| resident ratio |",
        "|---|---|---|" + "--:|" * 7,
    ]
    for record in records:
        ours, theirs = record["bytes"][OURS], record["bytes"][record["peer"]]
        fields = [CELLS[record["cell"]].label, record["row"], f"`{record['peer']}`"]
        for kind in ("allocated_peak", "allocated"):
            ratio = _ratio(record["ratio"][kind])
            fields += [_size(ours[kind]), _size(theirs[kind]), f"**{ratio}**"]
        fields.append(_ratio(record["ratio"]["resident"]))
        lines.append("| " + " | ".join(fields) + " |")
    return "\n".join(lines)


def summary(records: Sequence[Record]) -> list[str]:
    """For each cell the mean and the greatest ratios, as sentences."""
    lines = []
    for cell in dict.fromkeys(record["cell"] for record in records):
        for kind, name in (("allocated_peak", "peak"), ("allocated", "extra")):
            ratios = {
                record["row"]: record["ratio"][kind]
                for record in records
                if record["cell"] == cell and record["ratio"][kind] is not None
            }
            if not ratios:
                continue
            most = max(ratios, key=ratios.__getitem__)
            mean = _mean(list(ratios.values()))
            lines.append(
                f"{cell} {name}: {mean:.2f} of theirs in the geometric mean of {len(ratios)}, at "
                f"most {ratios[most]:.2f} at {most}"
            )
    return lines


def _mean(ratios: Sequence[float]) -> float:
    """Geometric; of a program that takes nothing, nothing."""
    return statistics.geometric_mean(ratios) if math.prod(ratios) > 0 else 0.0


def report(results: Record) -> str:
    """Everything as Markdown."""
    m, records = results["machine"], results["records"]
    parts = [
        "# Memory of one forward+backward beside torch",
        markdown_table(records),
        f"Taken with `{results['settings']['command']}`, {m['threads']} threads, kernels "
        f"{m['isa']}, torch {m['torch']}, {m['date'][:10]}. *Peak* is what is allocated at most at "
        "one time, beyond inputs and weights; *extra* is beyond outputs and gradients too. "
        "Both are replayed from the allocations that torch's profiler reports, each in a "
        "process of its own, after a first call; memory that a library takes without torch is "
        "not among them. The last column is the ratio of the extra memory that the operating "
        "system gave each process at most, in whole pages, in its first call at this size; "
        "not where theirs is below 1 MiB. Ratios are ours over theirs.",
        "\n".join(f"- {line}" for line in summary(records)),
    ]
    if not results["complete"]:
        parts.append("The run was cut off or still goes on: rows are missing.")
    return "\n\n".join(parts) + "\n"


def run(
    rows: Sequence[Row], measure: Callable[[Row, str], Bytes], settings: Record, folder: Path
) -> None:
    """Measures the rows, prints them, and writes the folder as it goes."""
    results: Record = {
        "machine": machine.facts(),
        "settings": settings,
        "complete": False,
        "records": [],
    }
    print(TERMINAL_HEAD, flush=True)
    for row in rows:
        results["records"].append(record := measure_row(row, measure))
        print(terminal_line(record), flush=True)
        results["complete"] = len(results["records"]) == len(rows)
        save(results, folder / "memory.json")
        write_text(folder / "memory.md", report(results))
    print(*summary(results["records"]), f"written to {folder}", sep="\n")
