"""Where truncation goes the wrong way: influence balancing.

    python examples/influence_balancing.py

A linear chain of 23 units has one parameter, whose influence on the loss is positive over the next
steps and negative in the long run. Shown are

1. the influence through the last K steps, which a truncation takes for the whole;
2. learning with an update after each K steps, by the loss of the last of them: too short windows
   go the wrong way;
3. learning with an update after each 200 steps, by the loss of all of them, with the package's
   truncations within: the randomized one is unbiased, and arrives if the steps are small.

A table is printed for each, and one picture shows all three. The exit status is 0 when that is
done, 2 for an argument that cannot be used, and 130 after Ctrl-C.
"""

import argparse
import sys

import torch

import fastbptt
from influence_balancing_lib import picture
from influence_balancing_lib.chain import (
    RANDOM,
    RATES,
    WINDOW_RATE,
    WINDOWS,
    influence,
    learn_by_segments,
    learn_by_windows,
    truncations,
)
from influence_balancing_lib.options import make_parser
from shared_lib.command_line import run_program
from shared_lib.output import prepare_folder, save_picture
from shared_lib.progress import progress
from shared_lib.tables import markdown

PICTURE = "influence_balancing.png"


def run(args: argparse.Namespace) -> int:
    """Compute, learn, and show the results; returns the exit status."""
    torch.set_num_threads(1)  # there is nothing to share between threads
    prepare_folder(args.out, [args.out / PICTURE])
    print(f"torch {torch.__version__}, fastbptt {fastbptt.__version__}, {fastbptt._C.cpu_isa()}\n")
    influences = [influence(k) for k in range(1, max(WINDOWS) + 1)]
    windows = {
        k: learn_by_windows(k, args.windows) for k in progress(WINDOWS, desc="windows", unit="run")
    }
    head = f"loss after {args.windows} updates, learning rate {WINDOW_RATE:g}"
    rows = [("K", "influence of K steps", head)]
    rows += [(f"{k}", f"{influences[k - 1]:+.1f}", windows[k].outcome) for k in WINDOWS]
    print(markdown(rows), flush=True)

    cases = [
        (rate, name, number)
        for rate in RATES
        for name in truncations(0)
        for number in range(args.seeds if name == RANDOM else 1)
    ]
    runs = {
        case: learn_by_segments(case[1], case[0], args.segments, args.seed + case[2])
        for case in progress(cases, desc="segments", unit="run")
    }
    rows = [("truncation", *(f"learning rate {rate:g}" for rate in RATES))]
    for name in truncations(0):
        cells = []
        for rate in RATES:
            of_name = [run for case, run in runs.items() if case[:2] == (rate, name)]
            cells.append(_outcome(of_name))
        rows.append((name, *cells))
    print(f"\nloss after {args.segments} updates, each after 200 steps\n")
    print(markdown(rows))

    curves = {f"K = {k}": list(enumerate(each.losses, 1)) for k, each in windows.items()}
    segments = {
        f"{rate:g}": {
            f"{name}#{number}": list(enumerate(run.losses, 1))
            for (of, name, number), run in runs.items()
            if of == rate
        }
        for rate in RATES
    }
    save_picture(picture.draw(influences, curves, segments), args.out / PICTURE)
    print(f"\npicture: {args.out / PICTURE}")
    return 0


def _outcome(runs: list) -> str:
    """Of runs that differ in what is random."""
    if len(runs) == 1:
        return runs[0].outcome
    diverged = sum(run.diverged for run in runs)
    if diverged:
        return f"{diverged} of {len(runs)} diverge"
    worst = max(runs, key=lambda run: run.losses[-1])
    return f"at most {worst.outcome}, {len(runs)} runs"


def main(arguments: list[str] | None = None) -> int:
    """Run the program on a command line; returns the exit status."""
    parser = make_parser(__doc__.split("\n\n")[0])
    return run_program(run, parser, arguments, "interrupted: no picture was written")


if __name__ == "__main__":
    sys.exit(main())
