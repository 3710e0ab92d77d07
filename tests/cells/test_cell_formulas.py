"""Formulas of the literature: the traced program is the function, and its derivative."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import brute
import fastbptt
from cell_formulas import FORMULAS

NAMES = [cell.__name__ for cell in FORMULAS]


def values_of(cell: fastbptt.cell.Cell, seed: int = 0) -> dict[tuple, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(kind: str) -> Tensor:
        value = torch.randn(5, 7, generator=generator, dtype=torch.float64)
        value = value.abs() + 0.3 if kind == "extra" else value
        return value.requires_grad_()

    return {leaf: draw(leaf.kind) for leaf in cell.program.leaves}


def test_there_are_twenty_with_sources():
    assert len(set(NAMES)) == len(NAMES) >= 20
    assert all(any(year in cell.__doc__ for year in ("20", "19")) for cell in FORMULAS)


@pytest.mark.parametrize("cell", FORMULAS, ids=NAMES)
def test_program_is_the_function(cell):
    values = values_of(cell)
    kinds = {
        k: [v for leaf, v in values.items() if leaf.kind == k] for k in ("pre", "rec", "state")
    }
    extras = {leaf.key: v for leaf, v in values.items() if leaf.kind == "extra"}
    expected = cell(*kinds.values(), **extras)
    got = cell.program.evaluate(values)
    grads = [torch.cos(torch.arange(35.0, dtype=torch.float64) + i).view(5, 7) for i in range(9)]

    def gradients(results):
        return torch.autograd.grad(
            results,
            values.values(),
            grads[: len(results)],
            allow_unused=True,
            materialize_grads=True,
        )

    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    for a, b in zip(gradients(got), gradients(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.slow(12)
@pytest.mark.parametrize("cell", FORMULAS, ids=NAMES)
def test_network_is_a_loop_over_the_function(cell, steps):
    """Arguments of the formulas alternate between parameters, inputs per step and numbers."""
    kinds = [torch.nn.Parameter(torch.full((4,), 0.4)), None, 0.7]
    given = {name: kinds[i % 3] or name for i, name in enumerate(cell.extras) if i % 3}
    given |= {name: kinds[0] for i, name in enumerate(cell.extras) if i % 3 == 0}
    torch.manual_seed(1)
    net = fastbptt.Recurrent(cell, 3, 4, 2, bidirectional=True, dtype=torch.float64, **given)
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    hx = [torch.rand(4, 2, 4, dtype=torch.float64) for _ in range(cell.states)]
    inputs = {n: torch.rand(4, 6, 2, 1, dtype=torch.float64) for n in given.values() if n in given}

    def step(layer, x, states, extras):
        rec = layer.rec(states[cell.recurrent]) if cell.has_rec else [0.0] * cell.gates
        return cell.function(layer.pre(x), rec, states, **extras)

    output, last, every = net(
        x, hx if cell.states > 1 else hx[0], truncation=3, return_states=True, **inputs
    )
    results = [output, *((last, every) if cell.states == 1 else (*last, *every))]
    output, last, every = brute.run(net, step, x, hx, 3, None, inputs)
    expected = [output, *last, *every]

    def gradients(results):
        loss = sum(result.sin().sum() for result in results)
        return torch.autograd.grad(loss, net.parameters(), allow_unused=True)

    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    for a, b in zip(gradients(results), gradients(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
