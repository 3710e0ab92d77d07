"""The results of benchmarks.gpu.user_cells as Markdown; needs neither torch nor the package."""

from __future__ import annotations

from collections.abc import Sequence

from ..common.files import Record

KERNELS, GRAPH, BUILT_IN, LOOP = "fastbptt", "graph", "built in", "plain loop"
COLUMNS = (KERNELS, GRAPH, BUILT_IN, LOOP)


def _text(record: Record, name: str) -> str:
    """A contender's milliseconds, and how many times as long the loop takes."""
    if name not in record["ms"]:
        return ""
    text = f"{record['ms'][name]['median']:.3g} ms"
    ratio = record["speedup"].get(name)
    return text if ratio is None else f"{text}, {ratio['median']:.3g}x"


def cell_table(records: Sequence[Record]) -> str:
    """A line for each cell; none for none."""
    if not records:
        return ""
    lines = ["| cell, T,B,H | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for record in records:
        texts = [record["error"]] if record["error"] else []
        texts += [_text(record, name) for name in COLUMNS[len(texts) :]]
        lines.append(f"| {record['row']} | {' | '.join(texts)} |")
    return "\n".join(lines)
