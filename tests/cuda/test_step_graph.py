"""The stepwise kernels' steps, captured once and replayed: emulated, against the plain loop."""

from __future__ import annotations

import dataclasses
import itertools
import warnings

import pytest
import torch

import cuda_calls
from calls import Call, Gates
from common import CELLS, Case, assert_as_exact, assert_matches
from fastbptt import TBPTT, Chunked, Sliding
from test_modes import expected_of, peer_of
from test_operators import backward_arguments, rnn_bwd

STEPS, FIRST, FEWEST = 16, 3, 64  # of a graph; before its capture; with which it is worth its while

pytestmark = pytest.mark.usefixtures("emulated_cuda", "poisoned", "stepwise", "no_fault")


@pytest.fixture
def stepwise(monkeypatch):
    monkeypatch.setenv("FASTBPTT_CUDA_KERNEL", "stepwise")


@pytest.fixture
def no_fault(emulation):
    emulation.set_graph_fault()
    yield
    emulation.set_graph_fault()


@pytest.fixture
def warnings_always():
    """Those that are given once in the life of a process too."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)


def replays(steps: int) -> int:
    """Of a pass with so many steps."""
    return (steps - FIRST) // STEPS if steps >= FEWEST else 0


def plain(emulation, run):
    """What a run gives without graphs, as while the caller captures one."""
    emulation.set_graph_fault("captured")
    results = run()
    assert emulation.set_graph_fault() == 0
    return results


def modes() -> list[Call]:
    """Every cell and truncation, by turns with what else there is."""
    calls = []
    for cell, truncation in itertools.product(
        CELLS,
        (None, Chunked(70), TBPTT(3, 66), TBPTT(40, 70, "last"), Sliding(67), Gates(True)),
    ):
        i = len(calls)
        options = {
            "bidirectional": i % 3 == 0 and not isinstance(truncation, (TBPTT, Sliding)),
            "batch_first": i % 4 == 0,
            "bias": i % 5 > 0,
            "hx": i % 7 > 0,
            "proj": 2 * (cell == "lstm" and i % 2),
        }
        case = Case(72, 3, 2, 5, cell=cell, dtype=torch.float32, **options)
        recompute = cell in ("gru", "lstm") and i % 4 == 1
        calls.append(Call(case, truncation, "some" if i % 3 else "none", recompute=recompute))
    return calls


@pytest.mark.slow(5)
@pytest.mark.parametrize("call", modes(), ids=str)
def test_modes(emulation, call):
    """As exact as torch's own operations, and the plain loop's bits."""
    results = call.ours()
    directions = 1 + call.case.bidirectional
    forward, all_of = directions * replays(72), emulation.set_graph_fault()
    assert all_of > forward > 0  # both passes
    assert_as_exact(results, peer_of(call), expected_of(call))
    assert_matches(plain(emulation, call.ours), results, rtol=0)


@pytest.mark.slow(1)
@pytest.mark.parametrize("dtype", [*cuda_calls.DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_dtypes(emulation, cell, dtype):
    case = Case(68, 2, 3, 17, cell=cell, dtype=dtype, proj=3 * (cell == "lstm"))
    call = Call(case, Sliding(65), "some")
    results = call.ours()
    assert emulation.set_graph_fault() > 0
    if dtype == torch.float64:
        assert_matches(results, expected_of(call), rtol=1e-10)
    elif cell != "relu":  # a rounding error at its kink is another derivative
        assert_as_exact(results, peer_of(call), expected_of(call))
    assert_matches(plain(emulation, call.ours), results, rtol=0)


@pytest.mark.parametrize("T", [1, 3, 63, 64, 66, 67, 68, 80, 82, 83, 84, 115])
def test_number_of_steps(emulation, T):
    for cell, hx in itertools.product(("tanh", "gru", "lstm"), (False, True)):
        call = Call(Case(T, 2, 3, 4, cell=cell, hx=hx))
        results = call.ours()
        assert emulation.set_graph_fault() == 2 * replays(T)
        assert_matches(results, expected_of(call), rtol=1e-10)
        assert_matches(plain(emulation, call.ours), results, rtol=0)


@pytest.mark.slow(1)
@pytest.mark.parametrize("truncation", [TBPTT(2, 65), Sliding(66)], ids=str)
def test_rows_by_lane(emulation, truncation):
    """The gradient of input in two layers, whose lower one's windows overlap."""
    for dtype in (torch.float32, torch.bfloat16):
        call = Call(Case(70, 2, 3, 5, 2, cell="gru", dtype=dtype), truncation, dropout=0.3)
        results = call.ours()
        assert emulation.set_graph_fault() > 2 * replays(70)
        assert_matches(plain(emulation, call.ours), results, rtol=0)
    assert_matches(
        Call(Case(70, 2, 3, 5, 2, cell="gru"), truncation).ours(),
        expected_of(Call(Case(70, 2, 3, 5, 2, cell="gru"), truncation)),
        rtol=1e-10,
    )


def test_input_by_lane(emulation):
    arguments = backward_arguments(Case(70, 3, 3, 5, cell="lstm"))
    arguments |= {"k1": 2, "k2": 66, "input_by_lane": True}
    emulation.set_graph_fault()
    results = rnn_bwd(**arguments)
    assert emulation.set_graph_fault() == replays(66)
    for a, b in zip(results, plain(emulation, lambda: rnn_bwd(**arguments)), strict=True):
        assert (a is None and b is None) or all(map(torch.equal, a, b))


LENGTHS = (80, 70, 3)


def test_packed(emulation):
    """From step to step there are fewer rows: no graph, but where windows make them all alike."""
    case = Case(80, 3, 2, 4, cell="gru", lengths=LENGTHS)
    for truncation, graphs in ((None, 0), (Sliding(66), replays(66))):
        call = Call(case, truncation, "some")
        results = call.ours()
        assert emulation.set_graph_fault() == graphs
        assert_matches(results, expected_of(call), rtol=1e-10)


@pytest.mark.slow(3)
def test_in_another_order_of_threads(emulation, schedule):
    for truncation in (None, Sliding(64)):
        call = Call(Case(68, 5, 3, 33, cell="lstm", proj=2), truncation, "some")
        assert_matches(call.ours(), expected_of(call), rtol=1e-10)
    assert emulation.set_graph_fault() > 0


@pytest.mark.parametrize("fault", ["stream", "begin", "inside", "end", "replay"])
def test_no_graph_to_be_had(emulation, warnings_always, fault):
    """Then the plain loop goes on where the steps have got to, and says so."""
    call = Call(Case(99, 3, 2, 5, cell="lstm", proj=2), Gates(), "some")
    expected = plain(emulation, call.ours)
    emulation.set_graph_fault(fault)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = call.ours()
    assert emulation.set_graph_fault() == 2 * 2 * (fault == "replay")  # two replays in each pass
    told = [str(w.message) for w in caught if "CUDA graph" in str(w.message)]
    assert len(told) == 2 and "one by one instead: a planted fault" in told[0]  # a pass
    assert_matches(results, expected, rtol=0)


def test_steps_that_allocate_are_not_captured(emulation):
    call = Call(Case(70, 3, 2, 5, cell="gru"))
    expected = plain(emulation, call.ours)
    emulation.set_graph_fault("allocates")
    assert_matches(call.ours(), expected, rtol=0)
    assert emulation.set_graph_fault() == 0


def test_auto_replays_where_no_other_kernel_runs(emulation, monkeypatch):
    monkeypatch.setenv("FASTBPTT_CUDA_KERNEL", "auto")
    small = Case(70, 2, 3, 5, cell="lstm", dtype=torch.float32)
    for case, graphs in ((small, 0), (dataclasses.replace(small, proj=2), 2 * replays(70))):
        Call(case).ours()
        assert emulation.set_graph_fault() == graphs


def test_a_graph_for_each_pass(emulation):
    """Two layers and two directions, with what each reads at other addresses."""
    call = Call(Case(66, 2, 3, 4, 2, True, cell="gru"), Chunked(65), "some")
    assert_matches(call.ours(), expected_of(call), rtol=1e-10)
    assert emulation.set_graph_fault() == 8 * replays(66) - 4 * (replays(66) - replays(65))
