"""A truncation that is chosen during training, against fixed ones: the copy task.

    python examples/adaptive_truncation.py                about five minutes on an idle core
    python examples/adaptive_truncation.py --seeds 1      half of that
    python examples/adaptive_truncation.py --task "lag 5 to 10"

At each step the symbol of ten steps before is to be said, or of five to ten, as an input says of
each sequence, by an LSTM of two layers of 50 (Aicher, Foti and Fox, "Adaptively truncating
backpropagation through time to control gradient bias", 2019).
Trained are fixed truncations and `fastbptt.AdaptiveTruncation` with several tolerances, whose K
comes down slowly or at once, from the same weights and on the same sequences. Shown are the loss,
the K that was chosen, how often the bias of the gradient, measured against the full one, was within
the tolerance, and the cost in steps of the recurrence, measurements included. The exit status is 0
when that is done, 2 for an argument that cannot be used, and 130 after Ctrl-C.
"""

import argparse
import sys

import torch

import fastbptt
from adaptive_truncation_lib import picture, report
from adaptive_truncation_lib.options import make_parser
from adaptive_truncation_lib.training import SETTINGS, train
from shared_lib.command_line import run_program
from shared_lib.output import prepare_folder, save_picture
from shared_lib.progress import progress

PICTURE = "adaptive_truncation.png"


def run(args: argparse.Namespace) -> int:
    """Train, and show the results; returns the exit status."""
    torch.set_num_threads(args.threads)
    prepare_folder(args.out, [args.out / PICTURE])
    print(
        f"torch {torch.__version__}, fastbptt {fastbptt.__version__}, {fastbptt._C.cpu_isa()}\n",
        flush=True,
    )
    cases = [(setting, args.seed + number) for number in range(args.seeds) for setting in SETTINGS]
    runs = [
        train(args.task, setting, seed, args.updates, args.every)
        for setting, seed in progress(cases, desc="copy task", unit="run", lines=len(cases))
    ]
    print(report.table(runs))
    save_picture(picture.draw(runs), args.out / PICTURE)
    print(f"\npicture: {args.out / PICTURE}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the program on a command line; returns the exit status."""
    parser = make_parser(__doc__.split("\n\n")[0])
    return run_program(run, parser, arguments, "interrupted: no picture was written")


if __name__ == "__main__":
    sys.exit(main())
