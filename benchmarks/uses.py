"""Layers as programs use them: step by step, stacked, both ways, packed, and on a busy machine.

    python -m benchmarks.uses
    python -m benchmarks.uses --suites steps busy --cells lstm

Ours and ``torch.nn``'s, with one thread and with all, interleaved, once they have computed the
same. *steps* are loops over single steps from the state of the one before, with gradients, without
and under autocast; *stacks* layers on each other and *bidirectional* both directions of one
sequence, where only layers and directions have work for a second thread; *packed* sequences of
different lengths; *awd-lstm* that language model's three layers; *busy* a layer while other
processes compute, started for it and ended after it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence

import torch

import fastbptt

from .common import arguments, machine
from .common.contenders import results_of_ours
from .common.files import Record, save, write_text
from .common.rows import BACKWARD
from .common.timing import Quartiles, interleave, ninth_decile, paired_ratios
from .common.workload import CELLS, OURS, Mismatch, check
from .cpu import tables
from .cpu.networks import SUITES, Use, allowed, build, select
from .cpu.surroundings import WithThreads, autocast, busy

THEIRS = "torch.nn"


def _ours_again(
    steps: Mapping[tuple[str, int], WithThreads], min_rounds: int, budget_s: float
) -> dict[tuple[str, int], list[float]]:
    """Ours alone: a percentile takes more rounds than there is time for with a torch of seconds."""
    ours = {key: step for key, step in steps.items() if key[0] == OURS}
    return interleave(ours, min_rounds=5 * min_rounds, budget_s=5 * budget_s)


def measure(
    suite: str,
    use: Use,
    cell: str,
    mode: str,
    threads: Sequence[int],
    *,
    min_rounds: int,
    budget_s: float,
) -> Record:
    """Checks and then times one use of a cell in one mode; returns its record.

    ``ms``: for ours and torch's, by the number of threads, quartiles of milliseconds and ``p90``,
    the 90th percentile. ``speedup``: by the threads, of torch's time over ours, paired in the same
    round. ``threads_gain``: of our time with one thread over that with the most. ``under_one``:
    our median and 90th percentile with the most threads over those with one; on a busy machine of
    more rounds, ours alone.
    """
    record: Record = {"suite": suite, "cell": cell, "use": use.label, "mode": mode}
    before = torch.get_num_threads()
    try:
        with torch.set_grad_enabled(mode == BACKWARD), autocast(use.dtype):
            ours, theirs = build(use, cell, mode)
            steps = {(OURS, n): WithThreads(ours, n) for n in threads}
            steps |= {(THEIRS, n): WithThreads(theirs, n) for n in threads}
            try:
                expected = theirs.results()
            except RuntimeError as error:  # a library may have no kernel, as for an older ISA
                reason = str(error).partition("\n")[0]
                return record | {"error": f"{THEIRS} does not run: {reason}"}
            for n in threads:
                check(results_of_ours(steps[OURS, n]), expected, allowed(use), THEIRS)
            with busy(use.busy):
                seconds = interleave(steps, min_rounds=min_rounds, budget_s=budget_s)
                again = _ours_again(steps, min_rounds, budget_s) if use.busy else seconds
    except Mismatch as mismatch:
        return record | {"error": str(mismatch)}
    finally:
        torch.set_num_threads(before)
    one, most = min(threads), max(threads)
    medians, p90s = (
        {n: summary(again[OURS, n]) for n in threads}
        for summary in (statistics.median, ninth_decile)
    )
    ms: Record = {OURS: {}, THEIRS: {}}
    for (name, n), times in seconds.items():
        p90 = {"p90": float(f"{1e3 * ninth_decile(times):.5g}")}
        ms[name][str(n)] = Quartiles.of(times).rounded(1e3) | p90
    return record | {
        "error": None,
        "rounds": len(seconds[OURS, one]),
        "isa": fastbptt._C.cpu_isa(),
        "ms": ms,
        "speedup": {
            str(n): paired_ratios(seconds[THEIRS, n], seconds[OURS, n]).rounded() for n in threads
        },
        "threads_gain": paired_ratios(seconds[OURS, one], seconds[OURS, most]).rounded(),
        "under_one": {
            "median": float(f"{medians[most] / medians[one]:.4g}"),
            "p90": float(f"{p90s[most] / p90s[one]:.4g}"),
        },
    }


def _fields(record: Record) -> list[str]:
    """Times, speedups and what the threads bring, for both tables."""
    threads = list(record["speedup"])
    fields = [f"{record['ms'][name][n]['median']:.3g}" for n in threads for name in (OURS, THEIRS)]
    fields += [f"{record['speedup'][n]['median']:.2f}" for n in threads]
    gain, worse = record["threads_gain"], record["under_one"]
    return [*fields, f"{gain['median']:.2f}", f"{worse['median']:.2f}", f"{worse['p90']:.2f}"]


def _heads(threads: Sequence[int]) -> list[str]:
    heads = [f"{name} {n}t ms" for n in threads for name in ("ours", "torch")]
    return [*heads, *(f"speedup {n}t" for n in threads), "threads' gain", "N/1 median", "N/1 p90"]


def _name(record: Record) -> str:
    return f"{record['suite']:<13} {record['cell']:<4} {record['use']:<34} {record['mode']:<16}"


def terminal_line(record: Record) -> str:
    """A record in a line under :func:`terminal_head`."""
    if record["error"] is not None:
        return f"{_name(record)} FAILED, not timed: {record['error']}"
    return _name(record) + "".join(f"{field:>14}" for field in _fields(record))


def terminal_head(threads: Sequence[int]) -> str:
    """What the columns are; ``2t`` is with two threads."""
    return f"{'':<70}" + "".join(f"{head:>14}" for head in _heads(threads))


def summary(records: Sequence[Record]) -> list[str]:
    """For each suite and cell, in sentences: mean and least speedup by the threads."""
    lines, timed = [], [r for r in records if r["error"] is None]
    for suite, cell in dict.fromkeys((r["suite"], r["cell"]) for r in timed):
        mine = [r for r in timed if (r["suite"], r["cell"]) == (suite, cell)]
        for n in mine[0]["speedup"]:
            least = min(mine, key=lambda r: r["speedup"][n]["median"])
            medians = [r["speedup"][n]["median"] for r in mine]
            lines.append(
                f"{suite}, {cell}, threads={n}: {statistics.geometric_mean(medians):.2f}x "
                f"{THEIRS} in the geometric mean of {len(mine)}, least {min(medians):.2f}x at "
                f"{least['use']}, {least['mode']}"
            )
        gains = [r["threads_gain"]["median"] for r in mine]
        lines.append(f"{suite}, {cell}: threads bring {min(gains):.2f}x to {max(gains):.2f}x")
    return lines


def markdown(results: Record) -> str:
    """A table a suite, the summary, the machine."""
    threads = results["settings"]["threads"]
    parts = ["# Layers as programs use them"]
    heads = ["cell", "T,B,widths", "mode", *_heads(threads)]
    for suite in dict.fromkeys(r["suite"] for r in results["records"]):
        lines = ["| " + " | ".join(heads) + " |", "|---|---|---|" + "--:|" * (len(heads) - 3)]
        for record in results["records"]:
            if record["suite"] == suite:
                fields = [CELLS[record["cell"]].label, record["use"], record["mode"]]
                is_wrong = record["error"] is not None
                fields += ["FAILED"] + [""] * (len(heads) - 4) if is_wrong else _fields(record)
                lines.append("| " + " | ".join(fields) + " |")
        parts += [f"## {suite}", "\n".join(lines)]
    parts.append(
        f"Taken with `{results['settings']['command']}` on {tables.machine_line(results)}. Medians "
        "of interleaved rounds; *2t* is with two threads; a speedup is the median of torch.nn's "
        "time over ours, paired in the same round; *N/1* is our time with all threads over that "
        "with one."
    )
    parts.append("\n".join(f"- {line}" for line in summary(results["records"])))
    return "\n\n".join(parts) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.uses",
        description="Single steps, stacks, both directions, packed input, a busy machine.",
    )
    add = parser.add_argument
    add("--suites", nargs="+", choices=list(SUITES), default=list(SUITES), help="default: all")
    add("--cells", nargs="+", choices=list(CELLS), default=list(CELLS), help="default: all")
    add(
        "--filter",
        nargs="+",
        metavar="TEXT",
        default=[],
        help="only what has one of these in its name, such as 1024 or autocast",
    )
    add(
        "--threads",
        type=arguments.count,
        metavar="N",
        help="the most; each is timed with one too (default: torch's choice)",
    )
    add("--quick", action="store_true", help="few rounds")
    add(
        "--rounds",
        type=arguments.count,
        metavar="N",
        help="at least (default: 7, quick 2)",
    )
    add(
        "--budget",
        type=arguments.seconds,
        metavar="SECONDS",
        help="time for the rounds of each, if the fewest take less (default: 1, quick 0)",
    )
    arguments.add_common(parser, "uses.json and uses.md")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and writes it; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    arguments.begin(parser, args)
    chosen = select(args.suites, args.cells, args.filter)
    if not chosen:
        parser.error("argument --filter: nothing is left; see --suites and --cells")
    threads = sorted({1, args.threads or torch.get_num_threads()})
    settings = {
        "command": arguments.command(parser, args),
        "threads": threads,
        "min_rounds": args.rounds or (2 if args.quick else 7),
        "budget_s": (0.0 if args.quick else 1.0) if args.budget is None else args.budget,
    }
    rounds = {name: settings[name] for name in ("min_rounds", "budget_s")}
    facts = machine.facts() | {"threads": max(threads)}
    results: Record = {"machine": facts, "settings": settings, "complete": False, "records": []}
    print(tables.machine_line(results), terminal_head(threads), sep="\n", flush=True)
    try:
        for suite, use, cell, mode in chosen:
            results["records"].append(record := measure(suite, use, cell, mode, threads, **rounds))
            print(terminal_line(record), flush=True)
            save(results, args.out / "uses.json")
        results["complete"] = True
    except KeyboardInterrupt:
        print(f"\ninterrupted: what was measured is in {args.out}", file=sys.stderr)
        return 130
    finally:
        save(results, args.out / "uses.json")
        write_text(args.out / "uses.md", markdown(results))
    print(*summary(results["records"]), f"written to {args.out}", sep="\n")
    return 1 if any(record["error"] is not None for record in results["records"]) else 0


if __name__ == "__main__":
    sys.exit(main())
