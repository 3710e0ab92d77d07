"""Which kernel runs a recurrence, and how it is divided: the planner, asked of emulated devices."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from random import Random

import pytest
import torch

from calls import Call
from common import CELLS, Case, assert_matches
from fastbptt import TBPTT
from test_modes import MODES, random_call
from test_persistent import VARIABLE, can_have, check, modes

pytestmark = pytest.mark.usefixtures("emulated_cuda", "poisoned", "default_limits")

# SMs of each GPC of an H100.
GPCS = [18, 18, 18, 16, 16, 16, 16, 14]
MEGAHERTZ = 1980
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture
def default_limits(emulation):
    """An H100's after the test."""
    yield
    emulation.set_limits()


def plan(cell: str, dtype: torch.dtype, H: int, lanes: int = 16, backward: bool = False) -> dict:
    like = torch.empty(0, dtype=dtype)
    return json.loads(torch.ops.fastbptt_emulated.cuda_plan(like, cell, H, lanes, backward))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("H", [64, 128, 256, 512, 768, 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
def test_one_wave_on_a_real_die(emulation, cell, dtype, H, backward):
    """Clusters of 16 are 7 there, not 132 / 16 = 8: an eighth would come after the others' end."""
    emulation.set_limits(gpcs=GPCS)
    # There is no room for the largest W_hh twice, and so for one team: eight lanes.
    is_largest = (cell, dtype, H) == ("lstm", torch.float32, 1024)
    lanes = 8 if is_largest else 16
    chosen = plan(cell, dtype, H, lanes, backward)
    assert chosen["kernel"] != "stepwise"
    assert chosen["waves"] == 1
    teams = -(-lanes // chosen["lanes"])
    at_once = sum(sms // chosen["cluster"] for sms in GPCS) * chosen["cluster"]
    blocks_of_sm = 16 // chosen["warps"]
    assert teams * chosen["blocks"] <= at_once * blocks_of_sm


@pytest.mark.parametrize(
    ("H", "backward", "microseconds"),
    [
        (64, False, 0.45),
        (64, True, 0.5),
        (512, False, 1.46),
        (768, False, 2.28),
        (768, True, 2.99),
        (1024, False, 2.44),
        (1024, True, 3.65),
    ],
)
def test_a_step_is_expected_to_take_what_it_took(emulation, H, backward, microseconds):
    """On an H100."""
    emulation.set_limits(gpcs=GPCS)
    cycles = plan("lstm", torch.float16, H, backward=backward)["cycles"]
    assert cycles == pytest.approx(microseconds * MEGAHERTZ, rel=0.1)


def test_many_lanes_are_worth_a_product_of_a_library(emulation):
    """They come in many waves, whose steps take longer in all."""
    assert plan("lstm", torch.float16, 512, lanes=4096)["kernel"] == "stepwise"
    assert plan("tanh", torch.float16, 64, lanes=100_000)["kernel"] == "stepwise"
    assert plan("lstm", torch.float16, 512, lanes=64)["kernel"] != "stepwise"


@pytest.mark.parametrize("capability", [100, 120])
@pytest.mark.parametrize("cell", CELLS)
def test_code_without_clusters(emulation, cell, capability):
    """The card has clusters, but what runs is compiled for one that has none."""
    emulation.set_limits(capability=capability, code=80)
    for H in (17, 64, 128, 256, 512, 1024):
        for backward in (False, True):
            chosen = plan(cell, torch.float16, H, backward=backward)
            assert chosen["kernel"] in ("lane", "resident", "stepwise", "grid")
            assert chosen.get("cluster", 1) == 1
    check(Call(Case(3, 4, 3, 130, cell=cell, dtype=torch.float32)))


def test_cards_without_clusters_have_a_grid(emulation):
    emulation.set_limits(capability=80, multiprocessors=108, shared_bytes=163 << 10)
    for H in (256, 512, 768, 1024):
        assert plan("lstm", torch.float16, H)["kernel"] == "grid"


def test_plans_are_made_once(emulation):
    emulation.set_limits(gpcs=GPCS)
    first = plan("lstm", torch.float16, 320)
    asked = emulation.questions()
    assert plan("lstm", torch.float16, 320) == first
    assert emulation.questions() == asked
    plan("lstm", torch.float16, 328)
    assert emulation.questions() > asked
    emulation.set_limits(capability=80)  # another device
    assert plan("lstm", torch.float16, 320) != first


@pytest.mark.parametrize("wish", ["auto", "lane", "resident", "cluster", "grid"])
def test_a_kernel_that_cannot_be_launched(emulation, monkeypatch, request, wish):
    """Another one runs, unless this one was asked for."""
    monkeypatch.setenv(VARIABLE, "stepwise")
    # The products of what runs then are the library's: all launches with shared memory are refused.
    call = Call(Case(5, 4, 3, 18, cell="lstm", dtype=torch.bfloat16), TBPTT(2, 4), "some")
    expected = call.ours()
    monkeypatch.setenv(VARIABLE, wish)
    emulation.set_limits()  # a device without plans
    emulation.refuse_launches(True)
    request.addfinalizer(lambda: emulation.refuse_launches(False))
    if wish != "auto":
        with pytest.raises(RuntimeError, match="a planted fault"):
            call.ours()
        return
    with warnings.catch_warnings(record=True):
        assert_matches(call.ours(), expected, rtol=0)
    emulation.refuse_launches(False)
    assert_matches(call.ours(), expected, rtol=0)  # it is not tried again


# Clusters in a grid, more lanes than there are, one lane a team.
DIVISIONS = [
    "lane",
    "resident:lanes=3",
    "cluster:cluster=2,lanes=2",
    "cluster:cluster=4,lanes=8",
    "grid:cluster=1,lanes=3",
    "grid:cluster=2,lanes=2",
    "grid:cluster=4,lanes=1",
]


@pytest.fixture(params=DIVISIONS)
def division(request, monkeypatch, emulation):
    monkeypatch.setenv(VARIABLE, request.param)
    if request.param.startswith("grid"):  # whose blocks are all emulated at once
        emulation.set_limits(multiprocessors=40)
    return request.param


@pytest.mark.slow(30)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("call", modes()[::3], ids=str)
def test_divisions(division, dtype, call):
    if dtype != torch.float32 and call.case.cell == "relu":
        pytest.skip("a rounding error at its kink is another derivative")
    check(call.in_dtype(dtype))


@pytest.mark.slow(3)
def test_divisions_in_any_order_of_threads(schedule, division):
    for cell in ("gru", "lstm"):
        case = Case(6, 9, 3, 40, cell=cell, dtype=torch.float16)
        check(Call(case, TBPTT(2, 4), "some"))


def test_divisions_over_many_steps(division):
    case = Case(50, 5, 3, 24, cell="lstm", lengths=(50, 3, 33, 17, 16), dtype=torch.bfloat16)
    check(Call(case, None, "some"))


def test_waves_of_a_grid(emulation, monkeypatch):
    """More lanes than teams that run at once."""
    emulation.set_limits(multiprocessors=5)
    monkeypatch.setenv(VARIABLE, "grid:lanes=2")
    assert plan("lstm", torch.float32, 40, lanes=11)["waves"] > 1
    check(Call(Case(5, 11, 3, 40, cell="lstm", dtype=torch.float32), None, "some"))


def random_division(rng: Random, cell: str, H: int) -> str:
    kernel = rng.choice(["lane", "resident", "cluster", "grid", "grid"])
    if kernel == "lane":  # which has no division to be chosen
        return kernel if can_have(kernel, cell, H) else "resident"
    parts = {"lanes": rng.choice([1, 2, 3, 5, 8])}
    if kernel != "resident":
        parts["cluster"] = rng.choice([1, 2, 4] if kernel == "grid" else [2, 4, 8])
    chosen = [f"{name}={n}" for name, n in parts.items() if rng.random() < 0.6]
    return kernel + (":" + ",".join(chosen) if chosen else "")


SEEDS = range(60 if os.environ.get("FASTBPTT_TEST_EXPLORE") == "1" else 3)


@pytest.mark.slow(15)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", MODES)
def test_random_calls_divided_at_random(emulation, monkeypatch, request, mode, seed):
    rng, call = Random(f"divided {mode} {seed}"), random_call(mode, seed)
    dtype = rng.choice(DTYPES)
    cell = call.case.cell
    # The rectifier's kink makes of a rounding error another derivative.
    cell = "tanh" if cell == "relu" and dtype != torch.float32 else cell
    # Of a few numbers the error is large by luck, where what they are the sums of cancels.
    sizes = {"H": rng.randint(8, 70), "I": rng.randint(3, 9)}
    case = dataclasses.replace(call.case, **sizes, proj=0, dtype=dtype, cell=cell)
    recompute = call.recompute and cell in ("gru", "lstm")
    monkeypatch.setenv(VARIABLE, random_division(rng, cell, case.H))
    emulation.set_limits(multiprocessors=rng.choice([8, 24, 40]))
    emulation.set_order(rng.choice(["forward", "reverse", "random"]), rng.random() < 0.5, seed)
    request.addfinalizer(lambda: emulation.set_order("forward"))
    every = ("output", "h_n", "c_n") if cell == "lstm" else ("output", "h_n")
    check(dataclasses.replace(call, case=case, dropout=0.0, recompute=recompute, through=every))


@pytest.mark.parametrize("H", [16, 17])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("wish", ["lane", "cluster"])
def test_rows_that_are_not_aligned(emulation, monkeypatch, wish, offset, H):
    """Two 16-bit numbers are fetched at a time only where both lie in four aligned bytes."""
    monkeypatch.setenv(VARIABLE, wish)
    case = Case(4, 3, 2, H, cell="gru", dtype=torch.float16)
    call = Call(case)
    module, (x, hx) = call.module(), case.data()
    x.requires_grad_()
    output, h_n = module(x, hx)
    gradient = torch.randn(output.numel() + offset, dtype=output.dtype)[offset:].view_as(output)
    (d_x,) = torch.autograd.grad(output, x, gradient.clone(), retain_graph=True)
    assert gradient.data_ptr() % 4 == 2 * offset
    (again,) = torch.autograd.grad(output, x, gradient)
    assert torch.equal(again, d_x)


@pytest.mark.parametrize(
    "wish",
    [
        "fast",
        "grid:",
        "grid:blocks=2",
        "grid:groups=2",
        "grid:lanes=0",
        "cluster:lanes=x",
        "grid:lanes=2,",
        "grid2",
        "auto:lanes=2",
        "lane:lanes=2",
    ],
)
def test_what_the_variable_takes(monkeypatch, wish):
    monkeypatch.setenv(VARIABLE, wish)
    with pytest.raises(RuntimeError, match=f'{VARIABLE} must be .*; got "{wish}"'):
        plan("lstm", torch.float16, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"H": 0}, "hidden_size must be positive, got 0"),
        ({"lanes": 0}, "lanes must be positive, got 0"),
        ({"cell": "rnn"}, 'got "rnn"'),
        ({"dtype": torch.int64}, "like must be of float64, float32, float16 or bfloat16, got Long"),
    ],
    ids=str,
)
def test_what_a_plan_takes(arguments, message):
    given = {"cell": "lstm", "dtype": torch.float16, "H": 64} | arguments
    with pytest.raises(RuntimeError, match=message):
        plan(**given)


def test_float64_runs_stepwise():
    assert plan("lstm", torch.float64, 64) == {"kernel": "stepwise", "cycles": 0}
