"""Randomized truncation where a backward pass runs calls again, and in compiled programs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastbptt
from fastbptt import Gated, Randomized, resets_from_dones

STEPS = 20


@pytest.fixture
def drawn(monkeypatch):
    """The gates of all draws, in order."""
    gates, original = [], Randomized._gates

    def spy(self, steps, batch):
        result = original(self, steps, batch)
        gates.append(result.kappa)
        return result

    monkeypatch.setattr(Randomized, "_gates", spy)
    return gates


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("own_generator", [False, True])
def test_checkpoint_draws_the_same_gates(drawn, use_reentrant, own_generator):
    generator = torch.Generator().manual_seed(0) if own_generator else None
    truncation = Randomized(0.5, generator=generator)
    torch.manual_seed(1)
    options = {"truncation": truncation, "dtype": torch.float64}
    one, two, three = (fastbptt.GRU(3, 3, **options) for _ in range(3))
    x = torch.randn(STEPS, 2, 3, dtype=torch.float64, requires_grad=True)

    def output(run):
        # The dropout shows that the default generator's other users get their draws again too.
        h = run(lambda v: two(torch.dropout(one(v)[0], 0.5, train=True))[0], x)
        return run(lambda v: three(v)[0], h)

    y = output(lambda f, v: checkpoint(f, v, use_reentrant=use_reentrant))
    last, state = truncation.last, generator and generator.get_state()
    (actual,) = torch.autograd.grad(y[-1].sum(), x) if not use_reentrant else (None,)
    if use_reentrant:
        y[-1].sum().backward()
        actual = x.grad
    first, again = drawn[:3], drawn[3:]
    assert len(again) == 3, "the segments ran again"
    assert torch.equal(again[0], first[2])
    assert torch.equal(again[1], first[0]) and torch.equal(again[2], first[1])
    assert not torch.equal(first[0], first[1])
    assert truncation.last is last
    assert actual.abs().sum() > 0
    if own_generator:
        assert torch.equal(generator.get_state(), state)


def test_the_default_generator_is_left_alone_in_plain_training():
    module = fastbptt.RNN(3, 4, truncation=Randomized(0.5, generator=torch.Generator()))
    state = torch.get_rng_state()
    module(torch.randn(STEPS, 2, 3, generator=torch.Generator()))[0].sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_kept_for_another_run_is_bounded():
    truncation = Randomized(0.5, generator=torch.Generator())
    module, x = fastbptt.RNN(1, 1, truncation=truncation), torch.zeros(1, 1, 1)
    with torch.no_grad():
        for _ in range(1030):
            module(x)
    assert len(truncation._states) == 1024


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("per_sequence", [False, True])
def test_compiled_calls_draw_anew(fresh_compiler, per_sequence):
    truncation = Randomized(0.5, per_sequence=per_sequence)
    module = fastbptt.GRU(3, 4, truncation=truncation, dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(STEPS, 2, 3, dtype=torch.float64, requires_grad=True)
    gates = []
    for _ in range(2):
        (actual,) = torch.autograd.grad(compiled(x)[0].sum(), x)
        its = Gated(truncation.last.kappa)
        (expected,) = torch.autograd.grad(module(x, truncation=its)[0].sum(), x)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
        gates.append(its.kappa)
    assert not torch.equal(*gates)


def test_gates_made_in_compiled_code(fresh_compiler):
    module = fastbptt.GRU(3, 4, dtype=torch.float64)

    def loss(x, kappa):
        return module(x, truncation=Gated(kappa))[0].sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x = torch.randn(STEPS, 2, 3, dtype=torch.float64, requires_grad=True)
    kappa = torch.rand(STEPS)
    (expected,) = torch.autograd.grad(loss(x, kappa), x)
    torch.testing.assert_close(torch.autograd.grad(compiled(x, kappa), x)[0], expected)
    with pytest.raises(RuntimeError, match="kappa must be finite"):
        compiled(x, kappa / 0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_dones_in_compiled_code(fresh_compiler, dtype):
    compiled = torch.compile(resets_from_dones, fullgraph=True, backend="aot_eager")
    dones = (torch.rand(STEPS, 2) < 0.3).to(dtype)
    assert torch.equal(compiled(dones), resets_from_dones(dones))
    if dtype != torch.bool:
        with pytest.raises(RuntimeError, match="dones must hold 0 and 1 alone"):
            compiled(2 + dones)
