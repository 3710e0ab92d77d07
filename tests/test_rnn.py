"""fastbptt.RNN is torch.nn.RNN: the same outputs and the same gradients, each by its name."""

from __future__ import annotations

import itertools
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import fastbptt
from common import SHAPES, Case, assert_matches, detach_loop, referee, step, twin

pytestmark = pytest.mark.usefixtures("poisoned")

LAYOUTS = {
    "padded": {},
    "unbatched": {"B": None},
    "sorted": {"lengths": (5, 3, 1)},
    "unsorted": {"lengths": (2, 5, 2)},
}
BOOLS = (False, True)


def check(case: Case, truncation=None) -> None:
    """Against the reference and, where torch has the same, against torch itself."""
    module = case.module(truncation=truncation)
    actual = step(module, *case.data())
    double, call = referee(module, truncation)
    assert_matches(actual, step(double, *case.data(), call=call))
    if truncation is None and case.nonlinearity != "identity":
        assert_matches(actual, step(twin(module), *case.data()))


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "identity"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bidirectional", BOOLS, ids="bidirectional={}".format)
@pytest.mark.parametrize("layers", [1, 2, 3], ids="layers={}".format)
def test_every_option(layers, bidirectional, layout, nonlinearity):
    for bias, batch_first, hx, k in itertools.product(BOOLS, BOOLS, BOOLS, (None, 2)):
        case = Case(
            layers=layers,
            bidirectional=bidirectional,
            bias=bias,
            batch_first=batch_first,
            nonlinearity=nonlinearity,
            hx=hx,
            **LAYOUTS[layout],
        )
        check(case, k)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, isa, threads):
    assert fastbptt._C.cpu_isa() == isa
    T, B, I, H = shape
    check(Case(T, B, I, H))
    check(Case(T, B, I, H, nonlinearity="relu", hx=False), truncation=3)


@pytest.mark.parametrize("shape", [(6, 2, 9, 384), (5, 3, 40, 300), (4, 13, 8, 200)], ids=str)
@pytest.mark.parametrize("count", [4, 5, 8], ids="threads={}".format)
def test_batch_and_units_both_shared(shape, count, isa):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        check(Case(*shape))
        check(Case(*shape), truncation=2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("truncation", [None, 1000])
def test_a_very_long_sequence(truncation):
    case = Case(70_000, 1, 1, 3, hx=False)  # more than 2^16 steps
    module = case.module(truncation=truncation)
    actual, other = step(module, *case.data()), twin(module)
    expected = step(other, *case.data(), call=detach_loop(other, truncation or case.T))
    assert_matches(actual, expected)


# Packed rows dwindle step by step, through every tile size from the batch down to one row.
LENGTHS = {
    "dwindling": tuple(range(1, 31)),
    "one long": (40, 1, 1, 1, 1),
    "equal": (4,) * 19,
    "steps": (3, 9, 9, 3, 1, 9, 3, 17),
    "alone": (6,),
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_shapes(lengths, isa, threads):
    case = partial(Case, max(lengths), len(lengths), 5, 37, lengths=lengths)
    check(case())
    check(case(layers=2, bidirectional=True), truncation=4)


@st.composite
def cases(draw) -> tuple[Case, int | None]:
    T, B = draw(st.integers(1, 12)), draw(st.integers(1, 40))
    layout = draw(st.sampled_from(["padded", "unbatched", "packed"]))
    lengths = None
    if layout == "packed":
        lengths = draw(st.lists(st.integers(1, T), min_size=B, max_size=B).map(tuple))
    case = Case(
        T=max(lengths) if lengths else T,
        B=None if layout == "unbatched" else B,
        I=draw(st.integers(1, 40)),
        H=draw(st.integers(1, 140)),
        layers=draw(st.integers(1, 3)),
        bidirectional=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        bias=draw(st.booleans()),
        nonlinearity=draw(st.sampled_from(["tanh", "relu", "identity"])),
        hx=draw(st.booleans()),
        lengths=lengths,
        seed=draw(st.integers(0, 9)),
    )
    return case, draw(st.none() | st.integers(1, T + 2))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases())
def test_any_configuration(isa, threads, case_and_k):
    check(*case_and_k)


@pytest.mark.parametrize("shape", [(11, 29, 9, 70), (9, 1, 5, 256), (5, 3, 4, 300)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_input_same_bits(shape, dtype, isa, threads):
    case = Case(*shape, layers=2, bidirectional=True, dtype=dtype)
    module = case.module(truncation=4)
    first = step(module, *case.data())
    for _ in range(5):
        assert_matches(step(module, *case.data()), first, rtol=0)
