"""How much memory one forward+backward takes, beyond its inputs, outputs and gradients.

    python -m benchmarks.memory
    python -m benchmarks.memory --grid
    python -m benchmarks.memory --cell lstm --row 1024,16,256 --recompute

The second measures every cell and row of the grid, beside torch. The third compares
``recompute=True`` with the default, in memory and, once both have given the same gradients, in
time.

Two measurements, for each contender in a process of its own. *Allocated*: every allocation and
release that torch's profiler reports, replayed to the greatest sum; exact, but it sees torch's
allocators alone. *Resident*: what the operating system has given the process at most, which sees
everything else too, in whole pages and with whatever libraries keep. Both are counted from what is
there before the call, so without inputs and weights; outputs and gradients are taken off too, for
any program needs them, except in the columns of the grid that say *peak*.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fastbptt import _C

from .common import arguments, isa, machine
from .common.contenders import contenders
from .common.rows import BACKWARD, GRID, Row, Size, format_size, select
from .common.timing import interleave, paired_ratios
from .common.workload import CELLS, OURS, Mismatch, ModuleStep, Results, Workload, check, tolerance
from .cpu import memory_grid

DEFAULT_SIZE = Size(1024, 16, 128)
RECOMPUTE = f"{OURS}, recompute"

# The allocator gives large blocks back at once, so that resident memory is memory in use; and the
# profiler is silent on the terminal. Both are read when a process starts.
_CHILD_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "KINETO_LOG_LEVEL": "6",
}


def peak(events: Iterable[tuple[int, int]], results: Mapping[int, int]) -> int:
    """The most bytes in use at once, beyond the results that are there at the end.

    ``events`` are (address, bytes) in the order of time, bytes negative for a release; ``results``
    the bytes of results at an address. Addresses are used again: a result lies in the last
    allocation at its address, and counts from then on.
    """
    log = list(events)
    holders = {address: i for i, (address, size) in enumerate(log) if size > 0}
    wanted = {holders[address]: size for address, size in results.items() if address in holders}
    live = most = 0
    for i, (_, size) in enumerate(log):
        live += size - wanted.get(i, 0)
        most = max(most, live)
    return most


def storages(results: Results) -> dict[int, int]:
    """The bytes that results take of each storage, by its address; views share one."""
    taken: dict[int, int] = {}
    for tensor in results.values():
        if tensor is not None:
            storage = tensor.untyped_storage()
            total = taken.get(storage.data_ptr(), 0) + tensor.nbytes
            taken[storage.data_ptr()] = min(total, storage.nbytes())
    return taken


def _recomputing(work: Workload) -> ModuleStep:
    module = work.load(work.cell.ours, truncation=work.row.truncation, recompute=True)
    return ModuleStep(work, module, partial(module, resets=work.resets))


def _step(row: Row, label: str) -> ModuleStep:
    work = Workload(row, BACKWARD)
    return _recomputing(work) if label == RECOMPUTE else contenders(work)[label]


def log_of(call: Callable[[], Results]) -> tuple[list[tuple[int, int]], Results]:
    """(address, bytes) of what the profiler sees allocated or, negative, released; the results."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    log = [event for event in events if event.get("name") == "[memory]"]
    log.sort(key=lambda event: event["ts"])
    return [(event["args"]["Addr"], event["args"]["Bytes"]) for event in log], results


def allocated(row: Row, label: str) -> dict[str, int]:
    """Bytes of one forward+backward, from the allocations that the profiler reports.

    ``allocated`` is beyond its results, ``allocated_peak`` with them. What a thread keeps from call
    to call is part of it.
    """
    step = _step(row, label)
    step.results()  # what only a first call allocates is no part of it
    step.clear()
    _C.release_workspace()
    log, results = log_of(step.results)
    return {"allocated": peak(log, storages(results)), "allocated_peak": peak(log, {})}


def _status(field: str) -> int:
    """A memory field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def resident(row: Row, label: str) -> dict[str, int | None]:
    """Bytes of a process's first run at this size; None where the system cannot tell.

    ``resident`` is beyond its results, ``resident_peak`` with them.
    """
    small = Row(row.cell, 2, row.B, row.H, row.truncation, row.resets)
    _step(small, label).results()  # code, threads and their stacks are no part of it
    step = _step(row, label)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
        before = _status("VmRSS")
        results = step.results()
        most = _status("VmHWM")
    except OSError:
        return {"resident": None, "resident_peak": None}
    taken = most - before
    return {"resident": taken - sum(storages(results).values()), "resident_peak": taken}


def measure(row: Row, label: str, threads: int) -> dict[str, int | None]:
    """All measurements of one contender, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", label, "--cell", row.cell]
    command += ["--row", format_size(row.size), "--threads", str(threads)]
    environment = {**os.environ, **_CHILD_ENVIRONMENT}
    done = subprocess.run(
        command, cwd=machine.ROOT, env=environment, stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description="Extra memory of one forward+backward, in multiples of the output's size.",
    )
    add = parser.add_argument
    add(
        "--row",
        type=arguments.size,
        default=DEFAULT_SIZE,
        metavar="T,B,H[,...]",
        help="default: 1024,16,128",
    )
    add("--cell", choices=list(CELLS), default="rnn", help="default: rnn")
    add(
        "--threads",
        type=arguments.count,
        metavar="N",
        help="threads to use (default: torch's choice)",
    )
    add(
        "--recompute",
        action="store_true",
        help="compare recompute=True with the default: gradients, memory and time",
    )
    add(
        "--grid",
        action="store_true",
        help="every cell and row of the grid beside torch, into memory.json and memory.md",
    )
    add(
        "--filter",
        nargs="+",
        metavar="TEXT",
        default=[],
        help="of the grid, only rows whose name contains one of these, such as lstm or 128,16",
    )
    arguments.add_common(parser, "the grid's results")
    add("--child", metavar="LABEL", help=argparse.SUPPRESS)  # measure this one, in this process
    return parser


def _differences(found: Results, expected: Results) -> dict[str, float]:
    """The largest difference of each result, relative to its largest magnitude."""
    return {
        name: ((found[name] - value).abs().max() / value.abs().max()).item()
        for name, value in expected.items()
    }


def _print_recompute(row: Row, memory: Mapping[str, Mapping[str, int | None]]) -> None:
    """What recomputing saves and what it costs, after a check that it gives the same.

    Raises:
        Mismatch: it does not.
    """
    work = Workload(row, BACKWARD)
    steps = {OURS: contenders(work)[OURS], RECOMPUTE: _recomputing(work)}
    expected, found = (step.results() for step in steps.values())
    check(found, expected, tolerance(row), "the default")
    worst, difference = max(_differences(found, expected).items(), key=lambda item: item[1])
    for kind in ("allocated", "resident"):
        default, recomputed = (memory[label][kind] for label in (OURS, RECOMPUTE))
        if default and recomputed is not None:
            print(f"recompute / default, {kind}: {recomputed / default:.2f}")
    seconds = interleave(steps, min_rounds=9, budget_s=6.0)
    ratio = paired_ratios(seconds[RECOMPUTE], seconds[OURS])
    print(
        f"recompute / default, time: {ratio.median:.2f} (quartiles {ratio.q1:.2f} to "
        f"{ratio.q3:.2f} of {len(seconds[OURS])} paired rounds)"
    )
    print(f"results and gradients are the same; they differ most in {worst}, by {difference:.2g}")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    row = Row(args.cell, *args.row)
    isa.hold(args.isa)
    if args.recompute and args.cell == "rnn":
        parser.error("argument --recompute: needs --cell gru or lstm: rnn keeps no gates")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.child:
        found = resident(row, args.child)  # first: the profiler takes memory too
        print(json.dumps(found | allocated(row, args.child)))
        return 0
    threads = torch.get_num_threads()
    if args.grid:
        rows = select(list(CELLS), GRID, args.filter)
        if not rows:
            parser.error("argument --filter: none of the rows is left")
        arguments.check_writable(parser, args.out)
        settings = {"command": arguments.command(parser, args)}
        memory_grid.run(rows, partial(measure, threads=threads), settings, args.out)
        return 0
    output = 4 * row.T * row.B * row.H
    print(
        f"{CELLS[row.cell].label} {row.label}, forward+backward, {threads} threads: bytes beyond "
        f"inputs, outputs and gradients, in outputs of {output / 2**20:.3g} MiB"
    )
    print(f"{'':<20} {'allocated':>10} {'resident':>10}")
    labels = [OURS, RECOMPUTE] if args.recompute else list(contenders(Workload(row, BACKWARD)))
    memory = {}
    for label in labels:
        memory[label] = found = measure(row, label, threads)
        cells = (found["allocated"], found["resident"])
        texts = ("unknown" if n is None else f"{n / output:.2f}x" for n in cells)
        print(f"{label:<20}", *(f"{text:>10}" for text in texts), flush=True)
    if args.recompute:
        try:
            _print_recompute(row, memory)
        except Mismatch as mismatch:
            print(f"FAILED, not timed: recompute=True: {mismatch}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
