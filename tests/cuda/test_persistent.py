"""The kernels that keep W_hh on the chip, emulated, each by force, against the reference."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cuda_calls
import fastbptt
from calls import Call
from common import CELLS, Case, Results, assert_as_exact, assert_matches, once
from fastbptt import TBPTT, Sliding
from test_modes import expected_of, peer_of

ROOT = Path(__file__).parents[2]
VARIABLE = "FASTBPTT_CUDA_KERNEL"
HALVES = cuda_calls.DTYPES[1:]

pytestmark = pytest.mark.usefixtures("emulated_cuda", "poisoned", "default_limits")


@pytest.fixture
def default_limits(emulation):
    """An H100's after the test."""
    yield
    emulation.set_limits()


@pytest.fixture(params=["lane", "resident", "cluster", "grid"])
def kernel(request, monkeypatch, emulation):
    monkeypatch.setenv(VARIABLE, request.param)
    if request.param == "grid":  # whose blocks are all emulated at once
        emulation.set_limits(multiprocessors=40)
    return request.param


def can_have(kernel: str, cell: str, H: int) -> bool:
    """Whether a block has room for W_hh."""
    if kernel == "lane":
        return H <= {"gru": 80, "lstm": 64}.get(cell, 128)
    return kernel != "resident" or H <= 96 or cell == "tanh"


def overlaps(truncation) -> bool:
    return (
        isinstance(truncation, Sliding)
        or isinstance(truncation, TBPTT)
        and (truncation.k2 > truncation.k1)
    )


def modes() -> list[Call]:
    """Every cell and truncation, by turns with what else there is."""
    calls = []
    for cell in CELLS:
        for truncation in cuda_calls.TRUNCATIONS:
            i = len(calls)
            options = {
                "lengths": cuda_calls.LENGTHS if i % 2 else None,
                "layers": 1 + i // 3 % 2,
                "bidirectional": i % 3 == 0 and not overlaps(truncation),
                "batch_first": i % 4 == 0,
                "bias": i % 5 > 0,
                "hx": i % 7 > 0,
            }
            case = Case(7, 5, 3, 17, cell=cell, dtype=torch.float32, **options)
            recompute = cell in ("gru", "lstm") and i % 4 == 1
            calls.append(Call(case, truncation, "some" if i % 3 else "none", recompute=recompute))
    return calls


def check(call: Call, device: str = "cpu") -> None:
    """The error is at most twice that of torch's own operations in the dtype, step after step."""
    assert_as_exact(call.ours(device), peer_of(call), expected_of(call))


@pytest.mark.slow(40)
@pytest.mark.parametrize("call", modes(), ids=str)
def test_modes(kernel, call):
    check(call)


@pytest.mark.slow(40)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("call", [call for call in modes() if call.case.cell != "relu"], ids=str)
def test_modes_in_16_bits(kernel, call, dtype):
    """Not the rectifier: a rounding error at its kink is another derivative."""
    check(call.in_dtype(dtype))


SIZES = [
    *[(1, 1, 1), (4, 3, 33), (4, 17, 33), (3, 3, 80), (3, 1, 96), (3, 17, 96)],
    *[(3, 5, 128), (2, 3, 130), (2, 9, 130)],
]


# One multiprocessor to a cluster: eight lanes in each. Many: one.
@pytest.mark.slow(10)
@pytest.mark.parametrize("clusters", [1, 100])
@pytest.mark.parametrize("dtype", cuda_calls.DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(emulation, kernel, size, dtype, clusters):
    T, B, H = size
    blocks = 1 if kernel in ("lane", "resident") else 16
    emulation.set_limits(multiprocessors=clusters * blocks)
    if kernel == "grid" and clusters > 1:
        emulation.set_limits(multiprocessors=40)
    for cell in ("tanh", "gru", "lstm"):
        if kernel == "resident" and H >= 128 and clusters == 1:
            continue  # of eight lanes
        if can_have(kernel, cell, H):
            check(Call(Case(T, B, 3, H, cell=cell, dtype=dtype)))


@pytest.mark.slow(2)
@pytest.mark.parametrize("dtype", cuda_calls.DTYPES, ids=str)
@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
def test_errors_of_rounding(kernel, cell, dtype):
    case = Case(20, 20, 12, 33, cell=cell, dtype=dtype)
    assert_as_exact(*cuda_calls.rounded_results(case, "cpu"))


@pytest.fixture(params=["fp32_precision", "allow_tf32"])
def tf32(request):
    """Turns rounding of float32 products' operands on, by torch's new and old setting."""
    matmul, values = torch.backends.cuda.matmul, {"fp32_precision": ("ieee", "tf32")}
    off, on = values.get(request.param, (False, True))
    yield lambda: setattr(matmul, request.param, on)
    setattr(matmul, request.param, off)


class RoundedOperands(TorchDispatchMode):
    """Products whose operands have tf32's 10 explicit bits of mantissa, as torch's on a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            added, operands = args[:-2], args[-2:]
            args = (*added, *map(round_to_tf32, operands))
        return function(*args, **kwargs or {})


def round_to_tf32(values: Tensor) -> Tensor:
    return ((values.contiguous().view(torch.int32) + 2**12) & ~(2**13 - 1)).view(torch.float32)


@once
def peer_in_tf32(call: Call) -> Results:
    with RoundedOperands():
        return call.reference(torch.float32)


def check_in_tf32(call: Call, turn_on: Callable, device: str = "cpu") -> None:
    exact = call.ours(device)
    turn_on()
    rounded = call.ours(device)
    assert not torch.equal(rounded["output"], exact["output"])
    assert_as_exact(rounded, peer_in_tf32(call), expected_of(call))


@pytest.mark.slow(20)
@pytest.mark.parametrize("call", [call for call in modes() if call.case.cell != "relu"], ids=str)
def test_modes_in_tf32(kernel, call, tf32):
    if kernel == "lane":
        pytest.skip("its products are of float32 as it is")
    check_in_tf32(call, tf32)


@pytest.mark.slow(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_order_of_threads(kernel, schedule, dtype):
    for cell, truncation in (("lstm", None), ("gru", TBPTT(2, 4))):
        check(Call(Case(6, 9, 3, 33, cell=cell, dtype=dtype), truncation, "some"))


@pytest.mark.parametrize("truncation", [None, Sliding(4)], ids=str)
def test_places_over_many_steps(kernel, truncation):
    for call in cuda_calls.uneven_calls(truncation):
        check(call)


@pytest.mark.slow(3)
@pytest.mark.parametrize("call", cuda_calls.long_calls(40, 17, 40), ids=str)
def test_many_steps(kernel, call):
    check(call)


@pytest.fixture(params=[1, 30_000])  # bytes: a window in each group; a few
def workspace_limit(request, workspace_limit_restored):
    fastbptt.set_workspace_limit(request.param)


@pytest.mark.slow(4)
@pytest.mark.parametrize("dtype", cuda_calls.DTYPES, ids=str)
@pytest.mark.parametrize("truncation", [TBPTT(2, 5), Sliding(4)], ids=str)
def test_windows_in_groups(kernel, workspace_limit, truncation, dtype):
    for layers in (1, 2):
        case = Case(30, 3, 5, 17, layers, cell="lstm", dtype=dtype)
        check(Call(case, truncation, "some"))


def test_same_bits_each_time(kernel, emulation):
    call = Call(Case(6, 5, 3, 33, cell="lstm", dtype=torch.float32), TBPTT(2, 4), "some")
    first = call.ours()
    emulation.set_order("reverse", True)
    again = call.ours()
    emulation.set_order("forward")
    assert_matches(again, first, rtol=0)


def test_the_table_in_the_docs():
    """tools/cuda_table.py has been run since the last change of what it tells."""
    tool = str(ROOT / "tools" / "cuda_table.py")
    printed = subprocess.run(
        [sys.executable, tool, "--print"], check=True, capture_output=True, encoding="utf-8"
    ).stdout
    assert printed in (ROOT / "docs" / "cuda_kernels.md").read_text(encoding="utf-8")


def outputs(monkeypatch, wish: str, case: Case):
    monkeypatch.setenv(VARIABLE, wish)
    return Call(case).ours()["output"]


def test_choice(emulation, monkeypatch):
    small = Case(5, 4, 3, 33, cell="lstm", dtype=torch.float32)
    wishes = ("stepwise", "lane", "resident", "cluster")
    of = {wish: outputs(monkeypatch, wish, small) for wish in wishes}
    assert len({tuple(o.flatten().tolist()) for o in of.values()}) == len(wishes)
    assert torch.equal(outputs(monkeypatch, "auto", small), of["lane"])
    large = dataclasses.replace(small, H=130)
    assert torch.equal(outputs(monkeypatch, "auto", large), outputs(monkeypatch, "cluster", large))
    emulation.set_limits(capability=80)  # it has no clusters
    assert torch.equal(outputs(monkeypatch, "auto", large), outputs(monkeypatch, "grid", large))
    many = dataclasses.replace(small, B=48)
    emulation.set_limits(multiprocessors=1)  # as many waves as tiles
    assert torch.equal(outputs(monkeypatch, "auto", many), outputs(monkeypatch, "resident", many))
    long = dataclasses.replace(many, T=64)  # its steps are replayed from a graph
    assert torch.equal(outputs(monkeypatch, "auto", long), outputs(monkeypatch, "stepwise", long))


@pytest.mark.parametrize(
    ("wish", "case", "message"),
    [
        ("fast", Case(), f"{VARIABLE} must be auto, stepwise, lane, resident, cluster or grid"),
        ("resident", Case(), f"{VARIABLE}=resident: there is no such kernel for float64"),
        ("lane", Case(H=97, cell="lstm", dtype=torch.float32), "so many hidden units"),
        ("cluster", Case(cell="lstm", proj=2, dtype=torch.float32), "an LSTM with projections"),
        ("resident", Case(H=1100, dtype=torch.float32), "so many hidden units"),
        ("cluster", Case(H=3000, dtype=torch.float32), "so many hidden units"),
    ],
)
def test_what_cannot_be_had(monkeypatch, wish, case, message):
    monkeypatch.setenv(VARIABLE, wish)
    with pytest.raises(RuntimeError, match=message):
        Call(case).ours()
