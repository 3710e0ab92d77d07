"""How layers are used beyond one layer over one sequence, as data, and the networks that do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..common.rows import BACKWARD, MODES, Row
from ..common.workload import CELLS, ModuleStep, State, tolerance


@dataclass(frozen=True)
class Use:
    """Layers of given widths over T steps of B sequences, and in which way."""

    T: int
    B: int
    widths: tuple[int, ...]  # of the input and then of each layer; one module where all are equal
    cells: tuple[str, ...] = tuple(CELLS)
    modes: tuple[str, ...] = MODES
    stepwise: bool = False  # T calls of one step, each from the state of the one before
    bidirectional: bool = False
    ragged: bool = False  # packed sequences of T to T / 4 steps
    dtype: str | None = None  # of autocast
    busy: int = 0  # other processes that compute meanwhile

    @property
    def label(self) -> str:
        """Such as ``16 x 1,1,64`` for T steps one by one, or ``70,8,400-1152-400``."""
        widths = self.widths[1:] if len(set(self.widths)) == 1 else self.widths
        first = f"{self.T} x 1" if self.stepwise else f"{self.T}"
        words = [f"{first},{self.B},{'-'.join(map(str, widths))}"]
        words += ["bidirectional"] * self.bidirectional + ["packed"] * self.ragged
        words += [f"autocast {self.dtype}"] if self.dtype else []
        words += [f"{self.busy} busy"] if self.busy else []
        return " ".join(words)


SUITES: dict[str, tuple[Use, ...]] = {
    "steps": tuple(
        Use(16, B, (H, H), stepwise=True, dtype=dtype)
        for dtype, H, B in product((None, "bfloat16"), (64, 256, 512, 1024), (1, 16))
    ),
    "stacks": (Use(128, 1, (128,) * 4),),
    "bidirectional": (Use(128, 1, (128, 128), bidirectional=True),),
    "packed": (
        Use(128, 16, (128, 128), ragged=True),
        Use(128, 64, (256, 256), ragged=True),
    ),
    "awd-lstm": tuple(Use(70, B, (400, 1152, 1152, 400), cells=("lstm",)) for B in (8, 32)),
    "busy": tuple(
        Use(128, 16, (H, H), cells=cells, modes=(BACKWARD,), busy=busy)
        for H, cells in ((128, ("gru",)), (256, tuple(CELLS)))
        for busy in (1, 2)
    ),
}


def _batch_sizes(use: Use) -> Tensor:
    """Of packed sequences: how many of them have a step t."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint((use.T + 3) // 4, use.T + 1, (use.B,), generator=generator)
    lengths[0] = use.T
    return (lengths > torch.arange(use.T).unsqueeze(1)).sum(1)


class Network(nn.Module):
    """A use's layers, by torch's modules or ours: parameters have the same names in both."""

    def __init__(self, use: Use, make: Callable[..., nn.Module]) -> None:
        super().__init__()
        sizes = list(pairwise(use.widths))
        if len(set(use.widths)) == 1:
            options = {"bidirectional": use.bidirectional}
            layers = [make(*sizes[0], len(sizes), **options)]
        else:
            layers = [make(*size) for size in sizes]
        self.layers, self.stepwise = nn.ModuleList(layers), use.stepwise
        self.batch_sizes = _batch_sizes(use) if use.ragged else None

    def forward(self, input: Tensor) -> tuple[Tensor, State]:
        """Output and the last module's final state; packed sequences are given by their data."""
        if self.batch_sizes is not None:
            input = PackedSequence(input, self.batch_sizes)
        for layer in self.layers:
            input, state = self._steps(layer, input) if self.stepwise else layer(input)
        return input.data if isinstance(input, PackedSequence) else input, state

    @staticmethod
    def _steps(layer: nn.Module, input: Tensor) -> tuple[Tensor, State]:
        state, outputs = None, []
        for x in input.split(1):
            output, state = layer(x, state)
            outputs.append(output)
        return torch.cat(outputs), state


@dataclass
class Given:
    """What both steps are given."""

    mode: str
    input: Tensor
    grad_output: Tensor


def build(use: Use, cell: str, mode: str) -> tuple[ModuleStep, ModuleStep]:
    """Ours and torch's, with the same weights; seeded. To be called in the use's surroundings."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = Network(use, CELLS[cell].torch)
        shape = (use.T, use.B) if theirs.batch_sizes is None else (int(theirs.batch_sizes.sum()),)
        input = torch.randn(*shape, use.widths[0])
        grad_output = torch.randn(*shape, use.widths[-1] * (1 + use.bidirectional))
    ours = Network(use, CELLS[cell].ours)
    ours.load_state_dict(theirs.state_dict())
    given = Given(mode, input, grad_output)
    return ModuleStep(given, ours), ModuleStep(given, theirs)


def allowed(use: Use) -> float:
    """How far two correct programs may differ, relative to the largest value.

    In float32 as in a row of that size. Under autocast every step rounds the state, which the next
    one goes on from: the rounding of T steps grows as sqrt(T), and 2 is for the worst of many.
    """
    if use.dtype is None:
        return tolerance(Row("", use.T, use.B, max(use.widths)))
    return 2 * torch.finfo(getattr(torch, use.dtype)).eps * use.T**0.5


def select(
    suites: Sequence[str], cells: Sequence[str], filters: Sequence[str] = ()
) -> list[tuple[str, Use, str, str]]:
    """Suite, use, cell and mode of what ``suite cell label mode`` one of the filters is part of."""
    found = [
        (suite, use, cell, mode)
        for suite in suites
        for use in SUITES[suite]
        for cell in cells
        if cell in use.cells
        for mode in use.modes
    ]
    wanted = [text.lower() for text in filters]
    return [
        (suite, use, cell, mode)
        for suite, use, cell, mode in found
        if not wanted or any(w in f"{suite} {cell} {use.label} {mode}".lower() for w in wanted)
    ]
