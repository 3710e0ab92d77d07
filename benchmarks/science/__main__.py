"""Runs the experiments on truncation, and writes their tables and pictures.

    python -m benchmarks.science            what is missing in benchmarks/results/science
    python -m benchmarks.science --again    everything
    python -m benchmarks.science --quick    a small one of each, to see that they run

A result is written when its part is done, so a run that is ended goes on where it was. Parts of
another machine or version are not mixed with this one's: then everything is run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..common import arguments, machine
from ..common.files import ROOT, Record, save, write_text
from .experiments import EXPERIMENTS, Experiment
from .tables import TABLES

RESULTS = ROOT / "benchmarks" / "results" / "science"
QUICK = ROOT / "runs" / "science_quick"
SAME = ("cpu", "isa", "system", "torch", "fastbptt")  # facts that results of one file share


def _begun(path: Path, facts: Record, command: str, again: bool) -> Record:
    """The results so far, or empty ones."""
    if not again and path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
        if all(results["machine"].get(name) == facts[name] for name in SAME):
            return results
    settings = {"command": command}
    return {"machine": facts, "settings": settings, "complete": False, "records": []}


def perform(experiment: Experiment, out: Path, command: str, *, quick: bool, again: bool) -> None:
    """Runs the parts that are missing; writes the results, the tables and the picture."""
    path = out / f"{experiment.name}.json"
    results = _begun(path, machine.facts(), command, again)
    parts = experiment.parts(quick)
    done = {
        json.dumps(part): record
        for part in parts
        for record in results["records"]
        if part.items() <= record.items()
    }
    results["complete"] = False
    for number, part in enumerate(parts, 1):
        if json.dumps(part) in done:
            continue
        begun = time.process_time()
        record = {**part, **experiment.run(part)}
        record["cpu_s"] = round(time.process_time() - begun, 2)
        done[json.dumps(part)] = record
        results["records"] = [done[key] for key in map(json.dumps, parts) if key in done]
        save(results, path)
        what = ", ".join(f"{value}" for value in part.values())
        print(f"{experiment.name}: {number} of {len(parts)}: {what}", file=sys.stderr, flush=True)
    results["records"] = [done[json.dumps(part)] for part in parts]
    results["complete"] = True
    save(results, path)
    text = "\n\n".join(table(out) for table in TABLES[experiment.name])
    write_text(out / f"{experiment.name}.md", f"{text}\n")
    experiment.save_picture(results["records"], out / f"{experiment.name}.png")
    print(f"## {experiment.name}\n\n{text}\n", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs and writes; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.science",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    names = [experiment.name for experiment in EXPERIMENTS]
    add("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    add("--again", action="store_true", help="run what there is already, too")
    add("--quick", action="store_true", help="small ones, into another folder")
    add("--out", type=Path, metavar="DIR", help="folder for the results")
    args = parser.parse_args(argv)
    out = args.out or (QUICK if args.quick else RESULTS)
    arguments.check_writable(parser, out)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are small
    command = "python -m benchmarks.science" + " --quick" * args.quick
    try:
        for experiment in EXPERIMENTS:
            if args.only is None or experiment.name in args.only:
                perform(experiment, out, command, quick=args.quick, again=args.again)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
