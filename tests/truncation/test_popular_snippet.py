"""TBPTT(k1, k2) as it is usually written, by walking back over kept graphs, and what it computes.

The snippet that goes round runs one step at a time, each from a detached copy of the last state,
and keeps the pairs (detached copy, new state) of the last k2 steps. Every k1 steps it calls
``backward(retain_graph=True)`` on the loss of the last step and then walks back, passing the
``.grad`` that arrives at each detached copy into the state before it. Where windows overlap by two
steps or more, k2 >= k1 + 2, its gradient is not that of TBPTT(k1, k2). The tests below show why,
and that nothing else is wrong with it:

- the copies' ``.grad`` are never cleared. The walk from the next loss finds at its copies what
  the walk before left there, adds to it, and passes the sum on: gradients are counted again, and
  those counted again are counted again. (What arrives at a window's first copy is passed to
  nothing, hence the two steps.) With ``.grad`` set to None before each walk, it is
  TBPTT(k1, k2, loss="last"), to rounding;
- the losses of the steps between are never used: it is loss="last", whatever one expects of it;
- when k1 does not divide T, the last T mod k1 steps have no loss at all.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common import Case, Results, assert_matches, parts, twin, whole
from fastbptt import TBPTT

CELLS = ("tanh", "relu", "gru", "lstm")
every_cell = pytest.mark.parametrize("cell", CELLS)


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum()


def walk_back(case: Case, k1: int, k2: int, *, clear: bool = False) -> Results:
    """The parameters' gradients by the snippet; ``clear``: with the ``.grad`` cleared in time."""
    module, (x, hx) = twin(case.module()), case.data()
    pairs = [(None, parts(hx))]
    for t, (x_t, target) in enumerate(zip(x, targets_of(case), strict=True)):
        before = tuple(state.detach().requires_grad_() for state in pairs[-1][1])
        output, after = module(x_t[None], whole(before))
        pairs = [*pairs, (before, parts(after))][-k2:]
        if (t + 1) % k1 > 0:
            continue
        if clear:
            for state in (state for before, _ in pairs for state in before or ()):
                state.grad = None
        loss_of(output[0], target).backward(retain_graph=True)
        for (_, reached), (left, _) in zip(pairs[-2::-1], pairs[:0:-1], strict=True):
            if not reached[0].requires_grad:
                break  # the state before step 0
            torch.autograd.backward(reached, [state.grad for state in left], retain_graph=True)
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def targets_of(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(case.T, case.B, case.H, generator=generator, dtype=torch.float64)


def ours(case: Case, truncation: TBPTT, steps: int | None = None) -> Results:
    """The same by one call of the module, with the losses of the first ``steps`` steps."""
    module, (x, hx) = case.module(truncation=truncation), case.data()
    output, _ = module(x, hx)
    loss_of(output[:steps], targets_of(case)[:steps]).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def brute_force(case: Case, k1: int, k2: int) -> Results:
    """torch's module run again on each window, its last step's loss alone."""
    module, (x, hx) = twin(case.module()), case.data()
    with torch.no_grad():
        entering = [hx]
        for x_t in x:
            entering.append(module(x_t[None], entering[-1])[1])
    for end in range(k1, case.T + 1, k1):
        begin = max(0, end - k2)
        output, _ = module(x[begin:end], entering[begin])
        loss_of(output[-1], targets_of(case)[end - 1]).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def difference(actual: Results, expected: Results) -> float:
    """The largest in any parameter, relative to that parameter's largest gradient."""
    return max(((actual[n] - g).abs().max() / g.abs().max()).item() for n, g in expected.items())


@every_cell
@pytest.mark.parametrize("k1, k2", [(1, 1), (2, 2), (3, 3), (4, 4), (12, 12), (1, 2), (3, 4)])
def test_right_where_windows_overlap_by_a_step_at_most(cell, k1, k2):
    case = Case(12, 3, 3, 4, 2, cell=cell)
    snippet = walk_back(case, k1, k2)
    assert_matches(snippet, brute_force(case, k1, k2))
    assert_matches(snippet, ours(case, TBPTT(k1, k2, "last")))


@every_cell
@pytest.mark.parametrize("k1, k2", [(1, 3), (1, 12), (2, 4), (3, 6), (4, 12)])
def test_wrong_where_they_overlap_by_more(cell, k1, k2):
    case = Case(12, 3, 3, 4, 2, cell=cell)
    expected = brute_force(case, k1, k2)
    assert_matches(ours(case, TBPTT(k1, k2, "last")), expected)
    # All that is wrong is that .grad is kept: cleared, it is the same gradient.
    assert_matches(walk_back(case, k1, k2, clear=True), expected)
    assert difference(walk_back(case, k1, k2), expected) > 0.01


def test_it_counts_gradients_again():
    """One number per step makes it plain: h_t = h_{t-1} + x_t with the sum of h as the loss.

    Each loss's gradient in h is 1 at every step that it reaches, so dL/dx_t is the number of
    windows that step t is in. The snippet's is more: the second walk finds 1 where the first was,
    and carries on with 2.
    """
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    k2, pairs = 3, [(None, torch.zeros(()))]
    for x_t in x:
        before = pairs[-1][1].detach().requires_grad_()
        pairs = [*pairs, (before, before + x_t)][-k2:]
        pairs[-1][1].backward(retain_graph=True)  # k1 = 1: a loss at every step
        for (_, reached), (left, _) in zip(pairs[-2::-1], pairs[:0:-1], strict=True):
            if not reached.requires_grad:
                break
            reached.backward(left.grad, retain_graph=True)
    # Windows that hold each step: 3 of the losses reach step 0, 2 step 1, and 1 step 2.
    assert x.grad.tolist() != [3.0, 2.0, 1.0]
    assert x.grad.tolist() == [4.0, 2.0, 1.0]


@every_cell
def test_losses_it_does_not_use(cell):
    case = Case(11, 3, 3, 4, 2, cell=cell)
    snippet = walk_back(case, 3, 3)  # losses at the steps 2, 5 and 8
    assert_matches(snippet, ours(case, TBPTT(3, 3, "last"), steps=9))
    assert difference(snippet, ours(case, TBPTT(3, 3, "last"))) > 0.01  # at 10 too
    assert difference(snippet, ours(case, TBPTT(3, 3))) > 0.01  # at every step
