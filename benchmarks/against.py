"""This tree against another commit: both built, both timed, in rounds that alternate between them.

    python -m benchmarks.against main
    python -m benchmarks.against HEAD~3 --cells lstm --rows 128,16,256 64,64,1024 --threads 1
    python -m benchmarks.against v0.1 --suites steps stacks

This tree's package is timed as it is built in place. The other commit's is built once and kept
below build/against. Each runs in a process of its own, which sleeps while the other one works. Rows
whose results differ by more than rounding are reported as FAILED, are not timed, and make the exit
status 1; of the others it is said whether the results are the same bits.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .common import arguments, isa, machine
from .common.files import ROOT, Record, save
from .common.rows import GRID, MODES, format_size, select
from .common.timing import MIN_SAMPLE_S, Quartiles, orders, paired_ratios
from .common.workload import CELLS, Mismatch, check, tolerance
from .cpu import networks
from .cpu.revisions import NotBuilt, built, commit_of
from .cpu.worker import Ended, Worker

HERE, THERE = "here", "there"
TIMED_SUITES = [name for name, uses in networks.SUITES.items() if not any(u.busy for u in uses)]


def items_of(args: argparse.Namespace) -> list[tuple[Record, float]]:
    """What is to be timed, as a worker takes it, and how far results may differ."""
    if args.suites:
        return [
            (
                {"cell": cell, "row": f"{suite} {use.label}", "mode": mode, "suite": suite}
                | {"index": networks.SUITES[suite].index(use)},
                networks.allowed(use),
            )
            for suite, use, cell, mode in networks.select(args.suites, args.cells, args.filter)
            if mode in args.modes
        ]
    rows = select(args.cells, args.rows or GRID, args.filter)
    return [
        (
            {"cell": r.cell, "row": r.label, "mode": mode, "size": format_size(r.size)},
            tolerance(r),
        )
        for r in rows
        for mode in r.modes(args.modes)
    ]


def measure(
    workers: Mapping[str, Worker],
    item: Record,
    limit: float,
    *,
    min_rounds: int,
    budget_s: float,
) -> Record:
    """Checks and then times an item in both; returns its record.

    ``ms``: quartiles of milliseconds a call. ``speedup``: of the other commit's time over this
    tree's, paired in the same round. ``same_bits``: whether all results are.
    """
    record = {name: item[name] for name in ("cell", "row", "mode")}
    results, lengths = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, worker in workers.items():
            path = Path(folder) / name
            answer = worker.ask("build", item=item, into=str(path))
            if answer["error"] is not None:
                return record | {"error": f"{name}: {answer['error']}"}
            results[name], lengths[name] = torch.load(path), answer["seconds"]
    try:
        check(results[HERE], results[THERE], limit, "the other commit")
    except Mismatch as mismatch:
        return record | {"error": str(mismatch)}
    pairs = [(results[HERE][key], results[THERE][key]) for key in results[HERE]]
    same_bits = all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    calls = {name: math.ceil(MIN_SAMPLE_S / max(lengths[name], 1e-7)) for name in workers}
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    start = time.perf_counter()
    for rounds, order in enumerate(orders(workers)):
        if rounds >= min_rounds and time.perf_counter() - start >= budget_s:
            break
        for name in order:
            seconds[name].append(workers[name].ask("sample", calls=calls[name])["seconds"])
    return record | {
        "error": None,
        "rounds": len(seconds[HERE]),
        "same_bits": same_bits,
        "ms": {name: Quartiles.of(times).rounded(1e3) for name, times in seconds.items()},
        "speedup": paired_ratios(seconds[THERE], seconds[HERE]).rounded(),
    }


def terminal_line(record: Record) -> str:
    """A record in a line under :data:`TERMINAL_HEAD`."""
    name = f"{record['cell']:<5} {record['row']:<44} {record['mode']:<16}"
    if record["error"] is not None:
        return f"{name} FAILED, not timed: {record['error']}"
    ratio = record["speedup"]
    return (
        f"{name} {record['ms'][HERE]['q1']:>9.4g} {record['ms'][THERE]['q1']:>9.4g} "
        f"{ratio['median']:>7.3f}x  {ratio['q1']:.3f} to {ratio['q3']:.3f}  "
        f"{'same bits' if record['same_bits'] else 'rounding differs'}"
    )


TERMINAL_HEAD = (
    f"{'cell':<5} {'T,B,H':<44} {'mode':<16} {'here ms':>9} {'there ms':>9} {'speedup':>8}  "
    f"{'quartiles':<14}  results"
)


def summary(records: Sequence[Record]) -> list[str]:
    """For each cell and mode, in sentences: mean, least and greatest speedup."""
    lines, timed = [], [r for r in records if r["error"] is None]
    for cell, mode in dict.fromkeys((r["cell"], r["mode"]) for r in timed):
        mine = {
            r["row"]: r["speedup"]["median"]
            for r in timed
            if (r["cell"], r["mode"]) == (cell, mode)
        }
        least, greatest = min(mine, key=mine.__getitem__), max(mine, key=mine.__getitem__)
        lines.append(
            f"{cell} {mode}: {statistics.geometric_mean(mine.values()):.3f}x in the geometric mean "
            f"of {len(mine)}, {mine[least]:.3f}x at {least} to {mine[greatest]:.3f}x at {greatest}"
        )
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.against",
        description="Times this tree against another commit, paired.",
    )
    add = parser.add_argument
    add("revision", metavar="REV", help="the other commit, by anything that git takes as one")
    add("--cells", nargs="+", choices=list(CELLS), default=list(CELLS), help="default: all")
    add("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: both")
    add(
        "--rows",
        nargs="+",
        type=arguments.size,
        metavar="T,B,H[,...]",
        help="sizes as for benchmarks.compare (default: its grid)",
    )
    add("--suites", nargs="+", choices=TIMED_SUITES, help="those of benchmarks.uses, not rows")
    add("--filter", nargs="+", metavar="TEXT", default=[], help="only names with one of these")
    add("--threads", type=arguments.count, metavar="N", help="default: torch's choice")
    add("--rounds", type=arguments.count, metavar="N", default=9, help="at least (default: 9)")
    add(
        "--budget",
        type=arguments.seconds,
        metavar="SECONDS",
        default=2.0,
        help="time for the rounds of each, if the fewest take less (default: 2)",
    )
    arguments.add_isa(parser)
    add(
        "--out",
        type=Path,
        metavar="DIR",
        default=ROOT / "build" / "against",
        help="folder for against.json (default: build/against)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and writes it; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    isa.hold(args.isa)
    arguments.check_writable(parser, args.out)
    if args.suites and args.rows:
        parser.error("argument --suites: takes the place of --rows")
    items = items_of(args)
    if not items:
        parser.error("argument --filter: nothing is left")
    try:
        commit = commit_of(args.revision)
        print(f"building {commit[:12]}, if it is not there", flush=True)
        folders = {HERE: ROOT, THERE: built(commit)}
    except NotBuilt as error:
        parser.error(str(error))
    threads = args.threads or torch.get_num_threads()
    facts = machine.facts() | {"threads": threads}
    results: Record = {"machine": facts, "against": commit, "complete": False, "records": []}
    rounds = {"min_rounds": args.rounds, "budget_s": args.budget}
    workers: dict[str, Worker] = {}
    with contextlib.ExitStack() as stack:
        try:
            for name, folder in folders.items():
                workers[name] = Worker(folder, threads)
                stack.callback(workers[name].close)
            for name, folder in folders.items():
                found = workers[name].ask("facts")
                if Path(found["folder"]).resolve() != folder.resolve():
                    raise Ended(f"{folder} was to be imported, but {found['folder']} was")
                print(f"{name}: {folder}, kernels {found['isa']}, threads {found['threads']}")
            print(TERMINAL_HEAD, flush=True)
            for item, limit in items:
                record = measure(workers, item, limit, **rounds)
                results["records"].append(record)
                print(terminal_line(record), flush=True)
                save(results, args.out / "against.json")
            results["complete"] = True
        except Ended as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"\ninterrupted: what was measured is in {args.out}", file=sys.stderr)
            return 130
        finally:
            save(results, args.out / "against.json")
    print(*summary(results["records"]), f"written to {args.out}", sep="\n")
    return 1 if any(record["error"] is not None for record in results["records"]) else 0


if __name__ == "__main__":
    sys.exit(main())
