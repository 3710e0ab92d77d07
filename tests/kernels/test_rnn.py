"""The modules are torch.nn's: the same outputs and the same gradients, each by its name."""

from __future__ import annotations

import itertools
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import fastbptt
from common import (
    CELLS,
    SHAPES,
    Case,
    Results,
    assert_matches,
    detach_loop,
    once,
    referee,
    step,
    twin,
)

pytestmark = pytest.mark.usefixtures("poisoned")

LAYOUTS = {
    "padded": {},
    "unbatched": {"B": None},
    "sorted": {"lengths": (5, 3, 1)},
    "unsorted": {"lengths": (2, 5, 2)},
}
BOOLS = (False, True)

# The cells that kernels differ for, with the rest of what they are checked with: full, truncated.
KINDS = {
    "rnn": ({}, {"cell": "relu"}),
    "gru": ({"cell": "gru"}, {"cell": "gru"}),
    "lstm": ({"cell": "lstm"}, {"cell": "lstm"}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@once
def expected_of(case: Case, truncation) -> list[Results]:
    """The reference's results and, where torch has the same, torch's own."""
    module = case.module()
    double, call = referee(module, truncation)
    expected = [step(double, *case.data(), call=call)]
    if truncation is None and case.cell != "identity":
        expected.append(step(twin(module), *case.data()))
    return expected


def check(case: Case, truncation=None) -> None:
    actual = step(case.module(truncation=truncation), *case.data())
    for expected in expected_of(case, truncation):
        assert_matches(actual, expected)


@pytest.mark.parametrize("cell, proj", [*((cell, 0) for cell in CELLS), ("lstm", 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bidirectional", BOOLS, ids="bidirectional={}".format)
@pytest.mark.parametrize("layers", [1, 2, 3], ids="layers={}".format)
def test_every_option(layers, bidirectional, layout, cell, proj):
    """Any three of bias, batch_first, hx and truncation in every way, all four over the tests."""
    odd = (layers + bidirectional + list(LAYOUTS).index(layout)) % 2
    for bias, batch_first, hx in itertools.product(BOOLS, BOOLS, BOOLS):
        k = 2 if (bias + batch_first + hx) % 2 == odd else None
        case = Case(
            layers=layers,
            bidirectional=bidirectional,
            bias=bias,
            batch_first=batch_first,
            cell=cell,
            proj=proj,
            hx=hx,
            **LAYOUTS[layout],
        )
        check(case, k)


@every_kind
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, kind, isa, threads):
    assert fastbptt._C.cpu_isa() == isa
    full, truncated = KINDS[kind]
    check(Case(*shape, **full))
    check(Case(*shape, **truncated, hx=False), truncation=3)


# (T, B, I, H, R): projections narrow and almost as wide as the layer.
PROJECTIONS = [(3, 1, 2, 2, 1), (9, 1, 5, 64, 17), (6, 5, 9, 33, 32), (5, 13, 16, 130, 64)]


@pytest.mark.parametrize("shape", PROJECTIONS, ids=str)
def test_projections(shape, isa, threads):
    *sizes, proj = shape
    check(Case(*sizes, cell="lstm", proj=proj))
    check(Case(*sizes, cell="lstm", proj=proj, bias=False, hx=False), truncation=2)


@pytest.mark.parametrize("shape", [(6, 2, 9, 384), (5, 3, 40, 300), (4, 13, 8, 200)], ids=str)
@every_kind
@pytest.mark.parametrize("count", [4, 5, 8], ids="threads={}".format)
def test_batch_and_units_both_shared(shape, count, kind, isa):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        full, truncated = KINDS[kind]
        check(Case(*shape, **full))
        check(Case(*shape, **truncated), truncation=2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow(1)
@pytest.mark.parametrize("cell, truncation", [("tanh", None), ("gru", 1000), ("lstm", None)])
def test_a_very_long_sequence(cell, truncation):
    case = Case(66_000, 1, 1, 3, cell=cell, hx=False)  # more than 2^16 steps
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


@pytest.mark.slow(5)
@every_kind
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_shapes(lengths, kind, isa, threads):
    case = partial(Case, max(lengths), len(lengths), 5, 37, lengths=lengths)
    full, truncated = KINDS[kind]
    check(case(**full))
    check(case(layers=2, bidirectional=True, **truncated), truncation=4)


@st.composite
def cases(draw) -> tuple[Case, int | None]:
    T, B = draw(st.integers(1, 12)), draw(st.integers(1, 40))
    layout = draw(st.sampled_from(["padded", "unbatched", "packed"]))
    lengths = None
    if layout == "packed":
        lengths = draw(st.lists(st.integers(1, T), min_size=B, max_size=B).map(tuple))
    cell, H = draw(st.sampled_from(CELLS)), draw(st.integers(1, 140))
    case = Case(
        T=max(lengths) if lengths else T,
        B=None if layout == "unbatched" else B,
        I=draw(st.integers(1, 40)),
        H=H,
        layers=draw(st.integers(1, 3)),
        bidirectional=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        bias=draw(st.booleans()),
        cell=cell,
        proj=draw(st.integers(0, H - 1)) if cell == "lstm" else 0,
        hx=draw(st.booleans()),
        lengths=lengths,
        seed=draw(st.integers(0, 9)),
    )
    return case, draw(st.none() | st.integers(1, T + 2))


@given(cases())
def test_any_configuration(isa, threads, case_and_k):
    check(*case_and_k)


@pytest.mark.parametrize("shape", [(11, 29, 9, 70), (9, 1, 5, 256), (5, 3, 4, 300)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
def test_same_input_same_bits(cell, shape, dtype, isa, threads):
    case = Case(*shape, layers=2, bidirectional=True, cell=cell, dtype=dtype)
    module = case.module(truncation=4)
    first = step(module, *case.data())
    for _ in range(5):
        assert_matches(step(module, *case.data()), first, rtol=0)
