"""How the time grows with T, B, H, the layers and the threads, and where it has cliffs.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --quick --cells rnn --axes H

Forward+backward. The sizes of a sweep and the numbers of threads are timed interleaved, each once
it has computed what torch computes. A *cliff* is a size that costs over 1.5 times what
interpolation between its neighbours says, or than a larger one; a *thread loss* one where two
threads take over 5% more than one. Suspects are timed again, beside the sizes they are held
against, and reported if they stay.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .common import arguments, machine
from .common.contenders import contenders
from .common.files import Record, save
from .common.rows import BACKWARD, Row
from .common.timing import Quartiles, interleave, paired_ratios
from .common.workload import CELLS, OURS, Mismatch, Workload, check, tolerance
from .cpu.surroundings import WithThreads
from .cpu.sweeps import (
    AXES,
    CLIFF,
    LOSS,
    QUICK_SWEEPS,
    SWEEPS,
    Excess,
    Point,
    Sweep,
    excess,
    worst_excess,
)

THREADS = (1, 2)
Key = tuple[int, int]  # the axis' value, threads


def steps_of(cell: str, point: Point, threads: Sequence[int]) -> dict[int, WithThreads]:
    """Ours at a size by the threads, checked against torch's module.

    Raises:
        Mismatch: one computes something else.
    """
    row = Row(cell, point.T, point.B, point.H)
    found = contenders(Workload(row, BACKWARD, layers=point.layers))
    ours = found.pop(OURS)
    ((name, peer),) = found.items()
    expected = peer.results()
    steps = {n: WithThreads(ours, n) for n in threads}
    for step in steps.values():
        check(step.results(), expected, tolerance(row), name)
        step.clear()
    return steps


def _times(sweep: Sweep, seconds: Mapping[Key, list[float]], threads: int) -> dict[int, list]:
    return {v: times for (v, n), times in seconds.items() if n == threads}


def _loss(value: int, seconds: Mapping[Key, list[float]]) -> Quartiles:
    """Two threads' time over one's."""
    one, two = THREADS
    return paired_ratios(seconds[value, two], seconds[value, one])


def _suspects(
    sweep: Sweep, seconds: Mapping[Key, list[float]], threads: Sequence[int]
) -> tuple[dict[Key, Excess], list[int]]:
    """Sizes that look like cliffs, by their threads too, and those that look like losses."""
    cliffs = {}
    for n in threads:
        times = _times(sweep, seconds, n)
        for value in sweep.values:
            found = worst_excess(value, times)
            if found and found.ratio.median > CLIFF:
                cliffs[value, n] = found
    losses = []
    if set(THREADS) <= set(threads):
        losses = [v for v in sweep.values if _loss(v, seconds).median > LOSS]
    return cliffs, losses


def measure(
    cell: str, sweep: Sweep, threads: Sequence[int], *, min_rounds: int, budget_s: float
) -> Record:
    """Times a sweep, and its suspects again; returns its record.

    ``points``: for each size its quartiles of milliseconds by the threads, and of its ``excess``
    over what its neighbours say. ``cliffs`` and ``losses``: those that stayed, with the quartiles
    of the second timing.
    """
    record: Record = {
        "cell": cell,
        "axis": sweep.axis,
        "at": sweep.at,
        "base": sweep.base._asdict(),
    }
    try:
        built = {v: steps_of(cell, sweep.point(v), threads) for v in sweep.values}
    except Mismatch as mismatch:
        return record | {"error": str(mismatch), "points": [], "cliffs": [], "losses": []}
    steps = {(v, n): step for v, by_threads in built.items() for n, step in by_threads.items()}
    seconds = interleave(steps, min_rounds=min_rounds, budget_s=budget_s)
    points = []
    for v in sweep.values:
        point: Record = {sweep.axis: v, "multiply_adds": sweep.point(v).multiply_adds}
        point["multiply_adds"] *= CELLS[cell].gates
        point["ms"] = {str(n): Quartiles.of(seconds[v, n]).rounded(1e3) for n in threads}
        worst = {n: worst_excess(v, _times(sweep, seconds, n)) for n in threads}
        point["excess"] = {str(n): e and e.ratio.rounded() for n, e in worst.items()}
        points.append(point)

    cliffs, losses = _suspects(sweep, seconds, threads)
    wanted = {(v, n) for (v, n), e in cliffs.items()}
    wanted |= {(w, n) for (_, n), e in cliffs.items() for w in e.neighbours}
    wanted |= {(v, n) for v in losses for n in THREADS}
    again = {}
    if wanted:
        chosen = {key: steps[key] for key in sorted(wanted)}
        again = interleave(chosen, min_rounds=2 * min_rounds + 3, budget_s=budget_s)
    record |= {"error": None, "points": points, "cliffs": [], "losses": []}
    for (v, n), suspect in cliffs.items():
        found = excess(v, suspect.neighbours, _times(sweep, again, n))
        if found.ratio.median > CLIFF:
            about = {sweep.axis: v, "threads": n, "neighbours": found.neighbours}
            sizes = (v, *found.neighbours)
            ms = {str(w): Quartiles.of(again[w, n]).rounded(1e3)["q1"] for w in sizes}
            record["cliffs"].append(about | {"excess": found.ratio.rounded(), "ms": ms})
    for v in losses:
        if (ratio := _loss(v, again)).median > LOSS and ratio.q1 > 1:
            ms = {str(n): Quartiles.of(again[v, n]).rounded(1e3)["q1"] for n in THREADS}
            record["losses"].append({sweep.axis: v, "ratio": ratio.rounded(), "ms": ms})
    return record


def cliff_line(record: Record, cliff: Record) -> str:
    """A cliff in a sentence."""
    axis, (value, *near) = record["axis"], cliff["ms"]
    others = " and ".join(f"{cliff['ms'][w]:.3g} ms at {w}" for w in near)
    return (
        f"cliff: {record['cell']} {record['at']}, {axis}={value}, threads={cliff['threads']}: "
        f"{cliff['ms'][value]:.3g} ms, {cliff['excess']['median']:.2f}x what it should cost by "
        f"{others} (quartiles {cliff['excess']['q1']:.2f} to {cliff['excess']['q3']:.2f})"
    )


def loss_line(record: Record, loss: Record) -> str:
    """A size where the second thread costs time, in a sentence."""
    one, two = loss["ms"].values()
    return (
        f"thread loss: {record['cell']} {record['at']}, {record['axis']}={loss[record['axis']]}: "
        f"{two:.3g} ms with two threads, {one:.3g} with one, {loss['ratio']['median']:.2f}x "
        f"(quartiles {loss['ratio']['q1']:.2f} to {loss['ratio']['q3']:.2f})"
    )


def findings(records: Sequence[Record]) -> list[str]:
    """Every cliff and every loss in a sentence."""
    cliffs = [cliff_line(r, cliff) for r in records for cliff in r["cliffs"]]
    return cliffs + [loss_line(r, loss) for r in records for loss in r["losses"]]


def terminal_lines(record: Record) -> list[str]:
    """A sweep as a small table."""
    head = f"{record['cell']} {record['at']}"
    if record["error"] is not None:
        return [f"{head}: FAILED, not timed: {record['error']}"]
    lines = [f"{head:<24} {'threads':>7} {'ms':>9} {'GFLOP/s':>8} {'excess':>7}"]
    for point in record["points"]:
        for n, ms in point["ms"].items():
            rate = 2e-6 * point["multiply_adds"] / ms["q1"]
            over = point["excess"][n]
            lines.append(
                f"{record['axis'] + '=' + str(point[record['axis']]):>24} {n:>7} {ms['q1']:>9.4g} "
                f"{rate:>8.4g} {over['median'] if over else float('nan'):>7.2f}"
            )
    return [*lines, *findings([record])]


def write_plot(results: Record, path: Path) -> None:
    """The picture, where there is what draws it."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no matplotlib: {path.name} is not drawn", file=sys.stderr)
        return
    from .cpu import scaling_plot

    scaling_plot.write_plot(results, path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description="Time of forward+backward against T, B, H, layers and threads; cliffs.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="smaller sizes, few rounds: in under two minutes")
    add("--cells", nargs="+", choices=list(CELLS), default=list(CELLS), help="default: all")
    add("--axes", nargs="+", choices=AXES, default=list(AXES), help="default: all")
    add(
        "--threads",
        nargs="+",
        type=arguments.count,
        metavar="N",
        default=list(THREADS),
        help="numbers of threads (default: 1 2)",
    )
    add("--rounds", type=arguments.count, metavar="N", help="rounds at least (default: 7, quick 3)")
    add(
        "--budget",
        type=arguments.seconds,
        metavar="SECONDS",
        help="time for a sweep's rounds, if the fewest take less (default: 6, quick 0)",
    )
    add(
        "--upto",
        type=arguments.count,
        metavar="N",
        help="leave out values of an axis above this",
    )
    add("--values", nargs="+", type=arguments.count, metavar="N", help="only these of an axis")
    arguments.add_common(parser, "scaling.json and scaling.png")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sweeps; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    arguments.begin(parser, args)
    sweeps = [s for s in (QUICK_SWEEPS if args.quick else SWEEPS) if s.axis in args.axes]
    if args.upto:
        sweeps = [sweep.upto(args.upto) for sweep in sweeps]
    if args.values:
        sweeps = [sweep.among(args.values) for sweep in sweeps]
    sweeps = [sweep for sweep in sweeps if sweep.values]
    if not sweeps:
        parser.error("arguments --axes, --upto and --values: no size is left")
    settings = {
        "command": arguments.command(parser, args),
        "threads": args.threads,
        "min_rounds": args.rounds or (3 if args.quick else 7),
        "budget_s": (0.0 if args.quick else 6.0) if args.budget is None else args.budget,
    }
    facts = machine.facts() | {"threads": max(args.threads)}
    results: Record = {"machine": facts, "settings": settings, "complete": False, "records": []}
    rounds = {name: settings[name] for name in ("min_rounds", "budget_s")}
    before = torch.get_num_threads()
    try:
        for cell in args.cells:
            for sweep in sweeps:
                record = measure(cell, sweep, args.threads, **rounds)
                results["records"].append(record)
                print(*terminal_lines(record), sep="\n", flush=True)
                save(results, args.out / "scaling.json")
        results["complete"] = True
        save(results, args.out / "scaling.json")
    except KeyboardInterrupt:
        print(f"\ninterrupted: what was measured is in {args.out}", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(before)
        write_plot(results, args.out / "scaling.png")
    found = findings(results["records"])
    print(f"{len(found)} cliffs and thread losses", *found, f"written to {args.out}", sep="\n")
    return 1 if any(r["error"] is not None for r in results["records"]) else 0


if __name__ == "__main__":
    sys.exit(main())
