"""Ours and torch's own ways to the same results: who is measured everywhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from fastbptt.truncation import TBPTT, Chunked, Sliding

from .rows import MODES, Row
from .workload import (
    OURS,
    Contender,
    Mismatch,
    ModuleStep,
    Results,
    State,
    Workload,
    check,
    tolerance,
)

TORCH = "torch"  # its module, and the loops around it that are written by hand


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

    kind: str  # TORCH, or what a user of it calls its own
    applies: Callable[[Row], bool]
    label: Callable[[Row], str]
    build: Callable[[Workload], Contender]
    modes: tuple[str, ...] = MODES  # that it can do


TORCH_PEERS = (
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
)


def contenders(work: Workload, peers: Sequence[Peer] = TORCH_PEERS) -> dict[str, Contender]:
    """Ours and, after it, those of the peers that apply to the row, by their labels."""
    chosen = [peer for peer in peers if peer.applies(work.row) and work.mode in peer.modes]
    return {OURS: _ours(work), **{peer.label(work.row): peer.build(work) for peer in chosen}}


def results_of_ours(step: Contender) -> Results:
    """The results of a step of ours.

    Raises:
        Mismatch: it warns that it is not what runs.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = step.results()
    if caught:  # such as a fallback to torch: its time would not be ours
        raise Mismatch(f"{OURS} warned: {caught[0].message}")
    return results


def build(work: Workload, peers: Sequence[Peer] = TORCH_PEERS) -> dict[str, Contender]:
    """Every contender of a row by its label, ours first, checked to agree.

    Raises:
        Mismatch: ours does not agree with a peer, or warns that it is not what runs.
    """
    steps = contenders(work, peers)
    results = results_of_ours(steps[OURS])
    for name in list(steps)[1:]:
        check(results, steps[name].results(), tolerance(work.row), name)
    return steps
