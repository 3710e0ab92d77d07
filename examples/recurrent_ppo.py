"""Train a recurrent policy by PPO on a task of memory, with episodes that end inside the rollouts.

    python examples/recurrent_ppo.py                        the same policy with torch and with
                                                            fastbptt: time, curves, returns
    python examples/recurrent_ppo.py --backend fastbptt     one of them
    python examples/recurrent_ppo.py --cell gru             with another recurrent core
    python examples/recurrent_ppo.py --task repeat-first --chunk 4    another task; truncated

A training pass runs the core over a whole rollout, [T, B]. torch.nn's layers cannot reset the
state where an episode has ended, so with torch that is a loop which calls them for one step at a
time; with fastbptt it is one call with `resets`. Both begin from the same weights and act with the
same random numbers. The exit status is 0 when training came to its end, 2 for an argument that
cannot be used, and 128 plus the signal's number when a signal stopped it.
"""

import argparse
import signal
import sys

import torch

from recurrent_ppo_lib import report
from recurrent_ppo_lib.options import make_parser
from recurrent_ppo_lib.tasks import TASKS
from recurrent_ppo_lib.training import THRESHOLD, WINDOW, Trainer
from shared_lib.command_line import run_program
from shared_lib.interruption import StopSignal
from shared_lib.layers import BACKENDS
from shared_lib.output import prepare_folder
from shared_lib.progress import progress

CURVES = "curves.png"


def train(updates: int, trainers: list[Trainer], stop: StopSignal) -> bool:
    """Train all the trainers; False if a signal stopped it.

    Two backends take turns, an update each, so that whatever else the machine is doing slows
    both of them.
    """
    with progress(total=updates, unit="update", lines=10) as bar:
        for _ in range(updates):
            for trainer in trainers:
                trainer.update()
            bar.set_postfix({t.backend: f"{t.mean_return:.2f}" for t in trainers}, refresh=False)
            bar.update()
            if stop.number is not None:
                return False
    return True


def show_results(args: argparse.Namespace, trainers: list[Trainer]) -> None:
    """The comparison, and the learning curves."""
    print(report.table(trainers))
    if len(trainers) == 2:
        same, difference = report.agreement(*trainers)
        print(
            f"the same episodes in the first {same} of {len(trainers[0].progress.losses)} updates, "
            f"in which the losses differ by {difference:.1e} at most"
        )
    report.plot(trainers, args.out / CURVES)
    print(f"learning curves: {args.out / CURVES}")


def run(args: argparse.Namespace) -> int:
    """Check everything, train, and show the results; returns the exit status."""
    torch.set_num_threads(args.threads)
    prepare_folder(args.out, [args.out / CURVES])
    backends = BACKENDS if args.backend == "both" else (args.backend,)
    trainers = [Trainer(args, backend) for backend in backends]
    with StopSignal() as stop:
        print(
            f"the task is solved when the mean return of the last {WINDOW} episodes is at least "
            f"{THRESHOLD}; without memory it is {TASKS[args.task].best_without_memory} at best",
            flush=True,
        )
        finished = train(args.updates, trainers, stop)
    show_results(args, trainers)
    if not finished:
        print(f"interrupted after {len(trainers[0].progress.losses)} of {args.updates} updates")
        return 128 + (stop.number or signal.SIGTERM)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the program on a command line; returns the exit status."""
    parser = make_parser(__doc__.split("\n\n")[0])
    interrupted = "interrupted at once: there are no results"
    return run_program(run, parser, arguments, interrupted)


if __name__ == "__main__":
    sys.exit(main())
