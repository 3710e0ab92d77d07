"""What derivatives beyond the first cost: twice backward, of each sample, of an ensemble.

    python -m benchmarks.derivatives

Rows of

    twice        the forward pass, the backward pass with ``create_graph=True``, and the backward
                 pass of that along given cotangents of every gradient, against ``torch.nn``'s
                 module and against our own forward+backward
    per sample   the weights' gradients of each sample of a batch by ``vmap`` of ``grad``, against
                 one sample after another and, where Opacus is installed, its DPLSTM and our own
                 sampler for it
    ensemble     forward+backward of eight networks with weights of their own by ``vmap``, against
                 a loop over ``torch.nn``'s

All that is compared computes the same, which is checked first, and is timed interleaved.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from .common import arguments, machine
from .common.files import Record, save
from .common.rows import BACKWARD, Row, Size, format_size
from .common.timing import Quartiles, interleave, paired_ratios
from .common.workload import (
    CELLS,
    OURS,
    Mismatch,
    Results,
    TwiceStep,
    Workload,
    check,
    tolerance,
)
from .cpu import tables

KINDS = ("twice", "per sample", "ensemble")
SIZES = (
    Size(128, 1, 64),
    Size(128, 1, 256),
    Size(128, 16, 64),
    Size(35, 20, 200),
    Size(128, 16, 256),
    Size(128, 16, 512),
    Size(64, 64, 512),
)
SAMPLES = Size(50, 32, 32)
ENSEMBLE, NETWORKS = Size(100, 8, 32), 8
ONCE = "forward+backward"
SAMPLER = "fastbptt.opacus"
ONE_BY_ONE = "one sample by one"


class Call:
    """What is timed: a function of nothing that returns named tensors."""

    def __init__(self, function: Callable[[], Results]) -> None:
        self.run = function

    def clear(self) -> None: ...


def twice(cell: str, size: Size) -> tuple[dict[str, Call | TwiceStep], Row]:
    """Double backward by ours and by torch's module, and our backward pass alone."""
    row = Row(cell, *size[:3])
    work = Workload(row, BACKWARD)

    def once(module: nn.Module) -> Call:
        inputs = [work.input.clone().requires_grad_(), *module.parameters()]

        def run() -> Results:
            output, _ = module(inputs[0])
            gradients = torch.autograd.grad(output, inputs, work.grad_output)
            return dict(zip(["input", *work.weights], gradients, strict=True))

        return Call(run)

    ours, theirs = work.load(CELLS[cell].ours), work.load(CELLS[cell].torch)
    name = f"torch.nn.{cell.upper()}"
    return {OURS: TwiceStep(work, ours), name: TwiceStep(work, theirs), ONCE: once(ours)}, row


def per_sample(cell: str, size: Size) -> tuple[dict[str, Call], Row]:
    """The weights' gradients of each sample, [B, ...]."""
    row = Row(cell, *size[:3])
    work = Workload(row, BACKWARD)
    ours = work.load(CELLS[cell].ours)
    weights = {name: weight.detach() for name, weight in ours.named_parameters()}

    def loss(weights: dict[str, Tensor], input: Tensor, grad_output: Tensor) -> Tensor:
        output, _ = functional_call(ours, weights, (input.unsqueeze(1),))
        return (output.squeeze(1) * grad_output).sum()

    gradients = vmap(grad(loss), in_dims=(None, 1, 1))

    def run_loop() -> Results:
        each = [grad(loss)(weights, work.input[:, b], work.grad_output[:, b]) for b in range(row.B)]
        return {name: torch.stack([one[name] for one in each]) for name in weights}

    calls = {
        OURS: Call(lambda: gradients(weights, work.input, work.grad_output)),
        ONE_BY_ONE: Call(run_loop),
    }
    if importlib.util.find_spec("opacus") is None or cell != "lstm":
        return calls, row
    from opacus.grad_sample import GradSampleModule
    from opacus.layers import DPLSTM

    import fastbptt.opacus  # noqa: F401  (registers the sampler)

    def call(module: nn.Module) -> Call:
        sampled = GradSampleModule(module, batch_first=False, loss_reduction="sum")
        input = work.input.clone().requires_grad_()

        def run() -> Results:
            for weight in sampled.parameters():
                weight.grad_sample = None
            output, _ = sampled(input)
            output.backward(work.grad_output)
            return {
                # DPLSTM names the weights of a layer's two maps otherwise.
                _plain(name): weight.grad_sample
                for name, weight in sampled._module.named_parameters()
            }

        return Call(run)

    theirs = DPLSTM(row.H, row.H)
    theirs.load_state_dict(work.weights)
    calls[SAMPLER] = call(copy.deepcopy(ours))
    calls["opacus.layers.DPLSTM"] = call(theirs)
    return calls, row


def _plain(name: str) -> str:
    layer = {"l0.ih.": "_ih_l0", "l0.hh.": "_hh_l0"}
    for start, end in layer.items():
        if name.startswith(start):
            return name.removeprefix(start) + end
    return name


def ensemble(cell: str, size: Size) -> tuple[dict[str, Call], Row]:
    """Each network's gradients of its weights, [NETWORKS, ...]."""
    row = Row(cell, *size[:3])
    works = [Workload(row, BACKWARD, seed=seed) for seed in range(NETWORKS)]
    input, grad_output = works[0].input, works[0].grad_output
    ours = [work.load(CELLS[cell].ours) for work in works]
    theirs = [work.load(CELLS[cell].torch) for work in works]
    weights, _ = stack_module_state(ours)
    weights = {name: weight.detach() for name, weight in weights.items()}
    base = copy.deepcopy(ours[0])

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return (functional_call(base, weights, (input,))[0] * grad_output).sum()

    gradients = vmap(grad(loss))

    def run_loop() -> Results:
        found = []
        for module in theirs:
            output, _ = module(input)
            found.append(torch.autograd.grad(output, list(module.parameters()), grad_output))
        stacked = (torch.stack(of_all) for of_all in zip(*found, strict=True))
        return dict(zip(weights, stacked, strict=True))

    name = f"{NETWORKS} of torch.nn.{cell.upper()}"
    return {OURS: Call(lambda: gradients(weights)), name: Call(run_loop)}, row


BUILD = {"twice": twice, "per sample": per_sample, "ensemble": ensemble}


def measure(kind: str, cell: str, size: Size, *, min_rounds: int, budget_s: float) -> Record:
    """Checks and then times one row; returns its record.

    ``ms``: quartiles of milliseconds a call. ``speedup``: of each peer's time over ours, and
    ``cost``, of ours over our forward+backward's: paired in the same round.
    """
    calls, row = BUILD[kind](cell, size)
    record: Record = {"kind": kind, "cell": cell, "size": format_size(size)}
    found = {name: call.run() for name, call in calls.items() if name != ONCE}
    try:
        for name, results in found.items():
            # A second derivative is a sum of as many terms for each term of a first one.
            check(found[OURS], results, 4 * tolerance(row), name)
    except Mismatch as mismatch:
        return record | {"error": str(mismatch)}
    seconds = interleave(calls, min_rounds=min_rounds, budget_s=budget_s)
    record |= {
        "error": None,
        "rounds": len(seconds[OURS]),
        "ms": {name: Quartiles.of(times).rounded(1e3) for name, times in seconds.items()},
        "speedup": {
            name: paired_ratios(times, seconds[OURS]).rounded()
            for name, times in seconds.items()
            if name not in (OURS, ONCE)
        },
    }
    if ONCE in seconds:
        record["cost"] = paired_ratios(seconds[OURS], seconds[ONCE]).rounded()
    return record


def terminal_lines(record: Record) -> list[str]:
    """A record as lines."""
    name = f"{record['kind']:<10} {record['cell']:<5} {record['size']:<14}"
    if record["error"] is not None:
        return [f"{name} FAILED, not timed: {record['error']}"]
    cost = f", {record['cost']['median']:.2f} of {ONCE}" if "cost" in record else ""
    lines = [f"{name} {record['ms'][OURS]['median']:>9.3f} ms{cost}"]
    for peer, ratio in record["speedup"].items():
        lines.append(
            f"{'':<31} {record['ms'][peer]['median']:>9.3f} ms {peer:<22} "
            f"{ratio['median']:>7.2f}x  {ratio['q1']:.2f} to {ratio['q3']:.2f}"
        )
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.derivatives",
        description="Second derivatives, per-sample gradients and ensembles, interleaved.",
    )
    add = parser.add_argument
    add("--threads", type=arguments.count, metavar="N", help="default: torch's choice")
    add("--cells", nargs="+", choices=list(CELLS), default=list(CELLS), help="default: all")
    add("--kinds", nargs="+", choices=KINDS, default=KINDS, help="default: all")
    add(
        "--sizes",
        nargs="+",
        type=arguments.size,
        metavar="T,B,H",
        default=SIZES,
        help="of the networks that are differentiated twice",
    )
    add("--rounds", type=arguments.count, metavar="N", default=7, help="at least (default: 7)")
    add("--budget", type=arguments.seconds, metavar="SECONDS", default=1.0, help="default: 1")
    arguments.add_common(parser, "derivatives.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and writes it; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if any(size.truncation or size.resets for size in args.sizes):
        parser.error("argument --sizes: sizes alone, without a truncation or resets")
    arguments.begin(parser, args)
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = {
        "command": arguments.command(parser, args),
        "min_rounds": args.rounds,
        "budget_s": args.budget,
    }
    results: Record = {"machine": machine.facts(), "settings": settings, "records": []}
    print(tables.machine_line(results))
    rows = [("twice", cell, size) for size in args.sizes for cell in args.cells]
    rows += [("per sample", cell, SAMPLES) for cell in args.cells]
    rows += [("ensemble", cell, ENSEMBLE) for cell in args.cells]
    for kind, cell, size in rows:
        if kind not in args.kinds:
            continue
        record = measure(kind, cell, size, min_rounds=args.rounds, budget_s=args.budget)
        results["records"].append(record)
        print(*terminal_lines(record), sep="\n", flush=True)
        save(results, args.out / "derivatives.json")
    print(f"written to {args.out}")
    return 1 if any(record["error"] is not None for record in results["records"]) else 0


if __name__ == "__main__":
    sys.exit(main())
