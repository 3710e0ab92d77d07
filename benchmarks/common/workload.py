"""A row's tensors, the step that computes with them, and when two steps have computed the same."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

import fastbptt

from .rows import BACKWARD, RESET_RATE, Row
from .timing import Step

OURS = "fastbptt"


@dataclass(frozen=True)
class Cell:
    """A recurrent cell: its module here and in torch, and how many gates its weights hold."""

    label: str
    gates: int
    ours: Callable[..., nn.Module]
    torch: Callable[..., nn.Module]


CELLS = {
    "rnn": Cell("RNN (tanh)", 1, fastbptt.RNN, nn.RNN),
    "gru": Cell("GRU", 3, fastbptt.GRU, nn.GRU),
    "lstm": Cell("LSTM", 4, fastbptt.LSTM, nn.LSTM),
}


class Workload:
    """A row's tensors, the same for every contender: float32, fixed seed, torch's own weights."""

    def __init__(
        self,
        row: Row,
        mode: str,
        seed: int = 0,
        device: torch.device | str = "cpu",
        layers: int = 1,
    ) -> None:
        self.row, self.mode, self.cell, self.layers = row, mode, CELLS[row.cell], layers
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.weights = self.cell.torch(row.H, row.H, layers, device=device).state_dict()
            self.input = torch.randn(row.T, row.B, row.H, device=device)
            self.grad_output = torch.randn(row.T, row.B, row.H, device=device)
            chances = torch.rand(row.T, row.B, device=device) if row.resets else None
        self.resets = None if chances is None else chances < RESET_RATE

    def to(self, dtype: torch.dtype) -> Workload:
        """The same values, rounded to another dtype."""
        other = copy.copy(self)
        other.weights = {name: weight.to(dtype) for name, weight in self.weights.items()}
        other.input, other.grad_output = self.input.to(dtype), self.grad_output.to(dtype)
        return other

    def load(self, make: Callable[..., nn.Module], **kwargs: object) -> nn.Module:
        """A module with this workload's weights."""
        where = {"device": self.input.device, "dtype": self.input.dtype}
        module = make(self.row.H, self.row.H, self.layers, **where, **kwargs)
        module.load_state_dict(self.weights)
        return module


Results = dict[str, Tensor | None]
State = Tensor | tuple[Tensor, ...]  # h_n, or h_n and c_n


class Inputs(Protocol):
    """What a step is given, such as a :class:`Workload`."""

    mode: str
    input: Tensor
    grad_output: Tensor


class Contender(Step, Protocol):
    """A step whose results can be checked."""

    def results(self) -> Results: ...


class ModuleStep:
    """A recurrent module, or a loop around one, in training or inference.

    As in a training step, the outputs and their graph die within the timed call.
    """

    def __init__(
        self,
        work: Inputs,
        module: nn.Module,
        forward: Callable[[Tensor], tuple[Tensor, State]] | None = None,
    ) -> None:
        self.module, self.forward = module, forward or module
        self.backward = work.mode == BACKWARD
        self.input = work.input.clone().requires_grad_(self.backward)
        self.grad_output = work.grad_output

    def clear(self) -> None:
        self.input.grad = None
        self.module.zero_grad(set_to_none=True)

    def run(self) -> tuple[Tensor, State]:
        output, state = self.forward(self.input)
        if self.backward:
            output.backward(self.grad_output)
        return output, state

    def results(self) -> Results:
        """Everything one run computes, by name: outputs and, in training, every gradient."""
        self.clear()
        output, state = self.run()
        states = state if isinstance(state, tuple) else (state,)
        found: Results = {"output": output.detach()}
        found |= {name: s.detach() for name, s in zip(("h_n", "c_n"), states, strict=False)}
        if self.backward:
            leaves = {"input": self.input, **dict(self.module.named_parameters())}
            found |= {f"d{name}": leaf.grad for name, leaf in leaves.items()}
        return found


class TwiceStep:
    """A module differentiated twice: along cotangents of each gradient, the gradients of those."""

    def __init__(
        self,
        work: Inputs,
        module: nn.Module,
        forward: Callable[[Tensor], tuple[Tensor, State]] | None = None,
    ) -> None:
        self.module, self.forward = module, forward or module
        self.input = work.input.clone().requires_grad_()
        self.grad_output = work.grad_output.clone().requires_grad_()
        generator = torch.Generator().manual_seed(1)
        self.along = [
            torch.randn(leaf.shape, generator=generator).to(leaf) for leaf in self._leaves()
        ]

    def _leaves(self) -> list[Tensor]:
        return [self.input, *self.module.parameters()]

    def clear(self) -> None:
        pass

    def run(self) -> Results:
        leaves = self._leaves()
        output, _ = self.forward(self.input)
        first = torch.autograd.grad(output, leaves, self.grad_output, create_graph=True)
        second = torch.autograd.grad(first, [self.grad_output, *leaves], self.along)
        names = ["grad_output", "input", *(name for name, _ in self.module.named_parameters())]
        return dict(zip(names, second, strict=True))

    def results(self) -> Results:
        """The second gradients, by name."""
        return self.run()


class Mismatch(Exception):
    """Ours and a peer do not compute the same: there is nothing to time."""


def tolerance(row: Row) -> float:
    """How far two correct float32 programs may differ, relative to the largest value.

    They add the same terms in different orders: I + H of them in an output, T B in a weight's
    gradient. The rounding of n terms grows as sqrt(n) eps; 8 is for the worst of many elements
    and for what the recurrence hands on. A step left out of the T B shows as about 1 / sqrt(T B).
    """
    terms = max(row.T * row.B, 2 * row.H)
    return 8 * torch.finfo(torch.float32).eps * math.sqrt(terms)


def check(ours: Results, peer: Results, limit: float, name: str) -> None:
    """Holds every result of ours against the peer's, by name.

    Raises:
        Mismatch: a result is missing, has another shape, is not finite, or is off by more than
            ``limit`` times the peer's largest magnitude, or than ``limit`` where that is zero.
    """
    if ours.keys() != peer.keys():
        raise Mismatch(f"results are {sorted(ours)}, those of {name} {sorted(peer)}")
    for key, expected in peer.items():
        got = ours[key]
        if got is None or expected is None:
            raise Mismatch(f"{key} is {got}, that of {name} {expected}")
        if got.shape != expected.shape:
            raise Mismatch(f"{key} is {list(got.shape)}, that of {name} {list(expected.shape)}")
        error, scale = (got - expected).abs().max().item(), expected.abs().max().item()
        error = error / scale if scale else error  # zeros: of W_hh's gradient where T = 1
        if not error <= limit:  # a NaN is a mismatch too
            raise Mismatch(f"{key} is off by {error:.2g} from {name}, allowed is {limit:.2g}")
