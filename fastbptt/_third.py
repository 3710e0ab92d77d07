"""The passes that give second derivatives, as plain loops: ordinary autograd gives third ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from fastbptt import reference
from fastbptt._loops import PerStep, stack_layers
from fastbptt._points import OptionalTensors, Point

_CELLS = {"gru": reference.gru_cell, "lstm": reference.lstm_cell}
_warned = False


def _warn() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "fastbptt computes third derivatives by plain PyTorch loops, slowly: "
            "its kernels give first and second ones",
            stacklevel=4,
        )


def _by_loops(function: Callable) -> Callable:
    """For a function computed by loops: warns once, and has autocast round nothing."""

    @wraps(function)
    def computed(*args: Any) -> Any:
        _warn()
        if not torch._C._is_any_autocast_enabled():
            return function(*args)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args)

    return computed


def _network(point: Point, *primals: Tensor | None) -> tuple[Tensor, ...]:
    """Output, h_n and, of an LSTM, c_n, as functions of the primals. Windows lie side by side."""
    net, masks = point.net, point.masks
    directions = 2 if net.bidirectional else 1
    input, hx, cx, *weights = primals
    count = net.num_weights // (net.num_layers * directions)
    split = [weights[i : i + count] for i in range(0, len(weights), count)]
    if not net.has_biases:
        split = [[w_ih, w_hh, None, None, *rest] for w_ih, w_hh, *rest in split]
    cell = _CELLS.get(net.cell) or partial(reference.rnn_cell, nonlinearity=net.cell)
    B, w_hh = point.num_sequences(), split[0][1]
    sizes = (w_hh.shape[1], w_hh.shape[0] // 4)[: net.num_results - 1]
    states = tuple(
        input.new_zeros(len(split), B, size) if given is None else given
        for given, size in zip((hx, cx)[: len(sizes)], sizes, strict=True)
    )

    def run(input: Tensor, states: tuple[Tensor, ...], tensors: list[Any]) -> Any:
        """Of tensors whose time comes first; after the input kappa, resets and masks."""
        kappa, resets, *masks = tensors
        if net.k1 > 0:
            cuts = [0.0 if t > 0 and t % net.k1 == 0 else 1.0 for t in range(len(input))]
            cut = torch.tensor(cuts, dtype=input.dtype, device=input.device)[:, None]
            kappa = cut.expand(input.shape[:2]) if kappa is None else kappa * cut
        per_step = PerStep(kappa, resets, tuple(masks))
        return stack_layers(cell, split, directions, input, states, per_step)

    others = (point.kappa, point.resets, *masks)
    if point.batch_sizes is None:
        turned = [
            t.transpose(0, 1) if net.batch_first and t is not None else t for t in (input, *others)
        ]
        output, states = run(turned[0], states, turned[1:])
        return output.transpose(0, 1) if net.batch_first else output, *states
    # Every sequence of a packed input by itself.
    batch_sizes = point.batch_sizes.tolist()
    starts = [sum(batch_sizes[:t]) for t in range(len(batch_sizes))]
    all_rows, outputs, finals = [], [], []
    for b in range(B):
        rows = [start + b for start, size in zip(starts, batch_sizes, strict=True) if b < size]
        own = [None if t is None else t[rows].unsqueeze(1) for t in (input, *others)]
        output, last = run(own[0], tuple(state[:, b : b + 1] for state in states), own[1:])
        all_rows += rows
        outputs.append(output.squeeze(1))
        finals.append(last)
    back = torch.tensor(all_rows, device=input.device).argsort()
    states = tuple(torch.cat(of_all, dim=1) for of_all in zip(*finals, strict=True))
    return torch.cat(outputs)[back], *states


def _zeros_for_none(tensors: OptionalTensors, like: OptionalTensors) -> tuple[Tensor | None, ...]:
    return tuple(
        torch.zeros_like(x) if t is None and x is not None else t
        for t, x in zip(tensors, like, strict=True)
    )


def _present(tensors: OptionalTensors) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in tensors if tensor is not None)


def _second(
    point: Point,
    grads: OptionalTensors,
    grads_t: OptionalTensors,
    primals: OptionalTensors,
    tangents: OptionalTensors,
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """J for each result, D for each primal (None for one that is not there)."""
    is_there = [primal is not None for primal in primals]

    def forward(*there: Tensor) -> tuple[Tensor, ...]:
        given = iter(there)
        return _network(point, *(next(given) if each else None for each in is_there))

    def gradients(grads: tuple[Tensor, ...], there: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.func.vjp(forward, *there)[1](grads)

    there = _present(primals)
    results = forward(*there)
    count = len(results)
    has_grads_t = any(g is not None for g in grads_t)
    grads = _zeros_for_none(grads[:count], results)
    grads_t = _zeros_for_none(grads_t[:count], results)
    tangents = _present(_zeros_for_none(tangents, primals))
    # The gradients of <G(g; p), t>: in g it is J, in p it is D.
    _, pull = torch.func.vjp(gradients, grads, there)
    of_results, of_primals = pull(tangents)
    if has_grads_t:
        of_primals = [a + b for a, b in zip(of_primals, gradients(grads_t, there), strict=True)]
    given = iter(of_primals)
    return tuple(of_results), tuple(next(given) if each else None for each in is_there)


class _Flat:
    """A pass as a function of those of its arguments that are there, for torch.func."""

    def __init__(self, compute: Callable, *parts: OptionalTensors):
        self.compute = compute
        self.sizes = [len(part) for part in parts]
        self.is_there = [tensor is not None for part in parts for tensor in part]
        self.tensors = _present([tensor for part in parts for tensor in part])

    def parts(self, there: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Of what belongs to each tensor that is there, the parts; None for the others."""
        given = iter(there)
        each = [next(given) if is_there else None for is_there in self.is_there]
        ends = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes))]
        return [tuple(each[end - n : end]) for end, n in zip(ends, self.sizes, strict=True)]

    def __call__(self, *there: Tensor) -> tuple[Tensor, ...]:
        return self.compute(*self.parts(there))

    def tangent(self, *parts_t: OptionalTensors) -> tuple[Tensor, ...]:
        """That of the results; parts_t: those of the arguments, None for zeros."""
        each = [t for part in parts_t for t in part]
        of_there = [t for t, is_there in zip(each, self.is_there, strict=True) if is_there]
        return torch.func.jvp(self, self.tensors, _zeros_for_none(of_there, self.tensors))[1]


def _second_of(point: Point) -> Callable[..., tuple[Tensor, ...]]:
    """What Second computes, as a function of its parts."""

    def compute(
        grads: OptionalTensors,
        grads_t: OptionalTensors,
        primals: OptionalTensors,
        tangents: OptionalTensors,
    ) -> tuple[Any, ...]:
        of_results, of_primals = _second(point, grads, grads_t, primals, tangents)
        needed = (d for d, n in zip(of_primals, point.net.needs, strict=True) if n)
        return *of_results, *needed

    return compute


@_by_loops
def gradients_of_second(
    point: Point,
    grads: OptionalTensors,
    grads_t: OptionalTensors,
    tangents: OptionalTensors,
    cotangents: OptionalTensors,
) -> list[tuple[Tensor | None, ...]]:
    """For each part of Second's arguments the gradients, given those of its results."""
    function = _Flat(_second_of(point), grads, grads_t, point.primals, tangents)
    results, pull = torch.func.vjp(function, *function.tensors)
    return function.parts(pull(_zeros_for_none(cotangents, results)))


@_by_loops
def tangent_of_second(
    point: Point,
    grads: OptionalTensors,
    grads_t: OptionalTensors,
    tangents: OptionalTensors,
    *parts_t: OptionalTensors,
) -> tuple[Tensor, ...]:
    """The tangents of what Second gives, along those of its parts."""
    function = _Flat(_second_of(point), grads, grads_t, point.primals, tangents)
    return function.tangent(*parts_t)


@_by_loops
def tangent_of_tangents(
    point: Point,
    tangents: OptionalTensors,
    primals_t: OptionalTensors,
    tangents_t: OptionalTensors,
) -> tuple[Tensor, ...]:
    """The tangents of what Tangents gives, along those of its parts."""

    def compute(primals: OptionalTensors, tangents: OptionalTensors) -> tuple[Tensor, ...]:
        return _second(point, [None] * 3, [None] * 3, primals, tangents)[0]

    return _Flat(compute, point.primals, tangents).tangent(primals_t, tangents_t)
