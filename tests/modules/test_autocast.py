"""Under torch.autocast a region's calls share one copy of the weights in its dtype."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastbptt
from common import Case, assert_matches, cotangent, step, tensors_of

CASES = [Case(4, 3, 5, 6, 2, cell=cell, dtype=torch.float32) for cell in ("tanh", "gru", "lstm")]
every_cell = pytest.mark.parametrize("case", CASES, ids=lambda case: case.cell)


def region(**options):
    return torch.autocast("cpu", torch.bfloat16, **options)


class Casts(TorchDispatchMode):
    """Counts the casts of matrices."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default and args[0].dim() == 2
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cached, casts", [(True, 4), (False, 12)], ids=["cached", "not cached"])
@every_cell
def test_weights_are_cast_once_a_region(case, cached, casts):
    module, (x, hx) = case.module(), case.data()
    for _ in range(2):  # every region anew
        with Casts() as counted, region(cache_enabled=cached):
            with torch.no_grad():
                module(x, hx)
            module(x, hx)
            with torch.inference_mode():
                module(x, hx)
        assert counted.count == casts  # weight_ih and weight_hh of two layers


def gradients(module, case, before):
    with region():
        before(module, *case.data())
        return step(module, *case.data())


def no_call(module, x, hx):
    pass


def without_gradients(module, x, hx):
    with torch.no_grad():
        module(x, hx)


def in_inference(module, x, hx):
    with torch.inference_mode():
        module(x, hx)


def torchs_cast_without_gradients(module, x, hx):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "weight" in name:
                torch.nn.functional.linear(torch.ones(1, parameter.size(1)), parameter)


@pytest.mark.parametrize("before", [without_gradients, in_inference, torchs_cast_without_gradients])
@every_cell
def test_gradients_after_a_call_without_them(case, before):
    expected = gradients(case.module(), case, no_call)
    assert_matches(gradients(case.module(), case, before), expected, rtol=0)


@every_cell
def test_calls_that_share_the_copies_add_their_gradients(case):
    module, (x, hx) = case.module(), case.data()

    def run(count):
        module.zero_grad()
        with region():
            for _ in range(count):
                outputs = tensors_of(module(x, hx))
                torch.autograd.backward(
                    [t.float() for t in outputs], [cotangent(t.float(), 0) for t in outputs]
                )
        return {name: p.grad.clone() for name, p in module.named_parameters()}

    once, thrice = run(1), run(3)
    for name, grad in thrice.items():
        error = (grad - 3 * once[name]).abs().max()
        assert error <= 4 * torch.finfo(torch.bfloat16).eps * grad.abs().max(), name


@every_cell
def test_weights_changed_between_regions(case):
    module, (x, hx) = case.module(), case.data()
    with region():
        before = module(x, hx)[0]
    changed = case.module()
    for parameter in (*module.parameters(), *changed.parameters()):
        parameter.data.mul_(0.5)  # which no version counter sees
    with region():
        results, expected = (tensors_of(m(x, hx)) for m in (module, changed))
    assert not torch.equal(results[0], before)
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)


@every_cell
def test_frozen_weights_and_float64(case):
    frozen, (x, hx) = case.module().requires_grad_(False), case.data()
    with region():
        for a, b in zip(tensors_of(frozen(x, hx)), tensors_of(case.module()(x, hx)), strict=True):
            assert torch.equal(a, b)
        double = fastbptt.GRU(3, 4, dtype=torch.float64)
        assert double(torch.randn(2, 1, 3, dtype=torch.float64))[0].dtype == torch.float64
