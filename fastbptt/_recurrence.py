"""A compiled cell's layer for autograd, in the place of the loops' ``unroll``.

A gradient of a gradient is that of the plain loop, which is run again for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastbptt import _compiled, _loops, ops
from fastbptt.cell import Cell

OptionalTensor = Tensor | None
# The program's arguments as places among the loops' ones, and as gates of those that are per gate.
Order = list[tuple[int, int | None]]


def unroll_of(cell: Cell, names: Sequence[str], input: Tensor) -> Callable:
    """What runs a layer in one direction over such an input: compiled steps, or a plain loop.

    Args:
        cell: the cell.
        names: its arguments in the order in which the loops give them.
        input: the call's.
    """
    if (
        ops.is_watched(input)
        or forward_ad._current_level >= 0
        or torch._C._is_any_autocast_enabled()
        or input.numel() == 0
    ):
        return _loops.unroll
    variant = _compiled.variant(input.device)
    if variant is None:
        return _loops.unroll
    key = input.dtype, variant
    if key not in cell.compiled:
        cell.compiled[key] = _compiled.layer(
            cell.program, input.dtype, input.device, cell.recurrent
        )
    layer = cell.compiled[key]
    if layer is None:
        return _loops.unroll
    order: Order = []
    for name in cell.extras:
        gates = range(cell.gates) if name in cell.per_gate else [None]
        order += [(names.index(name), gate) for gate in gates]
    return partial(_unroll, layer, order)


def _unroll(
    layer: _compiled.Layer,
    order: Order,
    step: Callable,
    input: Tensor,
    states: tuple[Tensor, ...],
    weights: Sequence[OptionalTensor],
    per_step: _loops.PerStep,
    reverse: bool = False,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """As :func:`fastbptt._loops.unroll`, whose arguments they are from ``step`` on."""
    of_cell = (*weights[4:], *per_step.inputs)
    given = (input, *weights[:4], *states, *of_cell, *per_step.reset_to)
    if not _fit(given, input):
        return _loops.unroll(step, input, states, weights, per_step, reverse)
    run = _Run(layer, order, step, per_step, reverse, len(weights), torch.is_grad_enabled())
    results = _Recurrence.apply(run, *given)
    return results[: len(states)], results[len(states) :]


_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})


def _fit(tensors: Sequence[OptionalTensor], input: Tensor) -> bool:
    """Whether they are plain tensors like the input, numbers or None."""
    if not _PLAIN.issuperset(map(type, tensors)):
        return False
    dtype, device = input.dtype, input.device
    return all(
        t is None or (t.dtype == dtype and t.device == device) or t.dim() == 0 for t in tensors
    )


class _Run(NamedTuple):
    """What a call of a layer is beside its tensors."""

    layer: _compiled.Layer
    order: Order
    step: Callable
    per_step: _loops.PerStep
    reverse: bool
    num_weights: int
    keeps: bool

    def arguments(self, given: Sequence[OptionalTensor]) -> _compiled.Arguments:
        """Those of the layer, of (input, w_ih, w_hh, b_ih, b_hh, states, what the cell takes)."""
        count = self.layer.program.states
        initial, values = given[5 : 5 + count], given[5 + count :]
        return _compiled.Arguments(
            *given[:5],
            initial,
            [_of_gate(values[i], gate) for i, gate in self.order],
            self.per_step.resets,
            self.per_step.batch_sizes,
            -1 if self.reverse else 1,
            given[len(given) - len(self.per_step.reset_to) :],
        )

    def plain(self, *given: OptionalTensor) -> tuple[Tensor, ...]:
        """The states and the last ones, by the loop."""
        count = 5 + self.layer.program.states
        split, end = count + self.num_weights - 4, len(given) - len(self.per_step.reset_to)
        weights = given[1:5] + given[count:split]
        own = self.per_step._replace(inputs=given[split:end], reset_to=given[end:])
        every, last = _loops.unroll(self.step, given[0], given[5:count], weights, own, self.reverse)
        return *every, *last


def _of_gate(value: Tensor, gate: int | None) -> Tensor:
    return value if gate is None or value.dim() == 0 else value[gate]


class _Recurrence(torch.autograd.Function):
    """All states of all steps and the last ones, of the tensors that ``_Run.arguments`` takes."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *given: OptionalTensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        keep = run.keeps and any(ctx.needs_input_grad)
        states, last, kept = run.layer.forward(run.arguments(given), keep)
        ctx.run = run
        if keep:
            ctx.save_for_backward(*given, *states, *kept)
        return *states, *last

    @staticmethod
    def backward(ctx: Any, *grads: OptionalTensor) -> tuple[OptionalTensor, ...]:
        run, count = ctx.run, ctx.run.layer.program.states
        given = ctx.saved_tensors[: -count - 2]
        states, kept = ctx.saved_tensors[-count - 2 : -2], ctx.saved_tensors[-2:]
        wants, end = ctx.needs_input_grad[1:], len(given) - len(run.per_step.reset_to)
        if torch.is_grad_enabled():
            return None, *_differentiable(run, given, wants, grads)
        found = run.layer.backward(
            run.arguments(given),
            states,
            _compiled.Kept(*kept),
            grads[:count],
            grads[count:],
            run.per_step.kappa,
            run.per_step.clip_grad,
            _compiled.Gradients(
                *wants[:5],
                wants[5 : 5 + count],
                [wants[5 + count + i] for i, _ in run.order],
                wants[end:],
            ),
        )
        values = given[5 + count : end]
        of_values: list[OptionalTensor] = [None] * len(values)
        for (i, gate), gradient in zip(run.order, found.extras, strict=True):
            if gradient is None:
                continue
            gradient = gradient.sum_to_size(_of_gate(values[i], gate).shape)
            if gate is None:
                of_values[i] = gradient
                continue
            if of_values[i] is None:
                of_values[i] = torch.empty_like(values[i])
            of_values[i][gate] = gradient
        return None, *found[:5], *found.initial, *of_values, *found.reset_to


def _differentiable(
    run: _Run,
    given: Sequence[OptionalTensor],
    wants: Sequence[bool],
    grads: Sequence[OptionalTensor],
) -> list[OptionalTensor]:
    results = run.plain(*given)
    there = [
        (result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None
    ]
    asked = [tensor for tensor, wants_it in zip(given, wants, strict=True) if wants_it]
    found = torch.autograd.grad(
        [result for result, _ in there],
        asked,
        [grad for _, grad in there],
        create_graph=True,
        allow_unused=True,
    )
    gradients = iter(found)
    return [next(gradients) if wants_it else None for wants_it in wants]
