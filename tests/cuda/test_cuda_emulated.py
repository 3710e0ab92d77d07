"""The CUDA kernels without a GPU: their own sources as C++, in the modules and by themselves."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

import cuda_calls
import fastbptt
from calls import Call
from common import CELLS, Case, assert_as_exact, assert_matches, parts, tensors_of, twin, whole
from fastbptt import Chunked
from test_modes import (  # noqa: F401  (run here once more, over the CUDA kernels)
    LARGER,
    MODES,
    expected_of,
    random_call,
    test_gates_and_resets_that_are_views,
    test_gradients_only_where_asked_for,
    test_little_workspace,
    test_windows_as_long_as_the_sequence,
    workspace_limit,
)
from test_operators import (  # noqa: F401
    backward_arguments,
    rnn_bwd,
    test_a_gradient_that_is_absent_is_zero,
    test_arguments_stay_as_they_are,
    test_bad_backward,
    test_bad_forward,
    test_bad_windows,
    test_called_directly,
    test_devices_do_not_mix,
    test_gates_computed_again,
    test_only_what_is_needed,
    test_what_is_kept,
    test_windows_in_groups_add_up,
)

pytestmark = pytest.mark.usefixtures("emulated_cuda", "poisoned", "stepwise")


@pytest.fixture
def stepwise(monkeypatch):
    """The kernels that run everything; test_persistent.py has the others."""
    monkeypatch.setenv("FASTBPTT_CUDA_KERNEL", "stepwise")


def test_the_kernels_are_the_emulated_ones():
    case = Case(dtype=torch.bfloat16)  # in which the CPU has none
    assert cuda_calls.operators_step(case, "cpu")["output"].dtype == torch.bfloat16


@pytest.mark.parametrize("call", [*cuda_calls.grid(), *cuda_calls.ODD, *LARGER], ids=str)
def test_calls(call):
    assert_matches(call.ours(), expected_of(call), rtol=1e-10)


@pytest.mark.slow(80)
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("mode", MODES)
def test_random_calls(mode, seed):
    call = random_call(mode, seed)
    assert_matches(call.ours(), expected_of(call), rtol=1e-10)


@pytest.mark.parametrize("lengths", [None, (7, 4, 1)], ids=["padded", "packed"])
@pytest.mark.parametrize("dropout", [False, True])
def test_rows_by_lane(lengths, dropout):
    """The gradient of input by lane: [k, window, sequence], zeros for steps that are not there."""
    case, k1, k2 = Case(7, 3, 3, 5, cell="gru", lengths=lengths), 2, 5
    arguments = backward_arguments(case) | {"k1": k1, "k2": k2}
    if dropout:
        arguments["mask"] = torch.rand_like(arguments["input"])
    expected, *_ = rnn_bwd(**arguments)
    rows, *_ = rnn_bwd(**arguments, input_by_lane=True)
    windows = -(-case.T // k1)
    rows, total = rows.view(k2, windows, case.B, case.I), torch.zeros_like(expected)
    for k, window, b in itertools.product(range(k2), range(windows), range(case.B)):
        length = case.T if lengths is None else lengths[b]
        t = min((window + 1) * k1, length) - 1 - k
        if window * k1 >= length or t < max(0, (window + 1) * k1 - k2):
            assert not rows[k, window, b].any()
        elif lengths is None:
            total[t, b] += rows[k, window, b]
        else:
            total[arguments["batch_sizes"][:t].sum() + b] += rows[k, window, b]
    assert_matches({"dinput": total}, {"dinput": expected})


def test_input_without_features():
    """What no module has, and the function does."""
    case = Case(5, 2, 3, 4, cell="gru")
    weights = {name.removesuffix("_l0"): p.detach() for name, p in case.module().named_parameters()}
    weights["weight_ih"] = weights["weight_ih"][:, :0]
    results = []
    for namespace in (fastbptt, fastbptt.reference):
        leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
        output, h_n = namespace.gru(torch.zeros(5, 2, 0, dtype=torch.float64), None, **leaves)
        (output.square().sum() + h_n.sum()).backward()
        results.append({"output": output.detach(), **{n: p.grad for n, p in leaves.items()}})
    assert_matches(*results)


@pytest.mark.slow(1)
@pytest.mark.parametrize("dtype", cuda_calls.DTYPES, ids=str)
@pytest.mark.parametrize("case", cuda_calls.ROUNDED, ids=str)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_errors_of_rounding(case, dtype):
    case = dataclasses.replace(case, dtype=dtype)
    assert_as_exact(*cuda_calls.rounded_results(case, "cpu"))


def test_errors_of_activations():
    """With reciprocals as inexact as a GPU's may be."""
    errors = cuda_calls.errors_of_activations("cpu")
    assert max(errors.values()) <= 2.5, errors


@pytest.mark.parametrize("dtype", cuda_calls.DTYPES[1:], ids=str)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_gates_computed_again_in_16_bits(cell, dtype):
    case = Case(12, 5, 4, 17, cell=cell, dtype=dtype)
    kept, again = (cuda_calls.operators_step(case, "cpu", recompute) for recompute in (False, True))
    eps = torch.finfo(dtype).eps  # the rounded state is the product's operand both times
    assert_matches(again, kept, rtol=16 * eps)


@pytest.mark.parametrize("dtype", cuda_calls.DTYPES[1:], ids=str)
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell != "relu"])  # it has a kink
def test_windows_in_16_bits(cell, dtype):
    """The sum over windows is in float32: many windows are about as exact as one."""
    case = Case(24, 4, 3, 17, 2, cell=cell, proj=5 * (cell == "lstm"), dtype=dtype)
    call = Call(case, fastbptt.Sliding(12), "some")
    truth = call.reference()
    for name, result in call.ours().items():
        assert result.dtype == dtype, name
        error, scale = (result - truth[name]).abs().max(), truth[name].abs().max()
        assert error <= 16 * torch.finfo(dtype).eps * scale, name


@pytest.mark.parametrize("cell", CELLS)
def test_autocast(cell):
    """A call under autocast computes what one with everything cast does."""
    case = Case(6, 3, 4, 5, 2, cell=cell, dtype=torch.float32)
    module, half = case.module(), case.module().bfloat16()
    x, hx = case.data()
    cuts = {"truncation": Chunked(2), "resets": torch.arange(6) == 3}
    with torch.autocast("cpu", torch.bfloat16):
        actual = tensors_of(module(x, hx, **cuts))
        try:
            like_torch = tensors_of(twin(module)(x, hx)) if cell != "identity" else actual
        except RuntimeError:  # oneDNN has no primitive for it on this processor
            like_torch = [t.bfloat16() for t in actual]
    expected = tensors_of(half(x.bfloat16(), whole([h.bfloat16() for h in parts(hx)]), **cuts))
    for a, b in zip(actual, expected, strict=True):  # on a CPU a GRU's results may be wider
        assert torch.equal(a, b.to(a.dtype))
    assert [a.dtype for a in actual] == [t.dtype for t in like_torch]
    for outputs in (actual, expected):
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
    for p, q in zip(module.parameters(), half.parameters(), strict=True):
        assert p.grad.dtype == torch.float32 and torch.equal(p.grad, q.grad.float())
