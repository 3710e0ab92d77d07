"""Bad input: torch's exception type where torch has one, a message that names the argument."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastbptt
from common import Case, python
from fastbptt import Chunked

M = {"input_size": 3, "hidden_size": 4, "num_layers": 2, "bidirectional": True}


def zeros(*shape: int, **kwargs) -> torch.Tensor:
    return torch.zeros(*shape, **kwargs)


def packed(*shape: int, dtype=torch.float32):
    return pack_padded_sequence(zeros(*shape, dtype=dtype), [5, 4])


# What the call gets, and a word that the message must hold.
BAD_CALLS = {
    "rank 1": (lambda: (zeros(3),), "input"),
    "rank 4": (lambda: (zeros(5, 2, 3, 1),), "input"),
    "features": (lambda: (zeros(5, 2, 7),), "input"),
    "features, unbatched": (lambda: (zeros(5, 7),), "input"),
    "features, packed": (lambda: (packed(5, 2, 7),), "input"),
    "empty sequence": (lambda: (zeros(0, 2, 3),), "input|length"),
    "empty sequence and batch": (lambda: (zeros(0, 0, 3),), "input|length"),
    "empty sequence, unbatched": (lambda: (zeros(0, 3),), "input|length"),
    "hx layers": (lambda: (zeros(5, 2, 3), zeros(2, 2, 4)), "hx|hidden"),
    "hx batch": (lambda: (zeros(5, 2, 3), zeros(4, 3, 4)), "hx|hidden"),
    "hx batch of one": (lambda: (zeros(5, 2, 3), zeros(4, 1, 4)), "hx|hidden"),
    "hx width": (lambda: (zeros(5, 2, 3), zeros(4, 2, 5)), "hx|hidden"),
    "hx unbatched": (lambda: (zeros(5, 2, 3), zeros(4, 4)), "hx|hidden"),
    "hx batched": (lambda: (zeros(5, 3), zeros(4, 1, 4)), "hx|hidden"),
    "hx layers, unbatched": (lambda: (zeros(5, 3), zeros(2, 4)), "hx|hidden"),
    "hx packed": (lambda: (packed(5, 2, 3), zeros(4, 3, 4)), "hx|hidden"),
    "input dtype": (lambda: (zeros(5, 2, 3, dtype=torch.float64),), "input"),
    "input integer": (lambda: (zeros(5, 2, 3, dtype=torch.int64),), "input"),
    "input packed dtype": (lambda: (packed(5, 2, 3, dtype=torch.float64),), "input"),
    "hx dtype": (lambda: (zeros(5, 2, 3), zeros(4, 2, 4, dtype=torch.float64)), "hx|hidden"),
    "input device": (lambda: (zeros(5, 2, 3, device="meta"),), "input"),
    "hx device": (lambda: (zeros(5, 2, 3), zeros(4, 2, 4, device="meta")), "hx|hidden"),
    "input no tensor": (lambda: ([[[0.0, 0.0, 0.0]]],), "input"),
    "hx a tuple": (lambda: (zeros(5, 2, 3), (zeros(4, 2, 4),)), "hx"),
    "hx a number": (lambda: (zeros(5, 2, 3), 0.5), "hx"),
}


@pytest.mark.parametrize("truncation", [None, 2], ids="truncation={}".format)
@pytest.mark.parametrize("make, word", BAD_CALLS.values(), ids=BAD_CALLS)
def test_module_call(make, word, truncation):
    ours, theirs = fastbptt.RNN(**M, truncation=truncation), torch.nn.RNN(**M)
    ours.load_state_dict(theirs.state_dict())
    with pytest.raises(Exception) as expected:  # noqa: B017
        theirs(*make())
    with pytest.raises(Exception, match=f"(?i){word}") as got:  # noqa: B017
        ours(*make())
    own = (TypeError,) if expected.type is AttributeError else ()  # torch: 'list' has no 'dim'
    assert got.type in (expected.type, *own), f"{got.value!r}, where torch: {expected.value!r}"

    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    assert ours.truncation == (truncation and Chunked(truncation))
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])


BAD_OPTIONS = {
    "nonlinearity": ("sigmoid", 3, None),
    "dropout": (-0.1, 1.5, True),
    "num_layers": (0, -1),
    "bias": (1, "yes"),
    "batch_first": (1, None),
    "input_size": (0, -3, 2.0, "3"),
    "hidden_size": (0, -3, 2.0),
    "proj_size": (2,),
    "hidden": (3,),  # no such argument
}


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, values in BAD_OPTIONS.items() for value in values]
)
def test_constructor(name, value):
    options = {"input_size": 3, "hidden_size": 4, "num_layers": 2, name: value}
    with pytest.raises(Exception) as expected:  # noqa: B017
        torch.nn.RNN(**options)
    with pytest.raises(expected.type, match=name):
        fastbptt.RNN(**options)


# (the value, the exception): torch has no truncation, so Python's own habits decide.
BAD_TRUNCATIONS = [
    (0, ValueError),
    (-3, ValueError),
    (2.0, TypeError),
    (True, TypeError),
    ("4", TypeError),
    ((4,), TypeError),
    (float("nan"), TypeError),
    (torch.tensor(2.5), TypeError),
]


@pytest.mark.parametrize("value, error", BAD_TRUNCATIONS, ids=lambda v: repr(v))
def test_truncation(value, error):
    x, w_ih, w_hh = zeros(5, 2, 3), zeros(4, 3), zeros(4, 4)
    with pytest.raises(error, match="(?i)truncation") as caught:
        fastbptt.RNN(3, 4, truncation=value)
    assert re.search(re.escape(str(value)), str(caught.value)), "it says what the value was"
    module = fastbptt.RNN(3, 4, truncation=2)
    with pytest.raises(error, match="(?i)truncation"):
        module(x, truncation=value)
    assert module.truncation == Chunked(2)
    with pytest.raises(error, match="(?i)truncation"):
        fastbptt.rnn(x, None, w_ih, w_hh, truncation=value)
    with pytest.raises(error, match="(?i)truncation"):
        fastbptt.reference.rnn(x, None, w_ih, w_hh, truncation=value)
    with pytest.raises(error, match="k must be"):
        Chunked(value)


def test_truncation_is_checked_with_the_rest_right():
    with pytest.raises(TypeError):
        fastbptt.RNN(3, 4, 1, "tanh", True, False, 0.0, False, None, None, 4)  # keyword only
    with pytest.raises(TypeError):
        fastbptt.RNN(3, 4)(zeros(5, 2, 3), None, 4)


# The functional's arguments by name; each case replaces one.
GOOD = {
    "input": (5, 2, 3),
    "hx": (2, 4),
    "weight_ih": (4, 3),
    "weight_hh": (4, 4),
    "bias_ih": (4,),
    "bias_hh": (4,),
}
BAD_FUNCTIONAL = [
    ("input", zeros(3)),
    ("input", zeros(5, 2, 3, 1)),
    ("input", zeros(5, 2, 7)),
    ("input", zeros(0, 2, 3)),
    ("input", zeros(5, 2, 3, dtype=torch.float64)),
    ("input", zeros(5, 2, 3, device="meta")),
    ("hx", zeros(4)),
    ("hx", zeros(1, 2, 4)),
    ("hx", zeros(3, 4)),
    ("hx", zeros(2, 5)),
    ("hx", zeros(2, 4, dtype=torch.float64)),
    ("hx", zeros(2, 4, device="meta")),
    ("weight_ih", zeros(4)),
    ("weight_ih", zeros(5, 3)),
    ("weight_ih", zeros(4, 3, dtype=torch.float64)),
    ("weight_hh", zeros(4, 5)),
    ("weight_hh", zeros(5, 4)),
    ("weight_hh", zeros(4)),
    ("weight_hh", zeros(4, 4, device="meta")),
    ("bias_ih", zeros(5)),
    ("bias_ih", zeros(1, 4)),
    ("bias_ih", None),  # one bias without the other
    ("bias_hh", None),
    ("bias_hh", zeros(4, dtype=torch.float64)),
]


@pytest.mark.parametrize(
    "name, value",
    BAD_FUNCTIONAL,
    ids=[f"{n}-{v if v is None else (*v.shape, v.dtype, v.device)}" for n, v in BAD_FUNCTIONAL],
)
def test_functional(name, value):
    arguments = {n: zeros(*shape) for n, shape in GOOD.items()}
    fastbptt.rnn(**arguments)
    # Of two shapes that contradict each other, either may be called wrong.
    names = {"input": "input|weight_ih", "weight_ih": "weight_ih|weight_hh"}
    word = "bias" if value is None else names.get(name, name)
    with pytest.raises((RuntimeError, ValueError), match=word):
        fastbptt.rnn(**arguments | {name: value})


@pytest.mark.parametrize("nonlinearity", ["sigmoid", "Tanh", "", None, 3])
def test_functional_nonlinearity(nonlinearity):
    arguments = {n: zeros(*shape) for n, shape in GOOD.items()}
    # torch: a ValueError from nn.RNN's constructor, a RuntimeError from nn.RNNCell's call.
    with pytest.raises((ValueError, RuntimeError), match="nonlinearity"):
        fastbptt.rnn(**arguments, nonlinearity=nonlinearity)


def test_reference_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="dropout"):
        fastbptt.reference.run(fastbptt.RNN(3, 4, 2, dropout=0.5), zeros(5, 2, 3))
    eval_mode = fastbptt.RNN(3, 4, 2, dropout=0.5).eval()
    assert torch.isfinite(fastbptt.reference.run(eval_mode, zeros(5, 2, 3))[0]).all()
    with pytest.raises(ValueError, match="LSTM"):
        fastbptt.reference.run(torch.nn.LSTM(3, 4), zeros(5, 2, 3))


def test_instruction_sets():
    assert fastbptt._C.cpu_isa() in fastbptt._C.cpu_isas()
    assert "baseline" in fastbptt._C.cpu_isas()
    before = fastbptt._C.cpu_isa()
    with pytest.raises(RuntimeError, match="mmx"):
        fastbptt._C.set_cpu_isa("mmx")
    assert fastbptt._C.cpu_isa() == before


def test_instruction_set_by_environment(monkeypatch):
    for isa in fastbptt._C.cpu_isas():
        monkeypatch.setenv("FASTBPTT_CPU_ISA", isa)
        assert python("import fastbptt; print(fastbptt._C.cpu_isa())").stdout.strip() == isa
    monkeypatch.setenv("FASTBPTT_CPU_ISA", "mmx")
    failed = python("import fastbptt", check=False)
    assert failed.returncode != 0
    assert "FASTBPTT_CPU_ISA" in failed.stderr and "mmx" in failed.stderr


# Data types without a kernel.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes_go_torchs_way(dtype):
    script = f"""
import torch, fastbptt
torch.manual_seed(0)
ours = fastbptt.RNN(3, 4, 2, bidirectional=True, dtype={dtype})
theirs = torch.nn.RNN(3, 4, 2, bidirectional=True, dtype={dtype})
theirs.load_state_dict(ours.state_dict())
for _ in range(3):
    x = torch.randn(5, 2, 3, dtype={dtype})
    for module in (ours, theirs):
        module(x)[0].sum().backward()
for a, b in zip(ours.parameters(), theirs.parameters()):
    assert torch.equal(a.grad, b.grad)
"""
    warnings = [line for line in python(script).stderr.splitlines() if "Warning" in line]
    assert len(warnings) == 1, warnings
    assert "fastbptt" in warnings[0] and str(dtype).removeprefix("torch.") in warnings[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_truncation_that_cannot_be_honoured(dtype):
    case = Case(dtype=dtype, nonlinearity="tanh")
    x, h = case.data()
    module = case.module(truncation=2)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(NotImplementedError, match=f"truncation.*{name}"):
        module(x, h)
    with pytest.raises(NotImplementedError, match=f"truncation.*{name}"):
        case.module()(x, h, truncation=Chunked(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_torch_has_not_either(dtype):
    name = str(dtype).removeprefix("torch.")
    case = Case(dtype=dtype, nonlinearity="identity")
    with pytest.raises(NotImplementedError, match=f"identity.*{name}"):
        case.module()(*case.data())
    arguments = {n: zeros(*shape, dtype=dtype) for n, shape in GOOD.items()}
    with pytest.raises(NotImplementedError, match=f"input.*(?i:{name}|half)"):
        fastbptt.rnn(**arguments)
