"""The emulated CUDA steps of tangent passes, by themselves, against autograd through a loop."""

from __future__ import annotations

import pytest
import torch

from common import CELLS, assert_matches
from tangent_calls import (
    COLUMNS,
    GATES,
    Problem,
    Steps,
    cases,
    check_backward,
    check_backward_of_values,
    check_forward,
    run_backward,
    run_forward,
    there,
)

pytestmark = pytest.mark.usefixtures("guarded", "poisoned")


@pytest.fixture
def guarded(emulation):
    yield
    emulation.check_guards()


every_case = pytest.mark.parametrize("steps", cases(), ids=str)
projected_or_not = pytest.mark.parametrize(
    ("cell", "R"), [*((cell, 0) for cell in CELLS), ("lstm", 2)]
)


@every_case
def test_forward(steps):
    check_forward(steps)


@every_case
def test_backward(steps):
    check_backward(steps)


@every_case
def test_backward_of_values(steps):
    check_backward_of_values(steps)


@pytest.mark.parametrize("cell", CELLS)
def test_only_what_is_given_and_needed(cell):
    """Gradients that are absent are zeros, and no gradient of a state comes that is not needed."""
    problem = Problem(Steps(cell, gated=False))
    zeros = dict.fromkeys(("d_h_n", "d_h_n_t", "d_c_n", "d_c_n_t", "d_output_t"))
    for name in ("d_h_n", "d_c_n"):
        problem.primals[name].zero_()
    for name in ("d_h_n", "d_c_n", "d_output"):
        problem.tangents[name].zero_()
    states = problem.states()
    for actual, truth in zip(
        run_backward(problem, *states, **zeros, needs_states=False),
        problem.backward(),
        strict=True,
    ):
        assert_matches(there(actual), {"pre": truth["pre"]}, rtol=1e-10)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@projected_or_not
def test_closed_gates_stop_everything(cell, R, bad, reverse):
    steps = Steps(cell, reverse, R=R)
    problem, (T, row) = Problem(steps), (max(steps.lengths), steps.rows())
    boundary = [row[2, b] for b in range(len(steps.lengths))]  # between steps 1 and 2
    early, late = range(2), range(2, T)
    gate = torch.ones(len(row), dtype=torch.float64)
    gate[boundary] = 0
    problem.gate = gate
    values, tangents = problem.states()
    first, second = (late, early) if reverse else (early, late)

    def at(which) -> list[int]:
        return [row[t, b] for t in which for b in range(len(steps.lengths))]

    unspoilt = run_forward(problem, values)["output"][at(second)]
    problem.tangents["pre"][at(first)] = bad
    spoilt = run_forward(problem, values)["output"]
    assert not spoilt[at(first)].isfinite().all()
    assert_matches({"output": spoilt[at(second)]}, {"output": unspoilt}, rtol=0)

    problem.primals["d_output"][at(first)] = 1.0
    unspoilt = run_backward(problem, values, tangents)
    for of in (problem.primals, problem.tangents):
        of["d_output"][at(second)] = bad
    for actual, expected in zip(run_backward(problem, values, tangents), unspoilt, strict=True):
        assert not actual["pre"][at(second)].isfinite().all()
        for name in ("hx", *["cx"] * (cell == "lstm")):
            assert_matches({name: actual[name]}, {name: expected[name]}, rtol=0)
        assert_matches(
            {"pre": actual["pre"][at(first)]}, {"pre": expected["pre"][at(first)]}, rtol=0
        )


@projected_or_not
def test_float32(cell, R):
    """As exact as float32's eps, with what it is given rounded."""
    problem = Problem(Steps(cell, R=R, H=9, lengths=(12,) * 3))
    values, tangents = problem.states()
    pairs = [
        (run_forward(problem, values, torch.float32), run_forward(problem, values)),
        *zip(
            run_backward(problem, values, tangents, torch.float32),
            run_backward(problem, values, tangents),
            strict=True,
        ),
    ]
    for actual, expected in pairs:
        for name, result in actual.items():
            assert result.dtype == torch.float32
            if result.numel() == 0:
                continue
            error = (result - expected[name]).abs().max()
            assert error <= 64 * torch.finfo(torch.float32).eps * expected[name].abs().max(), name


@pytest.mark.parametrize("cell", CELLS)
def test_empty_batch(cell):
    empty = torch.empty
    states = {"gates": empty(0, 4 * 3), "c": empty(0, 3), "before": empty(0, 3)}
    common = {"gate": None, "w_hh": torch.randn(GATES.get(cell, 1) * 3, 3), "w_hr": None}
    common |= {"batch_sizes": None, "T": 4, "batch_first": False, "reverse": False, "cell": cell}
    operators = torch.ops.fastbptt_emulated
    pre = empty(0, COLUMNS.get(cell, 1) * 3)
    forward = operators.rnn_jvp_steps(pre, None, None, None, output=empty(0, 3), **states, **common)
    none = dict.fromkeys(("d_output", "d_output_t", "d_h_n", "d_h_n_t", "d_c_n", "d_c_n_t"))
    tangents = {f"{name}_t": value for name, value in states.items()}
    backward = operators.rnn_bwd_jvp_steps(
        **none,
        output=empty(0, 3),
        output_t=empty(0, 3),
        **states,
        **tangents,
        needs_states=True,
        **common,
    )
    assert not any(result.numel() for result in (*forward, *backward))
