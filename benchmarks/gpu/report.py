"""The results of the GPU benchmark as Markdown, with the time that no program could beat beside it.

Needs neither torch nor the package: it is written before there is either.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..common.files import Record
from .cell_table import cell_table

OURS = "fastbptt"
FORWARD, BACKWARD, BACKWARD_ALONE = "forward", "forward+backward", "backward"
BLOCK_BYTES = 448 * 1024  # of weights that one multiprocessor can hold: registers, shared memory


@dataclass(frozen=True)
class Goal:
    """A speedup over the peer that the best kernel should have wherever it applies."""

    text: str
    least: float
    applies: Callable[[Record], bool]


def _plain(record: Record) -> bool:
    """Whether torch's module does it in one call, with cuDNN."""
    return record["peer"] == f"torch.nn.{record['cell'].upper()}"


GOALS = (
    Goal("at every size, over torch.nn", 1.0, _plain),
    Goal(
        "fp16 LSTM and tanh RNN at B = 16, H in {128, 256, 512}, over torch.nn",
        1.3,
        lambda r: (
            _plain(r)
            and (r["precision"], r["size"]["B"]) == ("fp16", 16)
            and r["cell"] != "gru"
            and r["size"]["H"] in (128, 256, 512)
        ),
    ),
    Goal(
        "bf16 and fp32 LSTM, and GRU, at H <= 512, over torch.nn",
        3.0,
        lambda r: (
            _plain(r)
            and r["size"]["H"] <= 512
            and (r["cell"] == "gru" or (r["cell"] == "lstm" and r["precision"] in ("bf16", "fp32")))
        ),
    ),
    Goal(
        "the backward pass of Chunked at B = 1, over the detach() loop",
        5.0,
        lambda r: (
            r["truncation"] is not None and r["mode"] == BACKWARD_ALONE and r["size"]["B"] == 1
        ),
    ),
)


def best(record: Record) -> tuple[str, float] | None:
    """The fastest of ours and its speedup over the peer."""
    medians = {name: ratio["median"] for name, ratio in record.get("speedup", {}).items()}
    name = max(medians, key=medians.__getitem__, default=None)
    return None if name is None else (name, medians[name])


def step_ns(probe: Record, recurrent_bytes: int) -> float | None:
    """The exchange that a step cannot do without, by how much of the chip has to hold W_hh."""
    blocks = max(1, math.ceil(recurrent_bytes / BLOCK_BYTES))
    if blocks == 1:
        names = [name for name in probe if name.startswith("block_exchange_ns")]
    else:
        size = 2 ** math.ceil(math.log2(blocks))
        names = [f"cluster_exchange_ns_{size}", f"cluster_push_512_bytes_ns_{size}"]
        if not any(probe.get(name) for name in names):
            names = [name for name in probe if name.startswith("grid_")]
    return min((probe[name] for name in names if probe.get(name)), default=None)


def bound(record: Record, results: Record) -> tuple[float, str] | None:
    """Milliseconds that no program could beat, and why; from what the card was seen to reach."""
    counts, found = record["counts"], {}
    if ceilings := results["ceilings"]:
        found["memory"] = 1e3 * counts["bytes"] / ceilings["bytes"]
        found["arithmetic"] = 1e3 * counts["flops"] / ceilings[record["precision"]]
    if ns := step_ns(results["probe"] or {}, record["recurrent_bytes"]):
        found["steps"] = 1e-6 * counts["steps"] * ns
    reason = max(found, key=found.__getitem__, default=None)
    return None if reason is None else (found[reason], reason)


def failures(results: Record) -> list[Record]:
    """The records of rows in which something computed the wrong thing, or nothing."""
    return [record for record in results["records"] if record["error"] is not None]


def summarise(records: Iterable[Record]) -> list[Record]:
    """For each peer, cell, precision and mode: geometric means of the speedups, and the least."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        if best(record):
            key = (record["peer"], record["cell"], record["precision"], record["mode"])
            groups.setdefault(key, []).append(record)
    summary = []
    for key, members in groups.items():
        tops = [best(record)[1] for record in members]
        autos = [r["speedup"][OURS]["median"] for r in members if OURS in r["speedup"]]
        least = min(range(len(tops)), key=tops.__getitem__)
        summary.append(
            dict(zip(("peer", "cell", "precision", "mode"), key, strict=True))
            | {
                "rows": len(members),
                "launcher": float(f"{statistics.geometric_mean(autos):.5g}") if autos else None,
                "best": float(f"{statistics.geometric_mean(tops):.5g}"),
                "least": tops[least],
                "least_row": members[least]["row"],
            }
        )
    return summary


def judge(records: Iterable[Record]) -> list[Record]:
    """For each goal: how many of the rows measured reach it, and the least."""
    found = []
    for goal in GOALS:
        ratios = {
            f"{r['cell']} {r['precision']} {r['row']} {r['mode']}": best(r)[1]
            for r in records
            if goal.applies(r) and best(r)
        }
        least = min(ratios, key=ratios.__getitem__, default=None)
        found.append(
            {
                "goal": goal.text,
                "least_wanted": goal.least,
                "rows": len(ratios),
                "reached": sum(ratio >= goal.least for ratio in ratios.values()),
                "least": None if least is None else ratios[least],
                "least_row": least,
            }
        )
    return found


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return ""
    return (f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}") + unit


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *([str(cell) for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _measured(record: Record | None, results: Record) -> list[str]:
    """Ours, the peer's, the speedup with its quartiles, and the bound."""
    if record is None:
        return [""] * 5
    if OURS not in record.get("speedup", {}):
        text = "FAILED" if record["error"] is not None else record.get("skipped", "not timed")
        return [text, "", "", "", ""]
    ratio, limit = record["speedup"][OURS], bound(record, results)
    return [
        number(record["ms"][OURS]["median"]),
        number(record["ms"][record["peer"]]["median"]),
        f"**{number(ratio['median'])}**",
        f"{number(ratio['q1'])} to {number(ratio['q3'])}",
        "" if limit is None else f"{number(limit[0])} ({limit[1]})",
    ]


def _size(record: Record) -> str:
    return f"{record['size']['B']},{record['size']['H']}"


def _torch_tables(results: Record) -> list[str]:
    """One table a cell and precision, a line a size, both modes side by side."""
    groups: dict[tuple[str, str], dict[str, dict[str, Record]]] = {}
    for record in filter(_plain, results["records"]):
        group = groups.setdefault((record["cell"], record["precision"]), {})
        group.setdefault(_size(record), {})[record["mode"]] = record
    parts = []
    for (cell, precision), sizes in sorted(groups.items()):
        head = [f"{cell} {precision}: B,H"]
        for mode in (FORWARD, BACKWARD):
            head += [f"{mode} ms", "torch.nn", "speedup", "quartiles", "bound"]
        ordered = sorted(sizes, key=lambda size: [int(n) for n in size.split(",")])
        rows = [
            [
                size,
                *(c for m in (FORWARD, BACKWARD) for c in _measured(sizes[size].get(m), results)),
            ]
            for size in ordered
        ]
        parts.append(table(head, rows))
    return parts


def _loops_table(results: Record) -> str:
    head = ["cell", "precision", "T,B,H", "mode", "against", "ms", "theirs", "speedup", "quartiles"]
    rows = [
        [r["cell"], r["precision"], r["row"], r["mode"], r["peer"], *_measured(r, results)]
        for r in results["records"]
        if not _plain(r)
    ]
    return table([*head, "bound"], rows) if rows else ""


def _kernels_table(results: Record) -> str:
    """Milliseconds kernel by kernel, where more than one was timed."""
    kernels = results["kernels"]
    rows = []
    for record in results["records"]:
        times = record.get("ms", {})
        if not any(kernel in times for kernel in kernels):
            continue
        cells = [f"{record['cell']} {record['precision']} {record['row']}", record["mode"]]
        for kernel in (OURS, *kernels):
            why = "none" if kernel in record["absent"] else "not timed"
            why = "FAILED" if kernel in record["failed"] else why
            cells.append(number(times[kernel]["median"]) if kernel in times else why)
        rows.append([*cells, number(times[record["peer"]]["median"]), best(record)[0]])
    head = ["row", "mode", "the launcher's", *kernels, "theirs", "fastest"]
    return table(head, rows) if rows else ""


def _plan(plan: Record) -> str:
    """A pass's plan in words."""
    if "blocks" not in plan:
        return plan["kernel"]
    kernel, cluster = plan["kernel"], plan.get("cluster", 1)
    if kernel == "grid" and cluster > 1:
        kernel += f" of clusters of {cluster}"
    return (
        f"{kernel}: {plan['blocks']} blocks x {plan['lanes']} lanes, {plan['waves']} waves, "
        f"{plan['warps']} warps, {plan['shared_bytes'] >> 10} KB"
    )


def _plans_table(results: Record) -> str:
    """How each kernel that was timed is divided, and a step's microseconds: modelled, measured.

    What is measured is a call's time by the steps of all its passes, products of the input and all.
    """
    mhz = (results["probe"] or {}).get("clock_mhz")
    rows = []
    for record in results["records"]:
        name = f"{record['cell']} {record['precision']} {record['row']}"
        for kernel, plan in record.get("plan", {}).items():
            if "unknown" in plan or kernel not in record.get("ms", {}):
                continue
            # 0 cycles: there is no model of it.
            cycles = [
                number(p["cycles"] / mhz) if mhz and p["cycles"] else "-" for p in plan.values()
            ]
            measured = 1e3 * record["ms"][kernel]["median"] / record["counts"]["steps"]
            plans = [f"{each} {_plan(p)}" for each, p in plan.items()]
            rows.append(
                [
                    name,
                    record["mode"],
                    kernel,
                    "; ".join(plans),
                    ", ".join(cycles),
                    number(measured),
                ]
            )
    head = ["row", "mode", "kernel", "plan", "us a step by the model", "measured, of the whole"]
    return table(head, rows) if rows else ""


def _unknown_plans(results: Record) -> list[str]:
    """Why plans are not known, each reason once."""
    plans = [plan for r in results["records"] for plan in r.get("plan", {}).values()]
    reasons = dict.fromkeys(plan["unknown"] for plan in plans if "unknown" in plan)
    return [f"Plans are not known: {reason}." for reason in reasons]


def _threads_table(results: Record) -> str:
    """Milliseconds of the CPU kernels by the threads."""
    sizes = results["cpu_threads"]
    threads = sorted({int(n) for size in sizes for n in size["ms"]})
    rows = [[s["cell"], s["size"], *(number(s["ms"].get(str(n))) for n in threads)] for s in sizes]
    return table(["cell", "size", *(f"{n} threads" for n in threads)], rows) if rows else ""


def _clocks(results: Record) -> str:
    """What the multiprocessors' clock was while rows were timed."""
    seen = [r["clocks"]["sm_mhz"] for r in results["records"] if r.get("clocks")]
    most = results["card"].get("clocks", {}).get("sm_max_mhz")
    return f"SM clock, MHz: {', '.join(seen)} (at most {most})" if seen else ""


def closing(results: Record) -> list[str]:
    """What is most worth reading, for the end of the terminal's output."""
    lines = [
        f"FAILED {r['cell']} {r['precision']} {r['row']} {r['mode']}: {r['error']}"
        for r in failures(results)[:20]
    ]
    lines += [
        f"{s['cell']} {s['precision']} {s['mode']} against {s['peer']}: {number(s['best'])}x in "
        f"the geometric mean of {s['rows']}, least {number(s['least'])}x at {s['least_row']}"
        for s in results["summary"]
    ]
    lines += [
        f"at least {g['least_wanted']}x {g['goal']}: {g['reached']} of {g['rows']}"
        + (f", least {number(g['least'])}x at {g['least_row']}" if g["rows"] else "")
        for g in results["goals"]
    ]
    return lines + [f"{s['name']}: {s['outcome']} {s['detail']}".rstrip() for s in results["steps"]]


def markdown(results: Record) -> str:
    """The whole report, of however much there is of it."""
    card = results["card"]
    known = [("driver", "driver"), ("CUDA", "cuda"), ("toolkit", "toolkit"), ("torch", "torch")]
    known.append(("cuDNN", "cudnn"))
    versions = ", ".join(f"{name} {card[key]}" for name, key in known if card.get(key))
    parts = [f"# fastbptt on {card.get('name') or 'no GPU'}", versions, _clocks(results)]
    if results["settings"]["dry_run"]:
        parts.append("A dry run: tiny sizes on the CPU. No number here says anything of a GPU.")
    if not results["complete"]:
        parts.append("The run was cut off or still goes on: rows are missing.")
    steps = [
        (s["name"], s["outcome"], number(s["seconds"]), s["detail"].replace("|", "\\|"))
        for s in results["steps"]
    ]
    parts += ["## Steps", table(("step", "outcome", "seconds", ""), steps)]
    if failed := failures(results):
        lines = [
            f"- {r['cell']} {r['precision']} {r['row']} {r['mode']}: {r['error']}" for r in failed
        ]
        parts += ["## FAILED: what computes something else is not timed", "\n".join(lines)]
    if results["summary"]:
        rows = [
            (
                f"{g['goal']}: at least {g['least_wanted']}x",
                f"{g['reached']} of {g['rows']}",
                number(g["least"]),
                g["least_row"] or "",
            )
            for g in results["goals"]
        ]
        parts += [
            "## Goals",
            table(("goal, of the fastest kernel", "reached", "least", "at"), rows),
        ]
        rows = [
            [s["peer"], s["cell"], s["precision"], s["mode"], s["rows"]]
            + [number(s[key]) for key in ("launcher", "best", "least")]
            + [s["least_row"]]
            for s in results["summary"]
        ]
        head = [
            "against",
            "cell",
            "precision",
            "mode",
            "rows",
            "launcher's kernel",
            "fastest kernel",
        ]
        parts += ["## Summary", table([*head, "least of it", "at T,B,H"], rows)]
        parts.append("Geometric means of the median speedups.")
    if results["records"]:
        parts += ["## Against torch.nn", *_torch_tables(results)]
        parts.append(
            "I = H, one layer; medians in milliseconds, by CUDA events; speedup is the median of "
            "their time over ours, paired in the same round. The bound is the largest of: every "
            "input read and every result written once at the speed of a copy; the products at the "
            "speed of one large product; one exchange a step, as probed."
        )
        if loops := _loops_table(results):
            parts += ["## Loops by hand, other packages, and derivatives of derivatives", loops]
        if kernels := _kernels_table(results):
            parts += ["## Kernel by kernel, ms", kernels]
        if plans := _plans_table(results):
            parts += ["## Plans", plans]
        parts += _unknown_plans(results)
        parts += [
            f"{name} was not measured: {why}." for name, why in results["peers"].items() if why
        ]
    if cells := cell_table(results.get("cells", ())):
        parts += ["## Cells from functions: forward+backward, fp32", cells]
    if threads := _threads_table(results):
        parts += ["## The CPU kernels by threads: forward+backward, ms", threads]
    if results["probe"]:
        rows = [(name, number(value)) for name, value in results["probe"].items()]
        parts += ["## Probe", table(("", ""), rows)]
    if results["ceilings"]:
        rows = [(name, number(value / 1e12)) for name, value in results["ceilings"].items()]
        parts += ["## What the card reaches, in 1e12 bytes or operations a second"]
        parts.append(table(("", ""), rows))
    facts = {**card, **results["machine"], **results["settings"]}
    parts += ["## Machine and settings", "\n".join(f"- {k}: {v}" for k, v in facts.items())]
    return "\n\n".join(part for part in parts if part) + "\n"
