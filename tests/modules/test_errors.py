"""Bad input: torch's exception type where torch has one, a message that names the argument."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastbptt
from common import Case, python, twin
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
    "hx dtype": (lambda: (zeros(5, 2, 3), zeros(4, 2, 4, dtype=torch.float64)), "hx|hidden"),
    "input device": (lambda: (zeros(5, 2, 3, device="meta"),), "input"),
    "hx device": (lambda: (zeros(5, 2, 3), zeros(4, 2, 4, device="meta")), "hx|hidden"),
    "input no tensor": (lambda: ([[[0.0, 0.0, 0.0]]],), "input"),
    "hx a tuple": (lambda: (zeros(5, 2, 3), (zeros(4, 2, 4),)), "hx"),
    "hx a number": (lambda: (zeros(5, 2, 3), 0.5), "hx"),
}


CLASSES = {cls.__name__: cls for cls in (fastbptt.RNN, fastbptt.GRU, fastbptt.LSTM)}
every_class = pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)


def refuses(cls: type, make, word: str, options: dict, truncation: int | None = None) -> None:
    """The call fails as torch's does, with the word, and leaves a module that works."""
    ours = cls(**options, truncation=truncation)
    theirs = twin(ours)
    with pytest.raises(Exception) as expected:  # noqa: B017
        theirs(*make())
    with pytest.raises(Exception, match=f"(?i){word}") as got:  # noqa: B017
        ours(*make())
    # torch where it looks at no type: 'list' has no 'dim', a number no items, a tuple no second.
    own = (TypeError,) if expected.type in (AttributeError, IndexError) else ()
    assert got.type in (expected.type, *own), f"{got.value!r}, where torch: {expected.value!r}"

    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    assert ours.truncation == (truncation and Chunked(truncation))
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])


@every_class
@pytest.mark.parametrize("truncation", [None, 2], ids="truncation={}".format)
@pytest.mark.parametrize("make, word", BAD_CALLS.values(), ids=BAD_CALLS)
def test_module_call(make, word, truncation, cls):
    def call():
        input, *hx = make()
        # An LSTM gets the same fault in both states.
        return (input, (hx[0], hx[0])) if hx and cls is fastbptt.LSTM else (input, *hx)

    refuses(cls, call, word, M, truncation)


@every_class
def test_packed_input_of_another_dtype(cls):
    # What nn.RNN and nn.GRU raise; nn.LSTM forgets to look, and fails in a matrix product.
    with pytest.raises(ValueError, match="input dtype"):
        cls(**M)(packed(5, 2, 3, dtype=torch.float64))


P = {**M, "proj_size": 2}  # h [4, 2, 2], c [4, 2, 4]
X, H, C = (5, 2, 3), (4, 2, 2), (4, 2, 4)
BAD_LSTM_STATES = {
    "a single tensor": (lambda: (zeros(*X), zeros(*C)), "hx"),
    "a single tensor, unbatched": (lambda: (zeros(5, 3), zeros(4, 4)), "hx"),
    "a single tensor, packed": (lambda: (packed(*X), zeros(*C)), "hx|hidden"),
    "a pair in a tensor": (lambda: (zeros(*X), torch.zeros(2, *C)), "hx|hidden"),
    "one of two": (lambda: (zeros(*X), (zeros(*H),)), "hx"),
    "three": (lambda: (zeros(*X), (zeros(*H), zeros(*C), zeros(*C))), "hx"),
    "none of two": (lambda: (zeros(*X), ()), "hx"),
    "c None": (lambda: (zeros(*X), (zeros(*H), None)), "hx"),
    "h None": (lambda: (zeros(*X), (None, zeros(*C))), "hx"),
    "a number": (lambda: (zeros(*X), 0.5), "hx"),
    "h as wide as c": (lambda: (zeros(*X), (zeros(*C), zeros(*C))), r"hx|hidden\[0\]"),
    "c as narrow as h": (lambda: (zeros(*X), (zeros(*H), zeros(*H))), r"cx|hidden\[1\]"),
    "exchanged": (lambda: (zeros(*X), (zeros(*C), zeros(*H))), "hx|hidden"),
    "c's batch": (lambda: (zeros(*X), (zeros(*H), zeros(4, 3, 4))), r"cx|hidden\[1\]"),
    "c's batch of one": (lambda: (zeros(*X), (zeros(*H), zeros(4, 1, 4))), r"cx|hidden\[1\]"),
    "c's layers": (lambda: (zeros(*X), (zeros(*H), zeros(2, 2, 4))), r"cx|hidden\[1\]"),
    "c unbatched": (lambda: (zeros(*X), (zeros(*H), zeros(4, 4))), "cx"),
    "c batched": (lambda: (zeros(5, 3), (zeros(4, 2), zeros(*C))), "cx"),
    "c packed": (lambda: (packed(*X), (zeros(*H), zeros(4, 3, 4))), r"cx|hidden\[1\]"),
    "c dtype": (lambda: (zeros(*X), (zeros(*H), zeros(*C, dtype=torch.float64))), "cx|hidden"),
    "h dtype": (lambda: (zeros(*X), (zeros(*H, dtype=torch.float64), zeros(*C))), "hx|hidden"),
    "c device": (lambda: (zeros(*X), (zeros(*H), zeros(*C, device="meta"))), "cx|hidden"),
}


@pytest.mark.parametrize("make, word", BAD_LSTM_STATES.values(), ids=BAD_LSTM_STATES)
def test_lstm_states(make, word):
    refuses(fastbptt.LSTM, make, word, P)


@pytest.mark.parametrize("pair", [list, tuple])
def test_lstm_states_in_a_list_or_a_tuple(pair):
    module, states = fastbptt.LSTM(**P), (torch.randn(*H), torch.randn(*C))
    x = torch.randn(*X)
    torch.testing.assert_close(module(x, pair(states)), twin(module)(x, states))


@pytest.mark.parametrize("cls", [fastbptt.RNN, fastbptt.GRU])
def test_a_pair_of_states_is_an_lstms(cls):
    with pytest.raises(TypeError, match="hx.*tuple"):
        cls(**M)(zeros(*X), (zeros(*C), zeros(*C)))


BAD_OPTIONS = {
    "nonlinearity": {ValueError: ("sigmoid", 3, None)},
    "dropout": {ValueError: (-0.1, 1.5, True)},
    "num_layers": {ValueError: (0, -1)},
    "bias": {TypeError: (1, "yes")},
    "batch_first": {TypeError: (1, None)},
    "input_size": {ValueError: (0, -3), TypeError: (2.0, "3")},
    "hidden_size": {ValueError: (0, -3), TypeError: (2.0,)},
    "proj_size": {ValueError: (2,)},
    "hidden": {TypeError: (3,)},  # no such argument
}
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


@every_class
@pytest.mark.parametrize(
    "name, value, error",
    [
        (name, value, error)
        for name, errors in BAD_OPTIONS.items()
        for error, values in errors.items()
        for value in values
    ],
)
def test_constructor(name, value, error, cls):
    if cls is fastbptt.LSTM and name == "proj_size":
        value = 4  # hidden_size; 2 is right
    if cls is not fastbptt.RNN and name == "nonlinearity":
        error = TypeError  # no such argument
    options = {"input_size": 3, "hidden_size": 4, "num_layers": 2, name: value}
    if TORCH >= (2, 13):  # older ones do not check all of these
        with pytest.raises(error):
            getattr(torch.nn, cls.__name__)(**options)
    with pytest.raises(error, match=name):
        cls(**options)
    if name not in ("proj_size", "hidden"):
        order = ("input_size", "hidden_size", "num_layers", "nonlinearity", "bias", "batch_first")
        order = [n for n in order if n != "nonlinearity" or cls is fastbptt.RNN]
        if name in order:
            usual = {"nonlinearity": "tanh", "bias": True, "batch_first": False} | options
            with pytest.raises(error, match=name):
                cls(*(usual[n] for n in order))


@pytest.mark.parametrize("value", [-1, 4, 5])
def test_proj_size(value):
    with pytest.raises(ValueError, match="proj_size"):
        torch.nn.LSTM(3, 4, proj_size=value)
    with pytest.raises(ValueError, match="proj_size"):
        fastbptt.LSTM(3, 4, proj_size=value)


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


@every_class
@pytest.mark.parametrize("value, error", BAD_TRUNCATIONS, ids=lambda v: repr(v))
def test_truncation(value, error, cls):
    x, gates = zeros(5, 2, 3), {"RNN": 1, "GRU": 3, "LSTM": 4}[cls.__name__]
    weights = zeros(gates * 4, 3), zeros(gates * 4, 4)
    with pytest.raises(error, match="(?i)truncation") as caught:
        cls(3, 4, truncation=value)
    assert re.search(re.escape(str(value)), str(caught.value)), "it says what the value was"
    module = cls(3, 4, truncation=2)
    with pytest.raises(error, match="(?i)truncation"):
        module(x, truncation=value)
    assert module.truncation == Chunked(2)
    for namespace in (fastbptt, fastbptt.reference):
        with pytest.raises(error, match="(?i)truncation"):
            getattr(namespace, cls.__name__.lower())(x, None, *weights, truncation=value)
    with pytest.raises(error, match="k must be"):
        Chunked(value)


def test_truncation_and_recompute_are_keywords_only():
    with pytest.raises(TypeError):
        fastbptt.RNN(3, 4, 1, "tanh", True, False, 0.0, False, None, None, 4)
    with pytest.raises(TypeError):
        fastbptt.GRU(3, 4, 1, True, False, 0.0, False, 0, None, None, 4)
    with pytest.raises(TypeError):
        fastbptt.LSTM(3, 4, 1, True, False, 0.0, False, 0, None, None, 4)
    for cls in CLASSES.values():
        with pytest.raises(TypeError):
            cls(3, 4)(zeros(5, 2, 3), None, 4)
    with pytest.raises(TypeError):
        fastbptt.RNN(3, 4, recompute=True)  # it keeps no gates


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


def gated(**replaced) -> dict[str, object]:
    """Good arguments of fastbptt.gru, or of lstm with a projection, but for those replaced."""
    lstm = "weight_hr" in replaced or isinstance(replaced.get("hx"), tuple)
    G, R = (4, 2) if lstm else (3, 4)
    arguments = {
        "input": zeros(5, 2, 3),
        "hx": (zeros(2, 2), zeros(2, 4)) if lstm else zeros(2, 4),
        "weight_ih": zeros(4 * G, 3),
        "weight_hh": zeros(4 * G, R),
        "bias_ih": zeros(4 * G),
        "bias_hh": zeros(4 * G),
    }
    return arguments | ({"weight_hr": zeros(2, 4)} if lstm else {}) | replaced


BAD_GRU = [
    ("input", zeros(5, 2, 7), "weight_ih"),
    ("hx", zeros(2, 5), "hx"),
    ("hx", zeros(4), "hx"),
    ("weight_ih", zeros(4, 3), "weight_ih"),
    ("weight_hh", zeros(16, 4), "weight_hh"),
    ("weight_hh", zeros(11, 4), "weight_hh"),
    ("bias_hh", zeros(4), "bias_hh"),
    ("bias_hh", None, "bias_hh"),
]
BAD_LSTM = [
    ("hx", (zeros(2, 4), zeros(2, 4)), "hx"),
    ("hx", (zeros(2, 2), zeros(2, 2)), "cx"),
    ("hx", (zeros(2, 2), zeros(1, 2, 4)), "cx"),
    ("hx", (zeros(2, 2),), "hx"),
    ("hx", (zeros(2, 2), zeros(2, 4), zeros(2, 4)), "hx"),
    ("hx", zeros(2, 4), "hx"),
    ("hx", (zeros(2, 2), None), "hx|cx"),
    ("weight_hr", zeros(4, 2), "weight_hr"),
    ("weight_hr", None, "weight_hh"),
    ("weight_hr", zeros(2, 4, dtype=torch.float64), "weight_hr"),
]


@pytest.mark.parametrize("name, value, word", BAD_GRU)
def test_functional_gru(name, value, word):
    fastbptt.gru(**gated())
    with pytest.raises((RuntimeError, ValueError), match=word):
        fastbptt.gru(**gated(**{name: value}))


@pytest.mark.parametrize("name, value, word", BAD_LSTM)
def test_functional_lstm(name, value, word):
    good = gated(weight_hr=zeros(2, 4))
    fastbptt.lstm(**good)
    with pytest.raises((RuntimeError, ValueError, TypeError), match=word):
        fastbptt.lstm(**good | {name: value})


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
    unknown = fastbptt.GRU(3, 4)
    unknown.mode = "SRU"
    with pytest.raises(ValueError, match="SRU"):
        fastbptt.reference.run(unknown, zeros(5, 2, 3))


def test_instruction_sets():
    assert fastbptt._C.cpu_isa() in fastbptt._C.cpu_isas()
    assert "baseline" in fastbptt._C.cpu_isas()
    before = fastbptt._C.cpu_isa()
    with pytest.raises(RuntimeError, match="mmx"):
        fastbptt._C.set_cpu_isa("mmx")
    assert fastbptt._C.cpu_isa() == before


@pytest.mark.slow
def test_instruction_set_by_environment():
    isas = fastbptt._C.cpu_isas()
    script = "import fastbptt; print(fastbptt._C.cpu_isa())"

    def run(isa: str):
        return python(script, check=isa in isas, env={"FASTBPTT_CPU_ISA": isa})

    with ThreadPoolExecutor(2) as pool:  # most of their time goes into importing torch
        *done, failed = pool.map(run, [*isas, "mmx"])
    assert [process.stdout.strip() for process in done] == isas
    assert failed.returncode != 0
    assert "FASTBPTT_CPU_ISA" in failed.stderr and "mmx" in failed.stderr


# Data types without a kernel: on the CPU there are none, so some kernels are hidden.
NO_KERNELS = 'fastbptt.call.KERNEL_DTYPES["cpu"] = (torch.float32, torch.float64)'


def test_other_dtypes_go_torchs_way():
    script = f"""
import sys, torch, fastbptt
{NO_KERNELS}
for name in ("RNN", "GRU", "LSTM"):
    for dtype in (torch.float16, torch.bfloat16):
        print("then:", name, dtype, file=sys.stderr, flush=True)
        torch.manual_seed(0)
        ours = getattr(fastbptt, name)(3, 4, 2, bidirectional=True, dtype=dtype)
        theirs = getattr(torch.nn, name)(3, 4, 2, bidirectional=True, dtype=dtype)
        theirs.load_state_dict(ours.state_dict())
        for _ in range(3):
            x = torch.randn(5, 2, 3, dtype=dtype)
            for module in (ours, theirs):
                module(x)[0].sum().backward()
        for a, b in zip(ours.parameters(), theirs.parameters()):
            assert torch.equal(a.grad, b.grad)
"""
    nothing, *said = python(script).stderr.split("then: ")
    assert not nothing and len(said) == 6
    for text in said:
        (name, dtype), *lines = (line.split() for line in text.splitlines())
        (warning,) = (" ".join(line) for line in lines if any("Warning" in word for word in line))
        assert f"fastbptt.{name}" in warning and dtype.removeprefix("torch.") in warning


@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("few_kernels")
def test_a_truncation_that_cannot_be_honoured(dtype, cell):
    case = Case(dtype=dtype, cell=cell)
    x, hx = case.data()
    module = case.module(truncation=2)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(NotImplementedError, match=f"truncation.*{name}"):
        module(x, hx)
    with pytest.raises(NotImplementedError, match=f"truncation.*{name}"):
        case.module()(x, hx, truncation=Chunked(2))


@pytest.mark.usefixtures("few_kernels")
def test_what_torch_has_not_either():
    case = Case(dtype=torch.bfloat16, cell="identity")
    with pytest.raises(NotImplementedError, match="identity.*bfloat16"):
        case.module()(*case.data())
    arguments = {n: zeros(*shape, dtype=torch.int64) for n, shape in GOOD.items()}
    with pytest.raises(NotImplementedError, match="input.*float32.*(?i:long|int64)"):
        fastbptt.rnn(**arguments)
