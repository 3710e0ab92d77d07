"""The tables of README.md and of the pages of docs/, each made of results: see BLOCKS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .common.files import Record
from .common.rows import BACKWARD, FORWARD
from .cpu.results import failures, load
from .cpu.tables import format_ms, format_times, machine_line
from .science.tables import TABLES as SCIENCE

# The folder whose results the pages show: the last run on a machine that nothing else used.
SHOWN = "avx2"
# The rows of the short table: cell, row, peer.
SHORT = (
    ("rnn", "35,32,256", "torch.nn.RNN"),
    ("gru", "35,32,256", "torch.nn.GRU"),
    ("rnn", "128,1,64", "torch.nn.RNN"),
    ("lstm", "1024,1,128", "torch.nn.LSTM"),
    ("gru", "1024,1,128 Chunked(k=32)", "detach() loop"),
    ("lstm", "128,8,128 resets", "step loop"),
)
# The rows of what truncations and resets cost: row, loop, what the loop calls.
COSTS = (
    ("1024,1,128 Chunked(k=32)", "detach() loop", "a call a chunk, `detach()`"),
    ("1024,16,128 Chunked(k=32)", "detach() loop", "a call a chunk, `detach()`"),
    ("1024,4,128 TBPTT(k1=8, k2=32)", "window loop", "a call a window"),
    ("512,4,128 Sliding(tau=16)", "window loop", "a call a window"),
    ("128,8,128 resets", "step loop", "a call a step"),
    ("128,16,256 resets", "step loop", "a call a step"),
)
NAMES = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM"}


def _load(path: Path) -> Record:
    """The results of a run that came to its end.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else, or what was measured was wrong.
    """
    results = load(path)
    if not results.get("complete", True) or failures(results):
        raise ValueError("the results are of a run that was cut off or has FAILED rows")
    if not results["records"]:
        raise ValueError("no row in the results")
    return results


def _find(results: Record, **wanted: str) -> Record:
    for record in results["records"]:
        if wanted.items() <= record.items() and record["error"] is None:
            return record
    raise ValueError(f"no row {', '.join(wanted.values())} in the results")


def _table(head: str, align: str, rows: list[list[str]]) -> str:
    lines = [head, align, *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join(lines)


def _taken(results: Record) -> str:
    return f"`{results['settings']['command']}` on {machine_line(results)}"


def short(results: Path) -> str:
    """Six rows: both passes, ours beside what the user has today."""
    found = _load(results / SHOWN / "compare.json")
    rows = []
    for cell, row, peer in SHORT:
        record = _find(found, cell=cell, row=row, mode=BACKWARD)
        ours, theirs = (format_ms(record["ms"][name]["q1"]) for name in ("fastbptt", peer))
        size, _, what = row.partition(" ")
        rows.append(
            [
                f"{NAMES[cell]}{', ' if what else ''}{what.replace('k=', '')}",
                size.replace(",", ", "),
                f"`{peer}`",
                theirs,
                ours,
                f"**{format_times(record['speedup'][peer]['median'])}**",
            ]
        )
    head = "| forward and backward | T, B, H | against | its ms | fastbptt ms | times as fast |"
    note = f"Taken with {_taken(found)}. I = H, float32; lower quartiles, median of paired ratios."
    return _table(head, "|---|---|---|--:|--:|--:|", rows) + f"\n\n{note}"


def book(results: Path) -> str:
    """Tokens a second of the book's model, beside those that its authors' notebooks print."""
    found = _load(results / SHOWN / "book.json")
    rows = []
    for record in found["records"]:
        torchs = f"torch.nn.{NAMES[record['cell']]}"
        speeds = [f"{record['tokens_per_s'][n]['median']:,.0f}" for n in (torchs, "fastbptt")]
        ratio = f"**{format_times(record['speedup']['median'])}**"
        rows.append([NAMES[record["cell"]], *speeds, ratio, f"{record['printed']:,}"])
    head = "| tokens a second | `torch.nn` | fastbptt | times as fast | the book's, on a GPU |"
    note = (
        f"Taken with {_taken(found)}. The last column is what "
        f"[its authors' notebooks]({found['settings']['source']}) print (MXNet, 2019)."
    )
    return _table(head, "|---|--:|--:|--:|--:|", rows) + f"\n\n{note}"


def costs(results: Path) -> str:
    """Truncations and resets against the loops that compute the same."""
    found = _load(results / SHOWN / "compare.json")
    rows = []
    for row, loop, what in COSTS:
        size, _, truncation = row.partition(" ")
        name = truncation.replace("k=", "").replace("k1=", "").replace("k2=", "")
        name = name.replace("tau=", "")
        fields = [f"{size} {name if name == 'resets' else f'`{name}`'}", what]
        for cell in NAMES:
            record = _find(found, cell=cell, row=row, mode=BACKWARD)
            fields += [format_ms(record["ms"][each]["q1"]) for each in ("fastbptt", loop)]
            fields.append(f"**{format_times(record['speedup'][loop]['median'])}**")
        rows.append(fields)
    cells = " | ".join(f"{name}: ms | loop | ratio" for name in NAMES.values())
    head = f"| T,B,H | loop by hand | {cells} |"
    return _table(head, "|---|---|" + "--:|" * 9, rows) + f"\n\nTaken with {_taken(found)}."


def resets(results: Path) -> str:
    """Resets inside a rollout against a loop over its steps and TorchRL's modules."""
    found = _load(results / SHOWN / "compare.json")
    rows = []
    for row in ("128,8,128 resets", "128,16,256 resets"):
        for cell, name in NAMES.items():
            records = [_find(found, cell=cell, row=row, mode=mode) for mode in (FORWARD, BACKWARD)]
            for peer in records[0]["speedup"]:
                fields = [row.partition(" ")[0], name, peer]
                for record in records:
                    fields += [format_ms(record["ms"][each]["q1"]) for each in (peer, "fastbptt")]
                    fields.append(f"**{format_times(record['speedup'][peer]['median'])}**")
                rows.append(fields)
    head = (
        "| T,B,H | cell | against | forward: its ms | fastbptt ms | ratio "
        "| with backward: its ms | fastbptt ms | ratio |"
    )
    return _table(head, "|---|---|---|" + "--:|" * 6, rows) + f"\n\nTaken with {_taken(found)}."


def twice(results: Path) -> str:
    """Double backward against torch.nn's."""
    found = _load(results / SHOWN / "derivatives.json")
    rows: dict[str, dict[str, str]] = {}
    for record in found["records"]:
        if record["kind"] == "twice":
            (ratio,) = record["speedup"].values()
            rows.setdefault(record["size"], {})[record["cell"]] = format_times(ratio["median"])
    lines = [
        [size.replace(",", ", "), *(f"{by_cell[cell]}x" for cell in NAMES)]
        for size, by_cell in rows.items()
    ]
    head = f"| T, B, H | {' | '.join(NAMES.values())} |"
    return _table(head, "|---|--:|--:|--:|", lines) + f"\n\nTaken with {_taken(found)}."


def h100(results: Path) -> str:
    """Ours beside cuDNN by size, of the rows that were measured."""
    found = load(results / "gpu" / "gpu.json")
    card, lines = found["card"], []
    sizes = (64, 128, 256, 512, 1024)
    cases = [
        (cell, precision, mode)
        for precision in ("fp16", "bf16", "fp32")
        for cell in NAMES
        for mode in (BACKWARD, FORWARD)
    ]
    for cell, precision, mode in cases:
        peer, fields = f"torch.nn.{NAMES[cell]}", []
        for size in sizes:
            wanted = dict(cell=cell, precision=precision, mode=mode, peer=peer)
            record = _find(found, row=f"1024,16,{size}", **wanted)
            times = [format_ms(record["ms"][name]["median"]) for name in ("fastbptt", peer)]
            fields.append(" / ".join(times))
        lines.append([f"{NAMES[cell]}, {precision}, {mode}", *fields])
    head = f"| | {' | '.join(f'H = {size}' for size in sizes)} |"
    note = (
        f"Taken with `{found['settings']['command']}` on {card['name']}, torch {card['torch']}, "
        f"cuDNN {card['cudnn']}, {found['machine']['date'][:10]}. T = 1024, B = 16, I = H, one "
        "layer; milliseconds of fastbptt / `torch.nn`, medians."
        + ("" if found["complete"] else " The run was ended before all of its rows were measured.")
    )
    return _table(head, "|---|" + "--:|" * len(sizes), lines) + f"\n\n{note}"


def _science(table: Callable[[Path], str]) -> Callable[[Path], str]:
    return lambda results: table(results / "science")


BLOCKS: dict[str, Callable[[Path], str]] = {
    "short": short,
    "book": book,
    "costs": costs,
    "resets": resets,
    "twice": twice,
    "h100": h100,
    **{
        f"science-{table.__name__}": _science(table)
        for tables in SCIENCE.values()
        for table in tables
    },
}
