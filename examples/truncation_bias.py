"""What truncated backpropagation through time costs in learning, and what it saves.

    python examples/truncation_bias.py               about two minutes
    python examples/truncation_bias.py --quick       the same on a smaller scale
    python examples/truncation_bias.py --cell lstm   with another recurrent layer

On the adding problem, at several lengths T and with two losses (at the last step, or at every
step), full backpropagation and each truncation of equal reach are compared in

1. the gradient: its bias and its deviation, at the weights that training begins with and at those
   that full backpropagation has half trained;
2. learning: the held-out error, and the steps until it is below 0.02, from the same weights and
   with the same sequences;
3. cost: the time of a training step.

A table is printed for each, and one picture shows all three. The exit status is 0 when that is
done, 2 for an argument that cannot be used, and 130 after Ctrl-C.
"""

import argparse
import sys

import torch

import fastbptt
from shared_lib.command_line import run_program
from shared_lib.output import prepare_folder, save_picture
from truncation_bias_lib import bias, cost, picture, report
from truncation_bias_lib.modes import FULL, modes
from truncation_bias_lib.options import fill_in, make_parser
from truncation_bias_lib.problem import LEARNT, LOSSES, VARIANCE
from truncation_bias_lib.training import Settings, train

PICTURE = "truncation_bias.png"


def run(args: argparse.Namespace) -> int:
    """Check everything, measure, and show the results; returns the exit status."""
    fill_in(args)
    torch.set_num_threads(args.threads)
    prepare_folder(args.out, [args.out / PICTURE])
    settings = Settings(args.cell, args.hidden, args.batch, args.lr, args.max_steps, args.seed)
    compared = modes(args.reach)
    cases = [(loss, steps) for loss in LOSSES for steps in args.lengths]
    title = (
        f"adding problem: {args.cell.upper()}, H = {args.hidden}, B = {args.batch}, "
        f"reach {args.reach}"
    )
    print(
        f"{title}\ntorch {torch.__version__}, fastbptt {fastbptt.__version__}, "
        f"{fastbptt._C.cpu_isa()}, threads: {torch.get_num_threads()}"
    )

    # Full backpropagation comes first: its weights are those at which the gradients are compared.
    runs = [train(settings, compared, FULL, steps, loss) for loss, steps in cases]
    biases = [
        one
        for full in runs
        for weights in ("start", "halfway")
        for one in bias.measure(settings, compared, full, weights, args.draws)
    ]
    for loss in LOSSES:
        errors = ", ".join(f"{full.halfway_error:.3f}" for full in runs if full.loss == loss)
        print(
            f"\n1. Gradient of the loss at {'the last' if loss == 'last' else 'every'} step, "
            f"{args.draws} draws; held-out error halfway: {errors}\n"
        )
        print(report.bias_table([one for one in biases if one.loss == loss]), flush=True)

    runs += [
        train(settings, compared, mode, steps, loss)
        for loss, steps in cases
        for mode in compared
        if mode != FULL
    ]
    for loss in LOSSES:
        print(
            f"\n2. Learning with the loss at {'the last' if loss == 'last' else 'every'} step: "
            f"held-out error (always answering 1: {VARIANCE:.4f}), and steps until it is below "
            f"{LEARNT}, of {args.max_steps}\n"
        )
        print(report.learning_table([one for one in runs if one.loss == loss]), flush=True)

    costs = []
    for steps in args.lengths:
        costs += cost.measure(settings, compared, steps, args.rounds)
    print("\n3. Time of a training step, and its ratio to that of full backpropagation\n")
    print(report.cost_table(costs))

    save_picture(picture.draw(biases, runs, costs, title), args.out / PICTURE, dpi=110)
    print(f"\npicture: {args.out / PICTURE}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the program on a command line; returns the exit status."""
    parser = make_parser(__doc__.split("\n\n")[0])
    interrupted = "interrupted: no picture was written"
    return run_program(run, parser, arguments, interrupted)


if __name__ == "__main__":
    # The terminal's encoding may lack a character of the tables.
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
