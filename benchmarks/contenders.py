"""Who is measured: ours and its peers, each as a step that can be run and checked."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

import fastbptt
from fastbptt.truncation import TBPTT, Chunked, Sliding

from . import compiled_loop, jax_scan
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


class Contender(Step, Protocol):
    """A step whose results can be checked."""

    def results(self) -> Results: ...


class ModuleStep:
    """A recurrent module, or a loop around one, in training or inference.

    As in a training step, the outputs and their graph die within the timed call.
    """

    def __init__(
        self,
        work: Workload,
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


def _ours(work: Workload) -> ModuleStep:
    module = work.load(work.cell.ours, truncation=work.row.truncation)
    return ModuleStep(work, module, partial(module, resets=work.resets))


def _torch_module(work: Workload) -> ModuleStep:
    return ModuleStep(work, work.load(work.cell.torch))


def _detach_loop(work: Workload) -> ModuleStep:
    """Truncated BPTT as it is written by hand: a call a chunk, ``detach()`` in between."""
    module, chunk = work.load(work.cell.torch), work.row.truncation.k

    def forward(input: Tensor) -> tuple[Tensor, State]:
        state, outputs = None, []
        for part in input.split(chunk):
            output, state = module(part, state)
            state = tuple(s.detach() for s in state) if type(state) is tuple else state.detach()
            outputs.append(output)
        return torch.cat(outputs), state

    return ModuleStep(work, module, forward)


def _window_loop(work: Workload) -> ModuleStep:
    """TBPTT(k1, k2) by hand: a call a window, from the detached state of a pass over all steps."""
    module, (k1, k2) = work.load(work.cell.torch), (work.row.truncation.k1, work.row.truncation.k2)
    firsts = range(0, work.row.T, k1)  # steps of the windows' first losses
    begins = [max(0, first - (k2 - k1)) for first in firsts]

    def forward(input: Tensor) -> tuple[Tensor, State]:
        states: dict[int, State | None] = {0: None}
        with torch.no_grad():
            for begin, end in pairwise(sorted(set(begins))):
                _, states[end] = module(input[begin:end], states[begin])
        outputs = []
        for begin, first in zip(begins, firsts, strict=True):
            output, state = module(input[begin : first + k1], states[begin])
            outputs.append(output[first - begin :])
        return torch.cat(outputs), state

    return ModuleStep(work, module, forward)


def _step_loop(work: Workload) -> ModuleStep:
    """Resets by hand: a call a step, the state multiplied by 0 where an episode begins."""
    module, kept = work.load(work.cell.torch), 1 - work.resets.to(work.input.dtype).unsqueeze(-1)

    def forward(input: Tensor) -> tuple[Tensor, State]:
        output, state = module(input[:1])
        outputs = [output]
        for t in range(1, work.row.T):
            if isinstance(state, tuple):
                state = tuple(s * kept[t] for s in state)
            else:
                state = state * kept[t]
            output, state = module(input[t : t + 1], state)
            outputs.append(output)
        return torch.cat(outputs), state

    return ModuleStep(work, module, forward)


@dataclass(frozen=True)
class Peer:
    """Something else that computes the same results, for the rows where it applies."""

    kind: str  # one of PEER_KINDS
    applies: Callable[[Row], bool]
    label: Callable[[Row], str]
    build: Callable[[Workload], Contender]


def _compiled_loop(work: Workload) -> ModuleStep:
    module = work.load(work.cell.torch)
    return ModuleStep(work, module, compiled_loop.forward(work.row.cell, module))


TORCH, JAX, COMPILE = PEER_KINDS = ("torch", "jax", "compile")

PEERS = (
    Peer(
        kind=TORCH,
        applies=lambda row: row.truncation is None and not row.resets,
        label=lambda row: f"torch.nn.{row.cell.upper()}",
        build=_torch_module,
    ),
    Peer(
        kind=TORCH,
        applies=lambda row: isinstance(row.truncation, Chunked),
        label=lambda row: "detach() loop",
        build=_detach_loop,
    ),
    Peer(
        kind=TORCH,
        applies=lambda row: isinstance(row.truncation, TBPTT | Sliding),
        label=lambda row: "window loop",
        build=_window_loop,
    ),
    Peer(
        kind=TORCH,
        applies=lambda row: row.resets,
        label=lambda row: "step loop",
        build=_step_loop,
    ),
    Peer(
        kind=JAX,
        applies=lambda row: (
            not row.resets and (row.truncation is None or isinstance(row.truncation, Chunked))
        ),
        label=lambda row: jax_scan.LABEL,
        build=jax_scan.ScanStep,
    ),
    Peer(
        kind=COMPILE,
        applies=lambda row: (
            row.truncation is None and not row.resets and row.T <= compiled_loop.MAX_STEPS
        ),
        label=lambda row: compiled_loop.LABEL,
        build=_compiled_loop,
    ),
)


def contenders(work: Workload, kinds: Container[str] = (TORCH,)) -> dict[str, Contender]:
    """Ours and, after it, the row's peers of these kinds, by their labels."""
    peers = [peer for peer in PEERS if peer.kind in kinds and peer.applies(work.row)]
    return {OURS: _ours(work), **{peer.label(work.row): peer.build(work) for peer in peers}}


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


def build(work: Workload, kinds: Container[str] = (TORCH,)) -> dict[str, Contender]:
    """Every contender of a row by its label, ours first, checked to agree.

    Raises:
        Mismatch: ours does not agree with a peer, or warns that it is not what runs.
    """
    steps = contenders(work, kinds)
    ours, *peers = steps
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = steps[ours].results()
    if caught:  # such as a fallback to torch: its time would not be ours
        raise Mismatch(f"{ours} warned: {caught[0].message}")
    for peer in peers:
        check(results, steps[peer].results(), tolerance(work.row), peer)
    return steps
