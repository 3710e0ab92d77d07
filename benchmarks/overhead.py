"""What one short call costs, against torch's cells and modules: T = 1, B = 1, as in control loops.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --autocast bfloat16 --size 1,1024

Each call takes a step from a given state. Ours, ``torch.nn``'s module and ``torch.nn``'s cell are
timed interleaved, once they have computed the same: the forward pass with gradients enabled (which
builds a graph), under ``no_grad`` and under ``inference_mode``, and forward+backward. With
``--autocast`` all of a row's calls are in one region of it, as the steps of an episode are.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .common import arguments, machine
from .common.files import Record, save
from .common.rows import BACKWARD, FORWARD, Row
from .common.timing import Quartiles, interleave, paired_ratios
from .common.workload import CELLS, OURS, Mismatch, Results, State, Workload, check, tolerance
from .cpu import tables
from .cpu.surroundings import autocast

MODES: dict[str, tuple[str, Callable[[], contextlib.AbstractContextManager]]] = {
    "forward, no_grad": (FORWARD, torch.no_grad),
    "forward, inference_mode": (FORWARD, torch.inference_mode),
    "forward, with grad": (FORWARD, torch.enable_grad),
    BACKWARD: (BACKWARD, torch.enable_grad),
}


class OneStep:
    """A call of a module or a cell from a state, under a mode. Entering the mode is in the call.

    As in a training step, the outputs and their graph die within the timed call.
    """

    def __init__(self, work: Workload, module: nn.Module, mode: str) -> None:
        self.module = module
        kind, self.context = MODES[mode]
        self.backward = kind == BACKWARD
        self.is_cell = isinstance(module, nn.RNNCellBase)
        self.input = work.input[0] if self.is_cell else work.input
        self.grad_output = work.grad_output[0] if self.is_cell else work.grad_output
        generator = torch.Generator().manual_seed(1)
        shape = (work.row.B, work.row.H) if self.is_cell else (1, work.row.B, work.row.H)
        states = [torch.randn(shape, generator=generator) for _ in range(2)]
        self.state = tuple(states) if work.row.cell == "lstm" else states[0]

    def clear(self) -> None:
        self.module.zero_grad(set_to_none=True)

    def run(self) -> tuple[Tensor, State]:
        with self.context():
            if self.is_cell:
                state = self.module(self.input, self.state)
                output = state[0] if isinstance(state, tuple) else state
            else:
                output, state = self.module(self.input, self.state)
            if self.backward:
                output.backward(self.grad_output)
            return output, state

    def results(self) -> Results:
        """Outputs and, in training, the weights' gradients, named and shaped as a module's."""
        self.clear()
        output, state = self.run()
        states = state if isinstance(state, tuple) else (state,)
        shape = (1, *self.input.shape[-2:])
        found: Results = {"output": output.detach().view(shape)}
        found |= {
            name: s.detach().view(shape) for name, s in zip(("h_n", "c_n"), states, strict=False)
        }
        if self.backward:
            for name, weight in self.module.named_parameters():
                found[f"d{name.removesuffix('_l0')}"] = weight.grad
        return found


def build(
    cell: str, size: tuple[int, int], mode: str, dtype: str | None = None
) -> dict[str, OneStep]:
    """Ours, torch's module and torch's cell by their names, checked to agree.

    ``dtype``: the autocast that this is called under, if any.

    Raises:
        Mismatch: they do not.
    """
    B, H = size
    row = Row(cell, 1, B, H)
    work = Workload(row, MODES[mode][0])
    torch_cell = getattr(nn, f"{cell.upper()}Cell")(H, H)
    torch_cell.load_state_dict({k.removesuffix("_l0"): v for k, v in work.weights.items()})
    modules = {
        OURS: work.load(CELLS[cell].ours),
        f"torch.nn.{cell.upper()}Cell": torch_cell,
        f"torch.nn.{cell.upper()}": work.load(CELLS[cell].torch),
    }
    steps = {name: OneStep(work, module, mode) for name, module in modules.items()}
    found = {name: step.results() for name, step in steps.items()}
    for name in list(modules)[1:]:
        limit = tolerance(row) if dtype is None else 4 * torch.finfo(getattr(torch, dtype)).eps
        check(found[OURS], found[name], limit, name)
    return steps


def measure(
    cell: str,
    size: tuple[int, int],
    mode: str,
    *,
    min_rounds: int,
    budget_s: float,
    dtype: str | None = None,
) -> Record:
    """Checks and then times one cell in one mode; returns its record.

    ``us``: quartiles of microseconds a call. ``speedup``: of each peer's time over ours, paired in
    the same round.
    """
    record: Record = {"cell": cell, "size": dict(zip("BH", size, strict=True)), "mode": mode}
    with autocast(dtype):
        try:
            steps = build(cell, size, mode, dtype)
        except Mismatch as mismatch:
            return record | {"error": str(mismatch)}
        seconds = interleave(steps, min_rounds=min_rounds, budget_s=budget_s)
    return record | {
        "error": None,
        "rounds": len(seconds[OURS]),
        "us": {name: Quartiles.of(times).rounded(1e6) for name, times in seconds.items()},
        "speedup": {
            name: paired_ratios(times, seconds[OURS]).rounded()
            for name, times in seconds.items()
            if name != OURS
        },
    }


def terminal_lines(record: Record) -> list[str]:
    """A record as lines, one a peer."""
    name = f"{record['cell']:<5} {record['mode']:<24}"
    if record["error"] is not None:
        return [f"{name} FAILED, not timed: {record['error']}"]
    return [
        f"{name} {record['us'][OURS]['q1']:>8.3g} {peer:<18} {record['us'][peer]['q1']:>8.3g} "
        f"{ratio['median']:>7.2f}x  {ratio['q1']:.2f} to {ratio['q3']:.2f}"
        for peer, ratio in record["speedup"].items()
    ]


def _size(text: str) -> tuple[int, int]:
    fields = text.split(",")
    if len(fields) != 2:
        raise argparse.ArgumentTypeError(f"must be B,H, got {text!r}")
    B, H = (arguments.count(field.strip()) for field in fields)
    return B, H


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead",
        description="One step of one sequence: ours, torch's cell and torch's module, interleaved.",
    )
    add = parser.add_argument
    add("--threads", type=arguments.count, metavar="N", help="default: torch's choice")
    add("--cells", nargs="+", choices=list(CELLS), default=list(CELLS), help="default: all")
    add("--modes", nargs="+", choices=list(MODES), default=list(MODES), help="default: all")
    add("--size", type=_size, metavar="B,H", default=(1, 64), help="default: 1,64")
    add("--autocast", choices=["bfloat16", "float16"], help="under torch.autocast to that dtype")
    add("--quick", action="store_true", help="few rounds")
    add("--rounds", type=arguments.count, metavar="N", help="at least (default: 25, quick 5)")
    arguments.add_common(parser, "overhead.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and writes it; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    arguments.begin(parser, args)
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = {
        "command": arguments.command(parser, args),
        "min_rounds": args.rounds or (5 if args.quick else 25),
        "budget_s": 0.0,
    }
    results: Record = {"machine": machine.facts(), "settings": settings, "records": []}
    print(tables.machine_line(results))
    print(
        f"{'cell':<5} {'T=1, B={}, H={}'.format(*args.size):<24} {'ours us':>8} {'peer':<18} "
        f"{'peer us':>8} {'speedup':>8}  quartiles"
    )
    options = {name: settings[name] for name in ("min_rounds", "budget_s")}
    options["dtype"] = args.autocast
    for cell in args.cells:
        for mode in args.modes:
            results["records"].append(record := measure(cell, args.size, mode, **options))
            print(*terminal_lines(record), sep="\n", flush=True)
    save(results, args.out / "overhead.json")
    print(f"written to {args.out}")
    return 1 if any(record["error"] is not None for record in results["records"]) else 0


if __name__ == "__main__":
    sys.exit(main())
