"""Stacks whose layers are run together: in waves, or one after another by one call."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fastbptt
from calls import Call, Gates
from common import Case, assert_matches, cotangent, step, twin
from fastbptt import Chunked, Sliding
from test_modes import expected_of

pytestmark = pytest.mark.usefixtures("poisoned")

# Long and narrow: a step has too little work for several threads, a layer has enough.
LONG = {"T": 230, "B": 1, "I": 20, "H": 48, "layers": 3}

CALLS = [
    *(Call(Case(**LONG, cell=cell)) for cell in ("tanh", "relu", "gru", "lstm")),
    Call(Case(**LONG, cell="lstm", proj=9)),
    Call(Case(**{**LONG, "layers": 5}, cell="gru", bias=False, hx=False)),
    Call(Case(**{**LONG, "B": 2}, cell="lstm")),
    Call(Case(**{**LONG, "B": 2}, cell="tanh", batch_first=True)),
    Call(Case(**{**LONG, "B": 3}, cell="gru", lengths=(230, 117, 20))),
    Call(Case(**LONG, cell="lstm"), Chunked(17)),
    Call(Case(**LONG, cell="tanh"), Sliding(25)),
    Call(Case(**LONG, cell="gru"), Gates()),
    Call(Case(**LONG, cell="lstm"), resets="by step"),
    Call(Case(**LONG, cell="gru"), resets="by step", recompute=True),
    Call(Case(**LONG, cell="lstm"), recompute=True),
    Call(Case(**LONG, cell="tanh"), dropout=0.4),
    Call(Case(**LONG, cell="gru"), through=("h_n",)),
    Call(Case(**LONG, cell="lstm"), through=("c_n",)),
    Call(Case(**LONG, cell="lstm"), Chunked(17), through=("output",)),
]


several_threads = pytest.mark.parametrize(
    "threads", [2, 4, 7], indirect=True, ids="threads={}".format
)


@pytest.mark.slow(4)
@several_threads
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_long_stacks(call, threads):
    """The reference's numbers, and the same bits whoever computes them."""
    actual = call.ours()
    assert_matches(actual, expected_of(call), rtol=1e-11)
    for _ in range(3):
        assert_matches(call.ours(), actual, rtol=0)


@several_threads
@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
def test_without_gradients(cell, threads):
    """What is not kept for a backward pass changes no bit."""
    case = Case(**LONG, cell=cell, dtype=torch.float32)
    module, (x, hx) = case.module(), case.data()
    with torch.no_grad():
        output = module(x, hx)[0]
    assert torch.equal(output, step(module, x, hx)["output"])


def test_losses_of_some_layers_states():
    """A gradient that comes to one layer's final state alone, and none to the output."""
    case = Case(**LONG, cell="gru")
    module, (x, hx) = case.module(), case.data()
    results = []
    for one in (module, twin(module)):
        for layer in range(case.layers):
            leaf = hx.clone().requires_grad_()
            h_n = one(x, leaf)[1]
            results.append(torch.autograd.grad(h_n[layer].sum(), [leaf, *one.parameters()]))
    half = len(results) // 2
    for ours, theirs in zip(results[:half], results[half:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@several_threads
def test_some_gradients_are_not_wanted(threads):
    module = Case(**LONG, cell="lstm").module()
    x, hx = Case(**LONG, cell="lstm").data()
    want = step(module, x, hx)
    for frozen in ("l0", "l1", "l2"):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(frozen not in name)
            parameter.grad = None
        output, (h_n, c_n) = module(x, hx)
        losses = [output, h_n, c_n]
        torch.autograd.backward(losses, [cotangent(t, i) for i, t in enumerate(losses)])
        for name, parameter in module.named_parameters():
            if frozen in name:
                assert parameter.grad is None
            else:
                assert torch.equal(parameter.grad, want["d" + name])


def test_which_stacks_run_in_waves():
    """Where a step is too little for a team; and only if what lies between the layers is short."""
    script = """
import torch, fastbptt
torch.set_num_threads(2)
for cls, H, T in ((fastbptt.LSTM, 48, 230), (fastbptt.LSTM, 600, 230), (fastbptt.GRU, 48, 8000)):
    cls(20, H, 3)(torch.randn(T, 1, 20))[0].sum().backward()
"""
    env = os.environ | {"FASTBPTT_VERBOSE": "1", "FASTBPTT_CPU_ISA": "baseline"}
    run = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
    )
    together, too_large, one_by_one = 2, 2, 6
    lines = [line for line in run.stderr.splitlines() if line.startswith("fastbptt: ")]
    assert len(lines) == together + too_large + one_by_one
    for i, line in enumerate(lines):
        assert (", 3 layers, " in line) == (i < together + too_large)
        assert (", layers in waves, " in line) == (i < together)


@pytest.mark.parametrize("limit, calls", [(4 << 20, 1), (0, 2)])
def test_profilers_see_the_stack(limit, calls):
    """One call, or where the limit leaves no room for one, each layer's."""
    module, before = fastbptt.LSTM(4, 5, 2), fastbptt._C.stack_limit()
    fastbptt._C.set_stack_limit(limit)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            module(torch.randn(6, 2, 4))[0].sum().backward()
    finally:
        fastbptt._C.set_stack_limit(before)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["fastbptt::rnn_fwd"] == counts["fastbptt::rnn_bwd"] == calls


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, w: (x.long(), w), "dtype"),
        (lambda x, w: (x, [*w[:4], w[4][:, :3], *w[5:]]), "weight_ih must have shape"),
        (lambda x, w: (x, [w[0], torch.tensor(1.0), *w[2:]]), "weight_hh must have 2 dimensions"),
        (lambda x, w: (x, [*w[:5], w[5].double(), *w[6:]]), "weight_hh must have input's dtype"),
        (lambda x, w: (x, [*w[:7], w[7][:5]]), "bias_hh must have shape"),
    ],
    ids=["input's dtype", "shape above", "no dimensions", "dtype above", "bias above"],
)
def test_each_layers_arguments_are_checked(change, message):
    """As those of one layer are, before anything is computed."""
    module = fastbptt.RNN(3, 6, 2)
    x, weights = change(torch.randn(5, 2, 3), [w.detach() for w in module.parameters()])
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        torch.ops.fastbptt.network(x, None, None, weights, True, 2, False, None, False, "tanh", 0.0)
