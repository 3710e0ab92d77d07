"""Checks and times the rows of the GPU benchmark; a line of JSON for each thing it finds.

    python -m benchmarks.gpu.measure --seconds 60 --filter "lstm fp16"

benchmarks.gpu runs this in a process of its own, because one wrong access ends every later CUDA
call of a process: it goes on behind the row that was its end, with ``--skip``.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..common import arguments, machine
from ..common.contenders import TORCH_PEERS, contenders
from ..common.files import Record
from ..common.rows import BACKWARD, FORWARD
from ..common.timing import Quartiles, Step, no_collection, orders, paired_ratios
from ..common.timing import sample as sample_by_wall_clock
from ..common.workload import OURS, Mismatch, ModuleStep, Results, TwiceStep, Workload
from . import card, plans
from .accuracy import errors_of, hold, larger, without_cudnn
from .peers import OTHERS
from .rows import (
    AUTO,
    BACKWARD_ALONE,
    KERNELS,
    PRECISIONS,
    TWICE,
    Task,
    counts,
    forced,
    grid,
    kernels,
    no_such_kernel,
    precision,
    recurrent_bytes,
    tasks,
    tiny_grid,
)

MARK = "@ "  # what a line of results begins with: libraries print too
MIN_ROUNDS, BUDGET_S, MIN_SAMPLE_S = 5, 0.2, 5e-3
PEER_TIMES = 4.0  # the error that another package may have, of what ours may
CLOCK_EVERY = 16  # records, as asking for the clocks takes some time
Sample = Callable[[Step, int], float]  # seconds a call of a step, over some calls


def emit(kind: str, **content: object) -> None:
    print(MARK + json.dumps({"kind": kind, **content}), flush=True)


class ForcedStep:
    """A step of ours with the kernel named; AUTO is the launcher's own choice."""

    def __init__(self, step: ModuleStep | TwiceStep, kernel: str) -> None:
        self.step, self.kernel = step, kernel
        self.clear = step.clear

    def run(self) -> object:
        with forced(self.kernel):
            return self.step.run()

    def results(self) -> Results:
        with forced(self.kernel), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = self.step.results()
        if ours := [str(w.message) for w in caught if OURS in str(w.message)]:
            raise Mismatch(f"warned: {ours[0]}")  # of a fallback to torch: its time is not ours
        return found


class BackwardStep:
    """The backward pass of a step; the forward pass is off the clock."""

    def __init__(self, step: ModuleStep, kernel: str = AUTO) -> None:
        self.step, self.kernel = step, kernel
        self.output: Tensor | None = None

    def clear(self) -> None:
        self.output = None  # the graph of the last call goes before another is made
        self.step.clear()
        with forced(self.kernel):
            self.output, _ = self.step.forward(self.step.input)

    def run(self) -> None:
        with forced(self.kernel):
            self.output.backward(self.step.grad_output)


def backward_of(step: ModuleStep | ForcedStep) -> BackwardStep:
    forced_step = isinstance(step, ForcedStep)
    return BackwardStep(step.step, step.kernel) if forced_step else BackwardStep(step)


def sample_by_events(step: Step, calls: int) -> float:
    """Seconds a call by CUDA events; ``clear`` is off the clock, as far as it keeps ahead."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    torch.cuda.synchronize()
    for begin, end in pairs:
        step.clear()
        begin.record()
        step.run()
        end.record()
    torch.cuda.synchronize()
    return sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3 / calls


def interleave(
    steps: Mapping[str, Step], sample: Sample, min_rounds: int, budget_s: float
) -> dict[str, list[float]]:
    """Times all steps round after round: seconds a call, one value a step and round."""
    for step in steps.values():  # the first call pays for what later ones find ready
        step.clear()
        step.run()
    length = {name: sample(step, 1) for name, step in steps.items()}
    calls = {name: math.ceil(MIN_SAMPLE_S / max(length[name], 1e-6)) for name in steps}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with no_collection():
        start = time.perf_counter()
        for rounds, order in enumerate(orders(steps)):
            if rounds >= min_rounds and time.perf_counter() - start >= budget_s:
                break
            for name in order:
                seconds[name].append(sample(steps[name], calls[name]))
    return seconds


class Bench:
    """Everything that is the same for every row.

    Args:
        device: where the rows are.
        asked: kernels to ask for, beside the launcher's choice.
        without: those of them, or OURS, that are left out of every row.
        dry_run: two rounds of each row.
        say: is told the contender that runs next, should it never come back.
    """

    def __init__(
        self,
        device: torch.device,
        asked: Sequence[str],
        dry_run: bool,
        without: Container[str] = (),
        say: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.device, self.kernels, self.without, self.say = device, asked, without, say
        self.rounds, self.budget_s = (2, 0.0) if dry_run else (MIN_ROUNDS, BUDGET_S)
        self.sample: Sample = sample_by_wall_clock
        if device.type == "cuda":
            self.sample = sample_by_events

    def workload(self, task: Task) -> Workload:
        """The row's tensors in its dtype; float32 for all where the CPU stands in."""
        mode = FORWARD if task.mode == FORWARD else BACKWARD
        work = Workload(task.row, mode, device=self.device)
        return work.to(PRECISIONS[task.row.precision]) if self.device.type == "cuda" else work

    def checked(self, task: Task, record: Record) -> dict[str, ModuleStep | ForcedStep]:
        """The contenders that compute the right thing, the peer last; the record gets the rest."""
        work, label = self.workload(task), record["peer"]
        self.say(label)
        ours, peer = steps_of(task, work)
        _, exact = steps_of(task, work.to(torch.float64))
        truth = exact.results()
        theirs = errors_of(peer.results(), truth)
        if task.row.precision == "tf32":
            theirs = larger(theirs, errors_of(without_cudnn(peer.results), truth))
        # tf32 has the digits of float16; a peer may not have rounded products of one row to them.
        as_rounded = torch.float16 if task.row.precision == "tf32" else work.input.dtype
        eps = torch.finfo(as_rounded).eps
        ulps = {name: eps * exact.abs().max().item() for name, exact in truth.items()}
        if task.peer is not None:
            try:
                peer = OTHERS[task.peer].build(work)
                peer.module.train(task.mode != FORWARD)
                hold(errors_of(peer.results(), truth), theirs, ulps, PEER_TIMES)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of another's code: whatever it is, it is not our failure
                record["skipped"] = f"{label}: {str(error).splitlines()[:1]}"
                return {}
        right: dict[str, ModuleStep | ForcedStep] = {}
        asked = self.kernels if task.peer is None else ()
        for name, kernel in {OURS: AUTO, **{name: name for name in asked}}.items():
            if name in self.without:
                record["absent"][name] = "left out: processes were lost with it"
                continue
            self.say(name)
            step = ForcedStep(ours, kernel)
            try:
                record["accuracy"][name] = hold(errors_of(step.results(), truth), theirs, ulps)
                right[name] = step
            except torch.OutOfMemoryError:
                raise
            except (Mismatch, RuntimeError, ValueError) as error:
                kind = "absent" if no_such_kernel(error) else "failed"
                record[kind][name] = str(error).splitlines()[0]
        there = [name for name in asked if name not in record["absent"]]
        if len(there) == 1 and OURS in right:  # what the launcher has to choose
            right.pop(there[0], None)
        for name, step in right.items():
            with forced(step.kernel):
                record["plan"][name] = plans.of(work.input, task)
        self.say("the timing")
        return right | {label: peer}

    def measure(self, task: Task) -> Record:
        """Checks and then times a row in one mode, kernel by kernel.

        Returns its record. ``failed``: what computes the wrong thing, and how; it is not timed.
        ``absent``: kernels that do not exist for the row. ``accuracy``: of each of ours, the most
        of the error it is allowed that it has. ``plan``: how each of ours is divided on the card,
        as plans.of() says. ``ms``: quartiles of every contender's milliseconds a call.
        ``speedup``: of the peer's time over each of ours, paired in the same round.
        """
        record = identity(task) | {"failed": {}, "absent": {}, "accuracy": {}, "plan": {}}
        record["error"], peer = None, record["peer"]
        with (
            precision(task.row.precision, cudnn=task.mode != TWICE),
            torch.set_grad_enabled(task.mode != FORWARD),
        ):
            try:
                steps = self.checked(task, record)
                record["error"] = said(record["failed"])
                if len(steps) < 2:
                    return record
                timed: Mapping[str, Step] = steps
                if task.mode == BACKWARD_ALONE:
                    timed = {name: backward_of(step) for name, step in steps.items()}
                seconds = interleave(timed, self.sample, self.rounds, self.budget_s)
            except torch.OutOfMemoryError:
                return record | {"skipped": "out of memory"}
            except RuntimeError as error:
                return record | {"error": said(record["failed"] | {"the row": str(error)})}
        record["rounds"] = len(seconds[peer])
        record["ms"] = {name: Quartiles.of(s).rounded(1e3) for name, s in seconds.items()}
        record["speedup"] = {
            name: paired_ratios(seconds[peer], s).rounded()
            for name, s in seconds.items()
            if name != peer
        }
        return record


def steps_of(task: Task, work: Workload) -> Sequence[ModuleStep | TwiceStep]:
    """Ours, and torch's own way to the same."""
    steps = list(contenders(work).values())
    for step in steps:
        step.module.train(task.mode != FORWARD)
    if task.mode == TWICE:
        steps = [TwiceStep(work, step.module, step.forward) for step in steps]
    return steps


def said(failed: Mapping[str, str]) -> str | None:
    """Failures in one line."""
    return "; ".join(f"{name}: {text.splitlines()[0]}" for name, text in failed.items()) or None


def identity(task: Task) -> Record:
    """What a record is of, and what any program has to do for it."""
    row = task.row
    (peer,) = (p for p in TORCH_PEERS if p.applies(row))
    label = peer.label(row) + " without cuDNN" * (task.mode == TWICE)  # it has no such derivative
    return row.described(task.mode) | {
        "precision": row.precision,
        "peer": task.peer or label,
        "counts": counts(row, task.mode),
        "recurrent_bytes": recurrent_bytes(row),
    }


@dataclass
class Call:
    """A function as a step."""

    run: Callable[[], object]

    def clear(self) -> None:
        pass


def ceilings(sample: Sample, device: torch.device, n: int) -> dict[str, float]:
    """What the card reaches: bytes a second of a copy, operations a second of n x n products."""

    def rate(work: float, run: Callable[[], object]) -> float:
        step = Call(run)
        sample(step, 1)
        return float(f"{work / min(sample(step, 3) for _ in range(3)):.4g}")

    source = torch.randn(4 * n * n, device=device)
    target = torch.empty_like(source)
    found = {"bytes": rate(2 * source.nbytes, lambda: target.copy_(source))}
    for name, dtype in PRECISIONS.items():
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        with precision(name):
            found[name] = rate(2 * n**3, partial(torch.mm, a, b))
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.measure",
        description="Checks and times the rows of the GPU benchmark, as lines of JSON.",
    )
    add = parser.add_argument
    add("--seconds", type=arguments.seconds, default=300.0, help="begin no row after")
    add("--skip", type=int, default=0, metavar="N", help="leave out the first N measurements")
    add("--filter", nargs="+", metavar="TEXT", default=[], help="as for benchmarks.gpu")
    add("--kernels", nargs="+", metavar="KERNEL", help="as for benchmarks.gpu")
    add("--without", nargs="+", metavar="KERNEL", default=[], help="leave these out of all rows")
    add("--dry-run", action="store_true", help="tiny sizes, with the CPU in the card's place")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measures row after row; returns the exit status."""
    started = time.monotonic()
    parser = _parser()
    args = parser.parse_args(argv)
    device = torch.device("cpu" if args.dry_run else "cuda")
    missing = {name: other.missing() for name, other in OTHERS.items()}
    others = {name: other.rows for name, other in OTHERS.items() if missing[name] is None}
    todo = tasks(tiny_grid(), args.filter) if args.dry_run else tasks(grid(), args.filter, others)
    if not todo:
        parser.error("argument --filter: none of the rows is left")
    there = args.kernels or (KERNELS if args.dry_run else kernels(device))
    say = partial(emit, "at")
    bench = Bench(device, there, args.dry_run, args.without, lambda name: say(contender=name))
    gc.freeze()  # what is there by now is not looked through before every row
    emit("facts", machine=machine.facts(), kernels=there, measurements=len(todo), peers=missing)
    if args.skip == 0:
        n = 64 if args.dry_run else 8192
        emit("ceilings", ceilings=ceilings(bench.sample, device, n))
    for index, task in enumerate(todo[args.skip :], args.skip):
        if time.monotonic() - started > args.seconds:
            emit("end", complete=False)
            return 0
        patience_s = OTHERS[task.peer].patience_s if task.peer else None
        emit("begin", index=index, record=identity(task), patience_s=patience_s)
        record = bench.measure(task)
        if index % CLOCK_EVERY == 0:
            record["clocks"] = card.clocks()
        emit("record", record=record)
        if device.type == "cuda":
            torch.cuda.synchronize()  # raises if the context is lost: then no later row can run
    emit("end", complete=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
