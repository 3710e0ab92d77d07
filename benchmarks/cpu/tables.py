"""Results as text: the terminal's lines and the Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..common.rows import BACKWARD, FORWARD
from ..common.workload import CELLS, OURS
from .bound import LARGE, PEAK, LargeMatmulStep
from .results import Record, failures

TERMINAL_HEAD = (
    f"{'cell':<5} {'T,B,H':<24} {'mode':<16} {'ours ms':>9} {'peer':<14} {'peer ms':>9} "
    f"{'speedup':>8}  {'quartiles':<15} {'of bound':>8} {'by':<5} "
    f"{'of peak':>7} {'of large sgemm':>14}"
)


def format_ms(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def format_times(value: float) -> str:
    return f"{value:.2f}" if value < 9.95 else f"{value:.1f}" if value < 99.5 else f"{value:.0f}"


def _spread(ratio: Record) -> str:
    return f"{format_times(ratio['q1'])} to {format_times(ratio['q3'])}"


def _share(ratio: Record) -> str:
    return f"{100 * ratio['median']:.0f}%"


def terminal_lines(record: Record) -> list[str]:
    """A record as lines under :data:`TERMINAL_HEAD`, one a peer."""
    name = f"{record['cell']:<5} {record['row']:<24} {record['mode']:<16}"
    if record["error"] is not None:
        return [f"{name} FAILED, not timed: {record['error']}"]
    lines, bound = [], record["bound"]
    for peer, ratio in record["speedup"].items():
        lines.append(
            f"{name} {format_ms(record['ms'][OURS]['q1']):>9} {peer:<14} "
            f"{format_ms(record['ms'][peer]['q1']):>9} {format_times(ratio['median']) + 'x':>8}  "
            f"{_spread(ratio):<15} {_share(bound['share']):>8} {bound['by']:<5} "
            f"{_share(bound['peak_share']):>7} {_share(bound['large_share']):>14}"
        )
    return lines


def terminal_summary(summary: Sequence[Record]) -> list[str]:
    """The summary as sentences, one a cell, mode and peer."""
    return [
        f"{s['cell']} {s['mode']} against {s['peer']}: {format_times(s['geometric_mean'])}x in the "
        f"geometric mean of {s['rows']}, least {format_times(s['least'])}x at {s['least_row']}"
        for s in summary
    ]


def terminal_shares(shares: Sequence[Record]) -> list[str]:
    """The shares of the peak or the bound as sentences, one a cell, mode and group of rows."""
    return [
        f"{s['cell']} {s['mode']}, {s['group']}: {100 * s['geometric_mean']:.0f}% of {s['of']} in "
        f"the geometric mean of {s['rows']}, least {100 * s['least']:.0f}% at {s['least_row']}"
        for s in shares
    ]


def machine_line(results: Record) -> str:
    """The machine in one sentence."""
    m = results["machine"]
    return (
        f"{m['cpu']}, {m['threads']} threads on {m['cores']} cores, kernels {m['isa']}, "
        f"torch {m['torch']} ({m['torch_isa']}), {m['date'][:10]}"
    )


def _peer_cells(record: Record | None, peer: str, *, detailed: bool) -> list[str]:
    """Ours, the peer's, the speedup; for the detailed mode, its quartiles and our shares too."""
    width = 7 if detailed else 3
    if record is None:
        return [""] * width
    if record["error"] is not None:
        return ["FAILED"] + [""] * (width - 1)
    if peer not in record["speedup"]:  # it has no such mode
        return [""] * width
    ratio = record["speedup"][peer]
    times = [format_ms(record["ms"][name]["q1"]) for name in (OURS, peer)]
    cells = [*times, f"**{format_times(ratio['median'])}**"]
    if detailed:
        bound = record["bound"]
        cells += [_spread(ratio), f"{_share(bound['share'])} {bound['by']}"]
        cells += [_share(bound["peak_share"]), _share(bound["large_share"])]
    return cells


def markdown_table(results: Record) -> str:
    """One table a cell kind, one line a row and peer, both modes side by side."""
    by_key = {(r["cell"], r["row"], r["mode"]): r for r in results["records"]}
    tables = []
    for cell in dict.fromkeys(r["cell"] for r in results["records"]):
        lines = [
            f"| {CELLS[cell].label}: T,B,H | against | forward ms | theirs | speedup "
            f"| forward+backward ms | theirs | speedup | quartiles | of the bound "
            f"| of the peak | of {LARGE} |",
            "|---|---|" + "--:|" * 10,
        ]
        for row in dict.fromkeys(r["row"] for r in results["records"] if r["cell"] == cell):
            forward = by_key.get((cell, row, FORWARD))
            backward = by_key.get((cell, row, BACKWARD))
            peers = dict.fromkeys(
                peer for r in (forward, backward) if r for peer in r.get("speedup", ())
            )
            for peer in peers or [""]:
                fields = [row, peer and f"`{peer}`"]
                fields += _peer_cells(forward, peer, detailed=False)
                fields += _peer_cells(backward, peer, detailed=True)
                lines.append("| " + " | ".join(fields) + " |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _peak(results: Record) -> str:
    """What the peak is of, and how high it was."""
    bounds = [r["bound"] for r in results["records"] if r["error"] is None]
    if not bounds:
        return "the peak"
    rate = statistics.median(bound["peak_gflops"]["median"] for bound in bounds)
    if bounds[0]["peak_by"] == PEAK:
        return f"the peak of *fma*, multiply-adds in registers, measured as {rate:.0f} GFLOP/s,"
    return f"the rate of a *{LARGE}*, {rate:.0f} GFLOP/s, for there was no compiler for the peak,"


def markdown_block(results: Record) -> str:
    """The table and what is needed to read it and to take it again."""
    return (
        f"{markdown_table(results)}\n\n"
        f"Taken with `{results['settings']['command']}` on {machine_line(results)}. "
        "I = H, float32; milliseconds a call, lower quartile; speedup is the median of their time "
        "over ours, paired in the same round, and the quartiles are its own. *Of the bound* is our "
        f"share of the machine's limit in forward+backward: the longer of the times that the "
        f"row's multiplications take at {_peak(results)} and that reading W_hh once a step takes "
        "from the *cache* where it lies. *Of the peak* is our share of the first alone, and the "
        "last column our rate over that of `torch.mm` with matrices of "
        f"{LargeMatmulStep.SIZE} by {LargeMatmulStep.SIZE}: over 100% where its library is slower "
        "than the kernels here."
    )


def markdown_report(results: Record) -> str:
    """The whole report: table, summary, machine, failures."""
    parts = ["# fastbptt against its peers", markdown_block(results)]
    if failed := failures(results):
        parts.append("## FAILED: not timed, for they compute something else")
        parts.append(
            "\n".join(f"- {r['cell']} {r['row']}, {r['mode']}: {r['error']}" for r in failed)
        )
    if not results["complete"]:
        parts.append("The run was cut off or still goes on: rows are missing.")
    if results["summary"]:
        parts.append("## Summary")
        lines = terminal_summary(results["summary"]) + terminal_shares(results["shares"])
        parts.append("\n".join(f"- {line}" for line in lines))
    parts.append("## Machine and settings")
    known = {**results["machine"], **results["settings"]}
    parts.append("\n".join(f"- {key}: {value}" for key, value in known.items()))
    return "\n\n".join(parts) + "\n"
