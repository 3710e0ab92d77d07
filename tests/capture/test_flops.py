"""FlopCounterMode: as many operations as it finds in torch's modules, where it finds them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastbptt
from common import Case, detach_loop, parts, python, tensors_of, twin, whole


def count(case: Case, module, call=None, grads=(False, False)) -> tuple[int, int]:
    """Of the forward pass, and of both; ``grads``: whether input and states have gradients."""
    x, hx = case.data()
    data = tensors_of((x, None))[0].requires_grad_(grads[0])
    if case.lengths is not None:
        x = torch.nn.utils.rnn.PackedSequence(data, *x[1:])
    hx = whole([state.requires_grad_(grads[1]) for state in parts(hx)])
    with FlopCounterMode(display=False) as counter:
        output = tensors_of((call or module)(x, hx))[0]
        forward = counter.get_total_flops()
        output.sum().backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("cls, both", [(fastbptt.RNN, 1376), (fastbptt.GRU, 4128)])
def test_by_hand(cls, both):
    """The products with x and h, 2 * 5 * 2 * (3 + 4) * 4 a gate; then both weights' gradients,
    and 4 of 5 steps back in time."""
    with FlopCounterMode(display=False) as counter:
        cls(3, 4)(torch.randn(5, 2, 3))[0].sum().backward()
    gates = both // 1376
    assert counter.get_total_flops() == both == gates * (560 + 560 + 256)


CASES = [
    Case(),
    Case(cell="relu", hx=False, bias=False),
    Case(layers=2, bidirectional=True, batch_first=True),
    Case(B=None, hx=False),
    Case(T=6, lengths=(6, 2, 4), bidirectional=True, hx=False),
    Case(cell="gru", layers=2),
    Case(cell="gru", T=6, lengths=(6, 6, 1)),
    Case(cell="lstm", layers=2, bidirectional=True),
    Case(cell="lstm", proj=2, layers=2, hx=False),
    Case(cell="lstm", proj=2, layers=2, bias=False, bidirectional=True),
    Case(cell="lstm", T=4, lengths=(1, 4, 4), batch_first=True),
]


@pytest.mark.parametrize("grads", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_torchs(case, grads):
    module = case.module()
    assert count(case, module, grads=grads) == count(case, twin(module), grads=grads)


def test_an_lstm_in_float32():
    """torch's runs in one operator without a formula there; ours counts as in float64."""
    case = Case(cell="lstm", layers=2)
    single = replace(case, dtype=torch.float32)
    assert count(single, single.module()) == count(case, case.module()) > (0, 0)


@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
def test_chunks(cell):
    """As the loop over chunks whose states are detached in between."""
    case = Case(cell=cell, T=7, hx=False)
    module = case.module(truncation=3)
    assert count(case, module) == count(case, module, detach_loop(twin(module), 3))


def test_windows_that_overlap():
    """Three lanes of 2, 4 and 4 steps: less one step each in the recurrence's backward pass."""
    case = Case(T=6, hx=False)
    rows, w_ih, w_hh = 3, 2 * 4 * 3, 2 * 4 * 4
    full = 6 * rows * (w_ih + w_hh)
    back = full + (1 + 3 + 3) * rows * w_hh
    assert count(case, case.module(truncation=fastbptt.TBPTT(2, 4))) == (full, full + back)


def test_gates_that_are_computed_again():
    case = Case(cell="gru")
    plain, again = (count(case, case.module(**o)) for o in ({}, {"recompute": True}))
    assert again == (plain[0], plain[1] + plain[0])


@pytest.mark.slow
def test_what_imports_first():
    """The formulas are there whichever of the two is imported first; neither imports the other."""
    script = """
import sys
first, second = {first!r}, {second!r}
__import__(first)
assert second not in sys.modules, second
__import__(second)
import fastbptt, torch
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    fastbptt.RNN(3, 4)(torch.randn(5, 2, 3))
print(counter.get_total_flops())
"""
    names = ["fastbptt", "torch.utils.flop_counter"]
    for first, second in (names, names[::-1]):
        assert python(script.format(first=first, second=second)).stdout == "560\n"
