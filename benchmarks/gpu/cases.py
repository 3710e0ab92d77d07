"""Small calls of every kernel, forward and backward, for a tool that watches the GPU's memory.

compute-sanitizer --kernel-name kns=fastbptt python -m benchmarks.gpu.cases
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence

import torch

from fastbptt.truncation import TBPTT, Chunked, Truncation

from ..common.workload import CELLS
from .rows import AUTO, KERNELS, forced, kernels, no_such_kernel

T, B = 6, 3
HIDDEN = (64, 33)  # one that fast kernels are made for, one that leaves tails
DTYPES = (torch.float16, torch.float32, torch.bfloat16)
CUTS: tuple[tuple[Truncation | None, bool], ...] = (  # truncation, and whether there are resets
    (None, False),
    (Chunked(4), True),
    (TBPTT(2, 4), False),
)


def run(
    cell: str,
    H: int,
    dtype: torch.dtype,
    cut: Truncation | None,
    resets: bool,
    device,
    twice: bool = False,
) -> None:
    """One training step; twice: one with a penalty of the input's gradient."""
    module = CELLS[cell].ours(H, H, device=device, dtype=dtype)
    input = torch.randn(T, B, H, device=device).to(dtype).requires_grad_()
    flags = torch.rand(T, B, device=device) < 0.3 if resets else None
    output, _ = module(input, truncation=cut, resets=flags)
    loss = output.sum()
    if twice:
        (gradient,) = torch.autograd.grad(loss, input, create_graph=True)
        loss = loss + gradient.square().sum()
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()


def pairwise(factors: Sequence[Sequence[object]]) -> Iterator[tuple]:
    """Few combinations in which every two values of two factors meet, those with most pairs first.

    A tool slows a case down so much that there is no time for all combinations.
    """
    there = list(itertools.product(*(range(len(factor)) for factor in factors)))
    pairs = {case: set(itertools.combinations(enumerate(case), 2)) for case in there}
    missing = set().union(*pairs.values())
    while missing:
        case = max(there, key=lambda case: len(pairs[case] & missing))
        missing -= pairs[case]
        yield tuple(factor[i] for factor, i in zip(factors, case, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the cases; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.cases", description=__doc__)
    parser.add_argument(
        "--deadline",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="begin none after this moment of the system's monotonic clock",
    )
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, in float32")
    args = parser.parse_args(argv)
    device = torch.device("cpu" if args.dry_run else "cuda")
    dtypes = (torch.float32,) if args.dry_run else DTYPES
    there = KERNELS if args.dry_run else kernels(device) or (AUTO,)
    cases = list(pairwise((there, list(CELLS), dtypes, CUTS, HIDDEN)))
    done = 0
    for kernel, cell, dtype, (cut, resets), H in cases:
        if time.monotonic() > args.deadline:
            break
        twice = dtype == torch.float32 and not isinstance(cut, TBPTT)
        name = f"{kernel} {cell} {dtype} H={H} {cut}{' resets' * resets}{' twice' * twice}"
        with forced(kernel):
            try:
                run(cell, H, dtype, cut, resets, device, twice)
            except (RuntimeError, ValueError) as error:
                if not no_such_kernel(error):
                    raise
                name += ": no such kernel"
        print(name, flush=True)
        done += 1
    print(f"{done} of {len(cases)} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main())
