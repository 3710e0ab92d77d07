"""The operators by themselves: torch.ops.fastbptt.rnn_fwd and rnn_bwd."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

import fastbptt  # noqa: F401  (registers them)
from common import Case, assert_matches, cotangent, referee, step

rnn_fwd, rnn_bwd = torch.ops.fastbptt.rnn_fwd, torch.ops.fastbptt.rnn_bwd

CASES = {
    "plain": Case(),
    "bare": Case(hx=False, bias=False),
    "one row": Case(B=1, H=9),
    "both directions": Case(bidirectional=True, nonlinearity="relu"),
    "batch first": Case(batch_first=True, nonlinearity="identity", dtype=torch.float32),
    "batch first, both directions": Case(batch_first=True, bidirectional=True, bias=False),
    "packed": Case(lengths=(5, 3, 1)),
    "packed, no hx": Case(lengths=(5, 5, 2), hx=False, bidirectional=True, dtype=torch.float32),
    "empty batch": Case(B=0, bidirectional=True),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def forward_arguments(case: Case) -> dict[str, object]:
    x, hx = case.data()
    return {
        "input": x.data,
        "hx": hx,
        "weights": [p.detach() for p in case.module().parameters()],
        "has_biases": case.bias,
        "batch_sizes": x.batch_sizes if isinstance(x, PackedSequence) else None,
        "batch_first": case.batch_first,
        "cell": case.nonlinearity,
        "cx": None,
        "keep_gates": True,
    }


def backward_arguments(case: Case, chunk: int = 0, needs=(True, True, True)) -> dict[str, object]:
    forward = forward_arguments(case)
    output, h_n, _, c, gates = rnn_fwd(**forward)
    del forward["keep_gates"]
    return {
        "grad_output": cotangent(output, 0),
        "grad_h_n": cotangent(h_n, 1),
        "grad_c_n": None,
        **forward,
        "output": output,
        "c": c,
        "gates": gates,
        "chunk": chunk,
        "needs": [needs[0], needs[1] and case.hx, False, needs[2]],
    }


def named(gradients, case: Case) -> dict[str, torch.Tensor]:
    dinput, dhx, dcx, dweights = gradients
    assert dcx.numel() == 0
    names = ["dinput", "dhx", *("d" + n for n, _ in case.module().named_parameters())]
    return dict(zip(names, [dinput, dhx, *dweights], strict=True))


@every_case
@pytest.mark.parametrize("chunk", [0, 2])
def test_opcheck(case, chunk):
    arguments = backward_arguments(case, chunk)
    torch.library.opcheck(rnn_fwd.default, (), forward_arguments(case))
    torch.library.opcheck(rnn_bwd.default, (), arguments)
    torch.library.opcheck(rnn_bwd.default, (), arguments | {"grad_output": None})
    torch.library.opcheck(rnn_bwd.default, (), arguments | {"needs": [False, False, False, True]})


@every_case
@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.usefixtures("poisoned")
def test_called_directly(case, chunk):
    case = dataclasses.replace(case, dtype=torch.float64)
    module, call = referee(case.module(), chunk or None)
    expected = step(module, *case.data(), call=call)
    output, h_n, *_ = rnn_fwd(**forward_arguments(case))
    actual = {"output": output, "h_n": h_n}
    actual |= named(rnn_bwd(**backward_arguments(case, chunk)), case)
    if not case.hx:
        assert actual.pop("dhx").numel() == 0
    assert_matches(actual, expected)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ["plain", "both directions", "packed", "batch first"])
@pytest.mark.parametrize("chunk", [0, 2])
def test_only_what_is_needed(name, chunk):
    case = CASES[name]
    full = named(rnn_bwd(**backward_arguments(case, chunk)), case)
    for needs in itertools.product((False, True), repeat=3):
        some = named(rnn_bwd(**backward_arguments(case, chunk, needs)), case)
        for grad, tensor in some.items():
            index = {"dinput": 0, "dhx": 1}.get(grad, 2)
            if needs[index]:
                assert_matches({grad: tensor}, {grad: full[grad]}, rtol=0)
            else:
                assert tensor.numel() == 0, f"{grad} was not asked for"


@pytest.mark.usefixtures("poisoned")
@every_case
def test_a_gradient_that_is_absent_is_zero(case):
    arguments = backward_arguments(case, 2)
    for name in ("grad_output", "grad_h_n"):
        zeros = torch.zeros_like(arguments[name])
        absent = rnn_bwd(**arguments | {name: None})
        present = rnn_bwd(**arguments | {name: zeros})
        assert_matches(named(absent, case), named(present, case))


@every_case
def test_arguments_stay_as_they_are(case):
    arguments = backward_arguments(case, 2)
    flat = [t for v in arguments.values() for t in (v if isinstance(v, list) else [v])]
    tensors = [t for t in flat if isinstance(t, torch.Tensor)]
    before, versions = [t.clone() for t in tensors], [t._version for t in tensors]
    results = [*rnn_fwd(**forward_arguments(case)), *named(rnn_bwd(**arguments), case).values()]
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert [t._version for t in tensors] == versions
    memory = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
    for result in results:  # functional: what comes back is new, and each by itself
        if result.numel():
            pointer = result.untyped_storage().data_ptr()
            assert pointer not in memory
            memory.add(pointer)


def zeros(*shape: int, **kwargs) -> torch.Tensor:
    return torch.zeros(*shape, **{"dtype": torch.float64, **kwargs})


def sizes(*values: int, dtype=torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


# (T, B, I, H) = (5, 3, 3, 4), one direction, biases; packed: lengths 5, 3, 1. Each call replaces
# one argument; the message must hold the word.
BAD_FORWARD = [
    ("plain", "input", zeros(3), "input"),
    ("plain", "input", zeros(5, 3), "input"),
    ("plain", "input", zeros(5, 3, 7), "weight_ih"),
    ("plain", "input", zeros(0, 3, 3), "input"),
    ("plain", "input", zeros(5, 3, 3, dtype=torch.float16), "input"),
    ("plain", "input", zeros(5, 3, 3, dtype=torch.int64), "input"),
    ("plain", "hx", zeros(3, 4), "hx"),
    ("plain", "hx", zeros(2, 3, 4), "hx"),
    ("plain", "hx", zeros(1, 2, 4), "hx"),
    ("plain", "hx", zeros(1, 1, 4), "hx"),
    ("plain", "hx", zeros(1, 3, 4, dtype=torch.float32), "hx"),
    ("plain", "weights", [], "weights"),
    ("plain", "weights", [zeros(4, 3)], "weights"),
    ("plain", "weights", [zeros(4, 3), zeros(4, 4), zeros(4)], "weights"),
    ("plain", "weights", 3 * [zeros(4, 3), zeros(4, 4), zeros(4), zeros(4)], "weights"),
    ("plain", "weights", [zeros(3), zeros(4, 4), zeros(4), zeros(4)], "weight_ih"),
    ("plain", "weights", [zeros(0, 3), zeros(0, 0), zeros(0), zeros(0)], "weight_hh"),
    ("plain", "weights", [zeros(4, 3), zeros(5, 4), zeros(4), zeros(4)], "weight_hh"),
    ("plain", "weights", [zeros(4, 3), zeros(4), zeros(4), zeros(4)], "weight_hh"),
    ("plain", "weights", [zeros(4, 3), zeros(4, 4), zeros(4, 1), zeros(4)], "bias_ih"),
    ("plain", "weights", [zeros(4, 3), zeros(4, 4), zeros(4), zeros(3)], "bias_hh"),
    ("plain", "has_biases", False, "weight"),
    ("bare", "has_biases", True, "weights"),
    ("plain", "cell", "sigmoid", "cell"),
    ("plain", "cell", "tanhh", "cell"),
    ("plain", "cx", zeros(1, 3, 4), "cx"),
    ("plain", "batch_sizes", sizes(3, 1, 1), "input"),
    ("packed", "input", zeros(8, 3), "input"),
    ("packed", "input", zeros(10, 3), "input"),
    ("packed", "input", zeros(9, 1, 3), "input"),
    ("packed", "hx", zeros(1, 2, 4), "hx"),
    ("packed", "batch_first", True, "batch_first"),
    ("packed", "batch_sizes", sizes(), "batch_sizes"),
    ("packed", "batch_sizes", sizes(2, 3, 2, 1, 1), "batch_sizes"),
    ("packed", "batch_sizes", sizes(3, 3, 3, 0), "batch_sizes"),
    ("packed", "batch_sizes", sizes(3, 3, 4, -1), "batch_sizes"),
    ("packed", "batch_sizes", sizes(3, 2, 2, 1, 1, dtype=torch.int32), "batch_sizes"),
    ("packed", "batch_sizes", sizes(3, 2, 2, 1, 1)[None], "batch_sizes"),
    ("packed", "batch_sizes", torch.tensor(9), "batch_sizes"),
]
BAD_BACKWARD = [
    ("plain", "grad_output", zeros(5, 3, 5), "grad_output"),
    ("plain", "grad_c_n", zeros(1, 3, 4), "grad_c_n"),
    ("plain", "c", zeros(1, 15, 4), "c must"),
    ("plain", "gates", zeros(1, 15, 16), "gates"),
    ("plain", "grad_output", zeros(5, 3, 4, dtype=torch.float32), "grad_output"),
    ("plain", "grad_h_n", zeros(3, 4), "grad_h_n"),
    ("plain", "grad_h_n", zeros(1, 3, 4, dtype=torch.float32), "grad_h_n"),
    ("plain", "output", zeros(5, 3, 8), "output"),
    ("plain", "output", zeros(4, 3, 4), "output"),
    ("plain", "output", zeros(5, 3, 4, dtype=torch.float32), "output"),
    ("plain", "hx", zeros(1, 2, 4), "hx"),
    ("plain", "chunk", -1, "chunk"),
    ("plain", "chunk", -(2**40), "chunk"),
    ("plain", "needs", [], "needs"),
    ("plain", "needs", [True, True], "needs"),
    ("plain", "needs", [True] * 5, "needs"),
    ("bare", "needs", [True, True, False, True], "hx"),
    ("plain", "needs", [True, True, True, True], "cx"),
    ("packed", "grad_output", zeros(8, 4), "grad_output"),
    ("packed", "batch_sizes", sizes(2, 3, 2, 1, 1), "batch_sizes"),
    ("packed", "batch_sizes", None, "input"),
]


def refuses(operator, arguments: dict[str, object], name: str, value: object, word: str) -> None:
    operator(**arguments)
    with pytest.raises((RuntimeError, ValueError), match=word) as caught:
        operator(**arguments | {name: value})
    assert "INTERNAL ASSERT" not in str(caught.value)


@pytest.mark.parametrize("case, name, value, word", BAD_FORWARD)
def test_bad_forward(case, name, value, word):
    refuses(rnn_fwd, forward_arguments(CASES[case]), name, value, word)


@pytest.mark.parametrize("case, name, value, word", BAD_BACKWARD)
def test_bad_backward(case, name, value, word):
    refuses(rnn_bwd, backward_arguments(CASES[case], 2), name, value, word)


@pytest.mark.parametrize("name", ["input", "hx", "grad_output", "grad_h_n", "output"])
def test_devices_do_not_mix(name):
    arguments = backward_arguments(CASES["plain"])
    word = "device" if name == "input" else name  # then all others are on another than input's
    refuses(rnn_bwd, arguments, name, arguments[name].to("meta"), word)
    if not name.startswith("grad") and name != "output":
        refuses(rnn_fwd, forward_arguments(CASES["plain"]), name, arguments[name].to("meta"), word)
