"""The tables of the experiments, made of their records."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from ..common.files import Record
from ..cpu.tables import machine_line
from .records import by_mode, chunk_name


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    rule = ["---", *["--:"] * (len(head) - 1)]
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rest)]
    return "\n".join([lines[0], "|" + "|".join(rule) + "|", *lines[1:]])


def _found(results: Path, name: str) -> Record:
    """The records of an experiment that came to its end.

    Raises:
        OSError: the file cannot be read.
        ValueError: the run was cut off.
    """
    found = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
    if not found.get("complete") or not found.get("records"):
        raise ValueError(f"the results of {name} are of a run that was cut off")
    return found


def _taken(found: Record) -> str:
    return f"Taken with `{found['settings']['command']}` on {machine_line(found)}."


def _outcome(records: Sequence[Record]) -> str:
    """Of runs that differ in what is random."""
    if len(records) == 1:
        return "diverges" if records[0]["diverged"] else records[0]["outcome"]
    diverged = sum(record["diverged"] for record in records)
    if diverged:
        return f"{diverged} of {len(records)} diverge"
    return f"at most {max(records, key=lambda r: r['final'])['outcome']}"


def influence_windows(results: Path) -> str:
    """Influence and outcome by the length of a window."""
    found = _found(results, "influence")
    records = found["records"]
    (influences,) = (r["influences"] for r in records if r["kind"] == "influence")
    windows = [r for r in records if r["kind"] == "windows"]
    head = ("K", "influence of the last K steps", f"loss after {windows[0]['updates']} updates")
    rows = [(f"{r['K']}", f"{influences[r['K'] - 1]:+.1f}", _outcome([r])) for r in windows]
    return _table([head, *rows])


def influence_segments(results: Path) -> str:
    """Outcome by truncation within a segment and learning rate."""
    found = _found(results, "influence")
    of = [r for r in found["records"] if r["kind"] == "segments"]
    rates = list(dict.fromkeys(r["rate"] for r in of))
    rows = [("truncation", *(f"learning rate {rate:g}" for rate in rates))]
    for name in dict.fromkeys(r["truncation"] for r in of):
        runs = [[r for r in of if (r["truncation"], r["rate"]) == (name, rate)] for rate in rates]
        many = f", {len(runs[0])} seeds" if len(runs[0]) > 1 else ""
        rows.append((f"`{name}`{many}", *map(_outcome, runs)))
    return f"{_table(rows)}\n\n{_taken(found)}"


def adaptive(results: Path) -> str:
    """Fixed truncations and chosen ones."""
    from .experiments import adaptive_rows

    found = _found(results, "adaptive")
    return f"{_table(adaptive_rows(found['records']))}\n\n{_taken(found)}"


T_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}  # Student's t by the number of values


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95% confidence interval."""
    deviation = statistics.stdev(values)
    return statistics.fmean(values), T_95[len(values)] * deviation / len(values) ** 0.5


def characters(results: Path) -> str:
    """Held-out bits a character by mode, and the difference to the regular truncation."""
    found = _found(results, "characters")
    bits: dict[str, dict[int, float]] = {}
    for record in found["records"]:
        bits.setdefault(record["mode"], {})[record["seed"]] = record["bits"]
    regular = next(mode for mode in bits if mode.startswith("Chunked"))
    rows = [("truncation", "bits a character", f"difference to `{regular}`")]
    for mode, by_seed in bits.items():
        differences = [by_seed[seed] - bits[regular][seed] for seed in by_seed]
        mean, error = _mean_and_error(list(by_seed.values()))
        apart, of_that = _mean_and_error(differences)
        difference = "" if mode == regular else f"{apart:+.3f} ± {of_that:.3f}"
        name, comma, rest = mode.partition(", per")
        shown = f"`{name}`{comma}{rest}"
        rows.append((shown, f"{mean:.3f} ± {error:.3f}", difference))
    seeds = len(bits[regular])
    note = f"Means over {seeds} seeds with 95% intervals; differences are paired by seed."
    return f"{_table(rows)}\n\n{note} {_taken(found)}"


def oracle(results: Path) -> str:
    """The relative distance to the gradient by tangents, along training."""
    found = _found(results, "oracle")
    runs = by_mode(found["records"])
    checks = next(iter(runs.values()))[0]["checks"]
    places = sorted({0, len(checks) // 2, len(checks) - 1})
    head = [f"bias, update {checks[place]['update']}" for place in places]
    rows = [("truncation", *head, "mean draws beyond 4 errors")]
    for mode, records in runs.items():
        cells = []
        for place in places:
            mean = statistics.fmean(r["checks"][place]["bias"] for r in records)
            cells.append(f"{mean:.1e}" if mean < 1e-6 else f"{mean:.3f}")
        of = [check for r in records for check in r["checks"] if "error" in check]
        far = sum(check["bias"] > 4 * check["error"] for check in of)
        rows.append((f"`{mode}`", *cells, f"{far} of {len(of)}" if of else ""))
    losses = [statistics.fmean(r["checks"][p]["loss"] for r in records) for p in places]
    said = ", ".join(f"{loss:.3f}" for loss in losses)
    return f"{_table(rows)}\n\nThe loss there: {said}. {_taken(found)}"


def ppo_returns(results: Path) -> str:
    """The mean return of the last 100 episodes by task, cell and chunk."""
    records = [r for r in _found(results, "ppo")["records"] if r["kind"] == "returns"]
    chunks = list(dict.fromkeys(r["chunk"] for r in records))
    rows = [("task", "cell", *map(chunk_name, chunks))]
    for task, cell in dict.fromkeys((r["task"], r["cell"]) for r in records):
        cells = []
        for chunk in chunks:
            key = (task, cell, chunk)
            ends = [r["returns"][-1] for r in records if (r["task"], r["cell"], r["chunk"]) == key]
            cells.append(", ".join(f"{end:.2f}" for end in ends))
        rows.append((task, cell.upper(), *cells))
    return _table(rows)


def ppo_times(results: Path) -> str:
    """An update with torch's step loop and with one call."""
    found = _found(results, "ppo")
    head = ("cell", "backpropagation", "step loop: core, ms", "one call: core, ms", "ratio")
    rows = [(*head, "whole update: ratio")]
    for r in (r for r in found["records"] if r["kind"] == "times"):
        core, whole = (r[f"torch {what}"] / r[f"fastbptt {what}"] for what in ("core", "whole"))
        cells = (f"{r['torch core'] * 1e3:.0f}", f"{r['fastbptt core'] * 1e3:.1f}")
        rows.append(
            (r["cell"].upper(), chunk_name(r["chunk"]), *cells, f"{core:.1f}x", f"{whole:.1f}x")
        )
    return f"{_table(rows)}\n\n{_taken(found)}"


TABLES = {
    "influence": (influence_windows, influence_segments),
    "adaptive": (adaptive,),
    "characters": (characters,),
    "oracle": (oracle,),
    "ppo": (ppo_returns, ppo_times),
}
