"""The operators by themselves: torch.ops.fastbptt.rnn_fwd and rnn_bwd."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

import fastbptt  # noqa: F401  (registers them)
from common import Case, assert_matches, cotangent, parts, referee, step

rnn_fwd, rnn_bwd = torch.ops.fastbptt.rnn_fwd, torch.ops.fastbptt.rnn_bwd

CASES = {
    "plain": Case(),
    "bare": Case(hx=False, bias=False),
    "one row": Case(B=1, H=9),
    "both directions": Case(bidirectional=True, cell="relu"),
    "batch first": Case(batch_first=True, cell="identity", dtype=torch.float32),
    "batch first, both directions": Case(batch_first=True, bidirectional=True, bias=False),
    "packed": Case(lengths=(5, 3, 1)),
    "packed, no hx": Case(lengths=(5, 5, 2), hx=False, bidirectional=True, dtype=torch.float32),
    "empty batch": Case(B=0, bidirectional=True),
    "gru": Case(cell="gru"),
    "gru, bare": Case(cell="gru", B=1, hx=False, bias=False, bidirectional=True),
    "gru, packed": Case(cell="gru", lengths=(5, 3, 1), bidirectional=True),
    "gru, empty batch": Case(cell="gru", B=0),
    "lstm": Case(cell="lstm"),
    "lstm, bare": Case(cell="lstm", B=1, hx=False, bias=False, bidirectional=True),
    "lstm, projection": Case(cell="lstm", proj=2, batch_first=True, bidirectional=True),
    "lstm, projection, bare": Case(cell="lstm", proj=3, bias=False, dtype=torch.float32),
    "lstm, projection, bare, both directions": Case(
        cell="lstm", proj=3, bias=False, bidirectional=True
    ),
    "lstm, packed": Case(cell="lstm", proj=3, lengths=(5, 3, 1), bidirectional=True),
    "lstm, packed, no hx": Case(cell="lstm", lengths=(5, 5, 2), hx=False),
    "lstm, empty batch": Case(cell="lstm", proj=2, B=0),
    "projected": Case(cell="lstm", proj=2),
    "bfloat16": Case(bidirectional=True, dtype=torch.bfloat16),
    "gru, float16, packed": Case(cell="gru", lengths=(5, 3, 1), dtype=torch.float16),
    "lstm, bfloat16, projection": Case(cell="lstm", proj=3, H=5, dtype=torch.bfloat16),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def forward_arguments(case: Case) -> dict[str, object]:
    x, states = case.data()
    hx, cx = (*parts(states), None, None)[:2]
    return {
        "input": x.data,
        "hx": hx,
        "cx": cx,
        "weights": [p.detach() for p in case.module().parameters()],
        "has_biases": case.bias,
        "batch_sizes": x.batch_sizes if isinstance(x, PackedSequence) else None,
        "batch_first": case.batch_first,
        "cell": case.cell,
        "keep_gates": True,
    }


ALL = (True, True, True, True)  # needs: input, hx, cx, weights


def backward_arguments(case: Case, chunk: int = 0, needs=ALL) -> dict[str, object]:
    forward = forward_arguments(case)
    output, h_n, c_n, c, gates = rnn_fwd(**forward)
    del forward["keep_gates"]
    states = (case.hx, case.hx and case.cell == "lstm")
    return {
        "grad_output": cotangent(output, 0),
        "grad_h_n": cotangent(h_n, 1),
        "grad_c_n": cotangent(c_n, 2) if case.cell == "lstm" else None,
        **forward,
        "output": output,
        "c": c,
        "gates": gates,
        "k1": chunk,
        "k2": chunk,
        "needs": [needs[0], needs[1] and states[0], needs[2] and states[1], needs[3]],
    }


def named(gradients, case: Case) -> dict[str, torch.Tensor]:
    dinput, dhx, dcx, dweights = gradients
    names = ["dinput", "dhx", "dcx", *("d" + n for n, _ in case.module().named_parameters())]
    return dict(zip(names, [dinput, dhx, dcx, *dweights], strict=True))


@pytest.mark.slow(3)
@every_case
def test_opcheck(case):
    torch.library.opcheck(rnn_fwd.default, (), forward_arguments(case))
    whole, chunked = backward_arguments(case), backward_arguments(case, 2)
    torch.library.opcheck(rnn_bwd.default, (), whole)
    torch.library.opcheck(rnn_bwd.default, (), chunked)
    # What else differs does so for all windows alike: by turns with and without any.
    some, others = (whole, chunked) if case.bidirectional else (chunked, whole)
    torch.library.opcheck(rnn_bwd.default, (), some | {"grad_output": None})
    torch.library.opcheck(rnn_bwd.default, (), others | {"needs": [False, False, False, True]})
    if case.cell in ("gru", "lstm"):
        torch.library.opcheck(rnn_fwd.default, (), forward_arguments(case) | {"keep_gates": False})
        empty = some["gates"].new_empty((0, *some["gates"].shape[1:]))
        torch.library.opcheck(rnn_bwd.default, (), some | {"gates": empty})


def cuts(arguments: dict[str, object]) -> dict[str, dict[str, object]]:
    """What else a backward call may be asked for."""
    input = arguments["input"]
    generator = torch.Generator().manual_seed(0)
    resets = torch.rand(input.shape[:-1], generator=generator) < 0.3
    windows = {"k1": 2, "k2": 3, "resets": resets}
    apart = {
        "windows": windows,
        "some windows": windows | {"first_window": 1, "num_windows": 2},
        "windows apart": windows | {"input_by_lane": True},
    }
    one_direction = arguments["output"].size(-1) == arguments["weights"][1].size(1)
    return (apart if one_direction else {}) | {
        "resets": {"resets": resets},
        "gates": {"kappa": torch.rand(input.shape[:-1], generator=generator).to(input.dtype)},
        "dropout": {"mask": torch.rand(input.shape, generator=generator).to(input.dtype)},
        "last losses": {"k1": 2, "k2": 2, "last_only": True},
    }


@pytest.mark.slow(1)
@pytest.mark.parametrize(
    "name", ["plain", "packed", "lstm", "gru, packed", "projected", "lstm, bfloat16, projection"]
)
def test_opcheck_of_cuts(name):
    case = CASES[name]
    arguments = backward_arguments(case)
    every = cuts(arguments)
    torch.library.opcheck(rnn_fwd.default, (), forward_arguments(case) | every["resets"])
    for each in every.values():
        torch.library.opcheck(rnn_bwd.default, (), arguments | each)


@pytest.mark.parametrize("name", ["plain", "batch first", "packed", "gru", "lstm, projection"])
@pytest.mark.usefixtures("poisoned")
def test_windows_in_groups_add_up(name):
    case = dataclasses.replace(CASES[name], dtype=torch.float64, bidirectional=False)
    arguments = backward_arguments(case) | {"k1": 2, "k2": 4}
    whole = named(rnn_bwd(**arguments), case)
    steps = 5
    first, second = (
        named(rnn_bwd(**arguments | {"first_window": first, "num_windows": count}), case)
        for first, count in ((0, 1), (1, 2))
    )
    # The first group lies in the steps [0, 2), the second in [0, 5): windows reach back 2 steps.
    assert second["dinput"].shape == whole["dinput"].shape
    time = 1 if case.batch_first else 0
    rows = arguments["batch_sizes"][:2].sum().item() if case.lengths else 2
    assert first["dinput"].size(time) == rows
    second["dinput"].narrow(time, 0, rows).add_(first.pop("dinput"))
    added = {n: g + first[n] if n in first else g for n, g in second.items()}
    assert_matches(added, whole)
    assert steps == (case.T if case.lengths is None else max(case.lengths))


@every_case
@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.usefixtures("poisoned")
def test_called_directly(case, chunk):
    case = dataclasses.replace(case, dtype=torch.float64)
    module, call = referee(case.module(), chunk or None)
    expected = step(module, *case.data(), call=call)
    output, h_n, c_n, *_ = rnn_fwd(**forward_arguments(case))
    actual = {"output": output, "h_n": h_n, "c_n": c_n}
    actual |= named(rnn_bwd(**backward_arguments(case, chunk)), case)
    for name in actual.keys() - expected.keys():  # what the case has not
        assert actual.pop(name).numel() == 0
    assert_matches(actual, expected)


@pytest.mark.usefixtures("poisoned")
@every_case
def test_what_is_kept(case):
    x, _ = case.data()
    rows, D = x.data.shape[:-1].numel(), 2 if case.bidirectional else 1
    width = {"gru": 4 * case.H, "lstm": 4 * case.H}.get(case.cell, 0)
    for keep in (True, False):
        *_, c_n, c, gates = rnn_fwd(**forward_arguments(case) | {"keep_gates": keep})
        assert gates.shape == (D if keep and width else 0, rows, width)
        assert not gates.isnan().any()
        with_c = D if case.cell == "lstm" else 0
        assert c.shape == (with_c, rows, case.H) and not c.isnan().any()
        assert c_n.shape == (with_c, 3 if case.B is None else case.B, case.H)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.cell in ("gru", "lstm")])
@pytest.mark.parametrize("chunk", [0, 2])
def test_gates_computed_again(name, chunk):
    case = CASES[name]
    arguments = backward_arguments(case, chunk)
    kept = named(rnn_bwd(**arguments), case)
    *_, gates = rnn_fwd(**forward_arguments(case) | {"keep_gates": False})
    again = named(rnn_bwd(**arguments | {"gates": gates}), case)
    eps = torch.finfo(case.dtype).eps  # a GEMM over all steps sums in its own order
    assert_matches(again, kept, rtol=64 * eps)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "name", ["plain", "both directions", "packed", "batch first", "gru", "lstm, projection"]
)
@pytest.mark.parametrize("chunk", [0, 2])
def test_only_what_is_needed(name, chunk):
    case = CASES[name]
    full = named(rnn_bwd(**backward_arguments(case, chunk)), case)
    for needs in itertools.product((False, True), repeat=4):
        arguments = backward_arguments(case, chunk, needs)
        some = named(rnn_bwd(**arguments), case)
        for grad, tensor in some.items():
            index = {"dinput": 0, "dhx": 1, "dcx": 2}.get(grad, 3)
            if arguments["needs"][index]:
                assert_matches({grad: tensor}, {grad: full[grad]}, rtol=0)
            else:
                assert tensor.numel() == 0, f"{grad} was not asked for"


@pytest.mark.usefixtures("poisoned")
@every_case
def test_a_gradient_that_is_absent_is_zero(case):
    arguments = backward_arguments(case, 2)
    for name in ("grad_output", "grad_h_n", "grad_c_n"):
        if arguments[name] is None:
            continue
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


def projected(hh=(16, 2), hr=(2, 4)) -> list[torch.Tensor]:
    return [zeros(16, 3), zeros(*hh), zeros(16), zeros(16), zeros(*hr)]


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
    ("gru", "cell", "lstm", "weight"),
    ("gru", "cx", zeros(1, 3, 4), "cx"),
    ("gru", "hx", zeros(1, 3, 12), "hx"),
    ("gru", "weights", [zeros(11, 3), zeros(11, 4), zeros(11), zeros(11)], "weight_hh"),
    ("gru", "weights", [zeros(4, 3), zeros(12, 4), zeros(12), zeros(12)], "weight_ih"),
    ("gru", "weights", [zeros(12, 3), zeros(12, 4), zeros(12), zeros(4)], "bias_hh"),
    ("gru", "weights", [zeros(12, 3), zeros(12, 4), zeros(12), zeros(12), zeros(4, 4)], "weights"),
    ("lstm", "cell", "gru", "weight"),
    ("lstm", "hx", zeros(1, 2, 4), "hx"),
    ("lstm", "cx", zeros(1, 2, 4), "cx"),
    ("lstm", "cx", zeros(3, 4), "cx"),
    ("lstm", "cx", zeros(1, 3, 4, dtype=torch.float32), "cx"),
    ("lstm", "weights", [zeros(16, 3), zeros(16, 5), zeros(16), zeros(16)], "weight_hh"),
    ("lstm", "weights", [zeros(15, 3), zeros(15, 4), zeros(15), zeros(15)], "weight_hh"),
    ("lstm", "weights", [zeros(16, 3), zeros(16, 4), zeros(16)], "weights"),
    ("projected", "cx", zeros(1, 3, 2), "cx"),
    ("projected", "hx", zeros(1, 3, 4), "hx"),
    ("projected", "weights", projected(hr=(4, 2)), "weight_hr"),
    ("projected", "weights", projected(hr=(2,)), "weight_hr"),
    ("projected", "weights", projected(hh=(16, 4)), "hx|weight_h"),
    ("projected", "weights", projected(hh=(16, 0), hr=(0, 4)), "weight_hh"),
    ("projected", "weights", projected()[:4], "weight_hh"),
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
    ("plain", "k1", -1, "k1"),
    ("plain", "k1", -(2**40), "k1"),
    ("plain", "k2", 1, "k2"),
    ("both directions", "k2", 3, "k2"),
    ("plain", "num_windows", 1, "num_windows"),
    ("plain", "first_window", -1, "first_window"),
    ("plain", "first_window", 1, "first_window"),
    ("plain", "grad_by_lane", True, "grad_by_lane"),
    ("plain", "input_by_lane", True, "input_by_lane"),
    ("plain", "resets", zeros(5, 3), "resets must have dtype"),
    ("plain", "resets", zeros(3, 5, dtype=torch.bool), "resets must have shape"),
    ("plain", "resets", zeros(5, 3, dtype=torch.bool, device="meta"), "resets must be on"),
    ("plain", "kappa", zeros(5, 3, dtype=torch.float32), "kappa must have dtype"),
    ("plain", "kappa", zeros(5), "kappa must have shape"),
    ("packed", "kappa", zeros(5, 3), "kappa must have shape"),
    ("plain", "mask", zeros(5, 3, 4), "mask must have shape"),
    ("plain", "needs", [], "needs"),
    ("plain", "needs", [True, True], "needs"),
    ("plain", "needs", [True] * 5, "needs"),
    ("bare", "needs", [True, True, False, True], "hx"),
    ("plain", "needs", [True, True, True, True], "cx"),
    ("packed", "grad_output", zeros(8, 4), "grad_output"),
    ("packed", "batch_sizes", sizes(2, 3, 2, 1, 1), "batch_sizes"),
    ("packed", "batch_sizes", None, "input"),
    ("gru", "grad_c_n", zeros(1, 3, 4), "grad_c_n"),
    ("gru", "c", zeros(1, 15, 4), "c must"),
    ("gru", "gates", zeros(1, 15, 12), "gates"),
    ("gru", "gates", zeros(1, 15, 16, dtype=torch.float32), "gates"),
    ("gru", "needs", ALL, "cx"),
    ("lstm", "grad_c_n", zeros(3, 4), "grad_c_n"),
    ("lstm", "grad_c_n", zeros(1, 3, 4, dtype=torch.float32), "grad_c_n"),
    ("lstm", "c", zeros(0, 15, 4), "c must"),
    ("lstm", "c", zeros(1, 14, 4), "c must"),
    ("lstm", "gates", zeros(1, 15, 15), "gates"),
    ("lstm", "gates", zeros(2, 15, 16), "gates"),
    ("lstm", "cx", zeros(1, 2, 4), "cx"),
    ("lstm, packed, no hx", "needs", [True, False, True, True], "cx"),
    ("projected", "grad_output", zeros(5, 3, 4), "grad_output"),
    ("projected", "grad_h_n", zeros(1, 3, 4), "grad_h_n"),
    ("projected", "grad_c_n", zeros(1, 3, 2), "grad_c_n"),
    ("projected", "output", zeros(5, 3, 4), "output"),
]


def refuses(operator, arguments: dict[str, object], name: str, value: object, word: str) -> None:
    operator(**arguments)
    with pytest.raises((RuntimeError, ValueError), match=word) as caught:
        operator(**arguments | {name: value})
    assert "INTERNAL ASSERT" not in str(caught.value)


@pytest.mark.parametrize("case, name, value, word", BAD_FORWARD)
def test_bad_forward(case, name, value, word):
    refuses(rnn_fwd, forward_arguments(CASES[case]), name, value, word)


WINDOWS = {"k1": 2, "k2": 4}
BAD_WINDOWS = [
    {"num_windows": 4},
    {"num_windows": 2, "first_window": 2},
    {"num_windows": 2**62, "first_window": 2**62},
    {"first_window": 1},
    {"num_windows": -1},
    {"grad_by_lane": True},  # the gradient has the rows of all steps
    {"k1": 0},
]


@pytest.mark.parametrize("bad", BAD_WINDOWS, ids=str)
def test_bad_windows(bad):
    arguments = backward_arguments(CASES["plain"]) | WINDOWS
    rnn_bwd(**arguments)
    word = "grad_output" if "grad_by_lane" in bad else "first_window|num_windows|k2"
    with pytest.raises(RuntimeError, match=word):
        rnn_bwd(**arguments | bad)


@pytest.mark.parametrize("k1, k2", [(2**62, 2**62), (1, 2**62), (2**62, 2**63 - 1), (5, 9)])
def test_windows_longer_than_any_sequence(k1, k2):
    arguments = backward_arguments(CASES["lstm"])
    expected = named(rnn_bwd(**arguments), CASES["lstm"])
    actual = named(rnn_bwd(**arguments | {"k1": k1, "k2": k2}), CASES["lstm"])
    assert_matches(actual, expected)


@pytest.mark.parametrize("case, name, value, word", BAD_BACKWARD)
def test_bad_backward(case, name, value, word):
    refuses(rnn_bwd, backward_arguments(CASES[case], 2), name, value, word)


FORWARD_TENSORS = ["input", "hx", "cx"]
BACKWARD_TENSORS = ["grad_output", "grad_h_n", "grad_c_n", "output", "c", "gates"]


@pytest.mark.parametrize("name", FORWARD_TENSORS + BACKWARD_TENSORS)
def test_devices_do_not_mix(name):
    arguments = backward_arguments(CASES["lstm"])
    word = "device" if name == "input" else name  # then all others are on another than input's
    refuses(rnn_bwd, arguments, name, arguments[name].to("meta"), word)
    if name in FORWARD_TENSORS:
        refuses(rnn_fwd, forward_arguments(CASES["lstm"]), name, arguments[name].to("meta"), word)
