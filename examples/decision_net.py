"""Train leaky excitatory and inhibitory units on a perceptual decision, and look inside.

    python examples/decision_net.py               half a minute
    python examples/decision_net.py --steps 200   a shorter training

The network is `fastbptt.cells.leaky_rectified` with noise, its recurrent weights signed by Dale's
law through a parametrization. It is trained on trials of a random-dots task with a delay, and then
shown are

1. the psychometric curve: the share of right choices by coherence;
2. the fixed points in the delay, found by Newton's method, and the eigenvalues of the step's
   Jacobian there, both by torch.func on the cell's step;
3. the time of a training step against the same network by a loop over steps.

A picture shows the first two. The exit status is 0 when that is done, 2 for an argument that
cannot be used, and 130 after Ctrl-C.
"""

import argparse
import sys
import time

import torch

import fastbptt
from decision_net_lib import fixed_points, picture
from decision_net_lib.network import DecisionNet
from decision_net_lib.options import make_parser
from decision_net_lib.task import COHERENCES, DECISION, DELAY
from decision_net_lib.training import compare, psychometric, train
from shared_lib.command_line import run_program
from shared_lib.output import prepare_folder, save_picture
from shared_lib.tables import markdown

PICTURE = "decision_net.png"
CUE = torch.tensor([1.0, 0.0, 0.0])  # the input in the delay


def run(args: argparse.Namespace) -> int:
    """Train, measure, and show the results; returns the exit status."""
    torch.set_num_threads(args.threads)
    prepare_folder(args.out, [args.out / PICTURE])
    torch.manual_seed(args.seed)
    model = DecisionNet(args.units, args.noise)
    title = f"random dots: {args.units} leaky units by Dale's law, {args.steps} training steps"
    print(
        f"{title}\ntorch {torch.__version__}, fastbptt {fastbptt.__version__}, "
        f"{fastbptt._C.cpu_isa()}, threads: {torch.get_num_threads()}",
        flush=True,
    )
    begun = time.perf_counter()
    losses = train(model, args.steps, args.batch, args.lr, args.seed)
    last = losses[-50:]
    print(f"loss {sum(last) / len(last):.3f} after {time.perf_counter() - begun:.0f} s\n")

    curve = psychometric(model, args.trials, args.seed)
    rows = [("coherence", *(f"{coherence:+.1%}" for coherence in COHERENCES))]
    print(markdown([*rows, ("right", *(f"{share:.0%}" for share in curve.right))]))
    print(f"75% right at a coherence of {curve.threshold:.1%}, bias {curve.bias:+.1%}\n")

    kept = curve.rates[:, -DECISION - DELAY : -DECISION]
    points = fixed_points.find(model, CUE, kept[:, ::4].flatten(0, 1))
    rows = [("fixed point", "largest eigenvalue", "time constant", "chooses")]
    for number, point in enumerate(points, 1):
        which = "stable" if point.is_stable else "unstable"
        size = f"{float(point.eigenvalues[0].abs()):.3f}"
        rows.append(
            (f"{number}", f"{size} ({which})", f"{point.time_constant:.0f} ms", _side(model, point))
        )
    print(markdown(rows) if points else "no fixed point was found in the delay")

    cost = compare(model, args.batch, args.rounds, args.seed)
    print(
        f"\na training step: {1e3 * cost.ours:.1f} ms, by a loop over steps "
        f"{1e3 * cost.loop:.1f} ms ({cost.ratio:.1f} times); their gradients differ by "
        f"{cost.difference:.0e}"
    )
    save_picture(picture.draw(model, curve, points, title), args.out / PICTURE)
    print(f"\npicture: {args.out / PICTURE}")
    return 0


def _side(model: DecisionNet, point: fixed_points.FixedPoint) -> str:
    """Which way the readout points there."""
    left, right = model.readout(point.rate[: model.excitatory].float())[1:].tolist()
    return "right" if right > left else "left"


def main(arguments: list[str] | None = None) -> int:
    """Run the program on a command line; returns the exit status."""
    parser = make_parser(__doc__.split("\n\n")[0])
    return run_program(run, parser, arguments, "interrupted: no picture was written")


if __name__ == "__main__":
    sys.exit(main())
