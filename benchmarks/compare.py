"""Times ours, every peer and the machine's limits, interleaved in one process.

    python -m benchmarks.compare --threads 2

Each row is checked before it is timed: one that computes something else than its peer is
reported as FAILED, is not timed, and makes the exit status 1. Results are written after every
row, so that a run that is cut off keeps what it has.

JAX is a peer where it is installed (the ``bench-jax`` extra), and in the forward pass ONNX Runtime
(``bench-onnx``). Each computes in threads of its own, as many as torch has. TorchRL's modules
(``bench-torchrl``) are peers in rows with resets. A step loop compiled by ``torch.compile`` is one
in rows of few steps, where there is a compiler; not in quick runs, for the time it takes to
compile, unless it is asked for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .common import arguments, machine
from .common.rows import GRID, MODES, QUICK_GRID, Row, select
from .common.workload import CELLS
from .cpu import peak, tables
from .cpu.peers import COMPILE, JAX, ONNX, OPTIONAL, PEER_KINDS, PEERS, TORCHRL
from .cpu.plot import write_plot
from .cpu.results import Record, failures, measure, save, summarise, summarise_shares, write_text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="Times fastbptt, its peers and the machine's limits, interleaved.",
    )
    add = parser.add_argument
    add(
        "--threads",
        type=arguments.count,
        metavar="N",
        help="threads to use (default: torch's choice)",
    )
    add("--quick", action="store_true", help="few rounds, no long rows: in under two minutes")
    add("--cells", nargs="+", choices=list(CELLS), default=list(CELLS), help="default: all")
    add("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: both")
    add(
        "--peers",
        nargs="+",
        choices=PEER_KINDS,
        help="torch is its module and, where truncated, the detach() loop; compile is "
        "torch.compile of a step loop, where T is at most 35; onnx is ONNX Runtime, in the forward "
        "pass; torchrl is its GRUModule and LSTMModule, where there are resets (default: all there "
        "are)",
    )
    add(
        "--rows",
        nargs="+",
        type=arguments.size,
        metavar="T,B,H[,...]",
        help="sizes to time instead of the grid; with k, truncated to chunks of k steps; "
        "with k1,k2, by TBPTT(k1, k2); with the word resets, with resets inside the sequences",
    )
    add(
        "--filter",
        nargs="+",
        metavar="TEXT",
        default=[],
        help="only rows whose name contains one of these, such as 128,16 or chunked",
    )
    add("--rounds", type=arguments.count, metavar="N", help="rounds at least (default: 9, quick 2)")
    add(
        "--budget",
        type=arguments.seconds,
        metavar="SECONDS",
        help="time for a row's rounds in a mode, if the fewest take less (default: 5, quick 0.1)",
    )
    arguments.add_common(parser, "compare.json, compare.md and compare.png")
    return parser


def _peers(
    parser: argparse.ArgumentParser, asked: Sequence[str] | None, rows: Sequence[Row], quick: bool
) -> list[str]:
    """The kinds of peers to measure. One may be missing, unless it was asked for."""
    peers = list(PEER_KINDS if asked is None else asked)
    compiles = any(peer.kind == COMPILE and peer.applies(row) for peer in PEERS for row in rows)
    if asked is None and (quick or not compiles):
        peers.remove(COMPILE)
    for kind, module in OPTIONAL.items():
        if kind in peers and (reason := module.unavailable()):
            if asked is not None:
                parser.error(f"argument --peers: {reason}")
            print(f"no {module.LABEL} among the peers: {reason}", file=sys.stderr)
            peers.remove(kind)
    return peers


def _write(results: Record, folder: Path) -> None:
    results["summary"] = summarise(results["records"])
    results["shares"] = summarise_shares(results["records"])
    save(results, folder / "compare.json")
    write_text(folder / "compare.md", tables.markdown_report(results))


def run(rows: Sequence[Row], modes: Sequence[str], results: Record, folder: Path) -> None:
    """Measures every row in every mode into ``results``, and writes the folder as it goes."""
    print(tables.machine_line(results), tables.TERMINAL_HEAD, sep="\n", flush=True)
    settings = {name: results["settings"][name] for name in ("peers", "min_rounds", "budget_s")}
    try:
        for row in rows:
            for mode in row.modes(modes):
                record = measure(row, mode, **settings)
                results["records"].append(record)
                print(*tables.terminal_lines(record), sep="\n", flush=True)
                _write(results, folder)
        results["complete"] = True
        for kind in {JAX, ONNX, TORCHRL} & set(settings["peers"]):
            results["machine"] |= OPTIONAL[kind].facts()
    finally:  # of a run that is cut off too
        _write(results, folder)
        write_plot(results, folder / "compare.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    sizes = args.rows or (QUICK_GRID if args.quick else GRID)
    rows = [row for row in select(args.cells, sizes, args.filter) if row.modes(args.modes)]
    if not rows:
        parser.error("argument --filter: none of the rows is left; see --rows and --modes")
    arguments.begin(parser, args)
    if args.threads:
        torch.set_num_threads(args.threads)
    peers = _peers(parser, args.peers, rows, args.quick)
    results: Record = {
        "machine": machine.facts(),
        "settings": {
            "command": arguments.command(parser, args),
            "peers": peers,
            "min_rounds": args.rounds or (2 if args.quick else 9),
            "budget_s": (0.1 if args.quick else 5.0) if args.budget is None else args.budget,
        },
        "complete": False,
        "summary": [],
        "shares": [],
        "records": [],
    }
    load = results["machine"]["load"]
    if load is not None and load > machine.cores() / 2:
        print(f"warning: the machine is busy (load {load}): times mislead", file=sys.stderr)
    if reason := peak.unavailable():
        print(
            f"warning: the peak is not measured, a large sgemm is in its place: {reason}",
            file=sys.stderr,
        )
    try:
        run(rows, args.modes, results, args.out)
    except KeyboardInterrupt:
        print(f"\ninterrupted: what was measured is in {args.out}", file=sys.stderr)
        return 130
    lines = tables.terminal_summary(results["summary"]) + tables.terminal_shares(results["shares"])
    print(*lines, f"written to {args.out}", sep="\n")
    if failed := failures(results):
        print(f"FAILED: {len(failed)} of {len(results['records'])}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
