"""The CUDA kernels on a GPU; tests/cuda/test_cuda_emulated.py is what can be shown without one."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import cuda_calls
import fastbptt
import tangent_calls
from calls import Call
from common import (
    CELLS,
    Case,
    assert_as_exact,
    assert_matches,
    parts,
    step,
    tensors_of,
)
from fastbptt import TBPTT, Chunked, Sliding
from test_modes import LARGER, MODES, expected_of, random_call
from test_operators import CASES, backward_arguments, cuts, forward_arguments, rnn_bwd, rnn_fwd
from test_persistent import (
    HALVES,
    SIZES,
    VARIABLE,
    can_have,
    check,
    check_in_tf32,
    modes,
    tf32,  # noqa: F401  (a fixture)
)

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(
        not fastbptt._C.cuda_built(), reason="needs a build of fastbptt with its CUDA kernels"
    ),
]


def truth_of(call: Call):
    """The reference's results, with the masks that the GPU draws."""
    return call.reference(device="cuda") if call.dropout else expected_of(call)


@pytest.mark.parametrize("call", [*cuda_calls.grid(), *cuda_calls.ODD, *LARGER], ids=str)
def test_calls(call):
    assert_matches(call.ours("cuda"), truth_of(call), rtol=1e-10)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("mode", MODES)
def test_random_calls(mode, seed):
    call = random_call(mode, seed)
    assert_matches(call.ours("cuda"), truth_of(call), rtol=1e-10)


@pytest.mark.parametrize("dtype", cuda_calls.DTYPES, ids=str)
@pytest.mark.parametrize("case", cuda_calls.ROUNDED, ids=str)
def test_errors_of_rounding(case, dtype):
    case = dataclasses.replace(case, dtype=dtype)
    assert_as_exact(*cuda_calls.rounded_results(case, "cuda"))


@pytest.mark.parametrize("steps", tangent_calls.cases(), ids=str)
def test_tangents(steps):
    tangent_calls.check_forward(steps, "cuda")
    tangent_calls.check_backward(steps, "cuda")
    tangent_calls.check_backward_of_values(steps, "cuda")


@pytest.mark.parametrize("call", cuda_calls.TWICE, ids=str)
def test_second_derivatives(call):
    expected = cuda_calls.second_derivatives_by_reference(call)
    assert_matches(cuda_calls.second_derivatives(call, "cuda"), expected, rtol=1e-10)


@pytest.fixture(params=["lane", "resident", "cluster", "grid"])
def kernel(request, monkeypatch):
    if request.param == "cluster" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no clusters")
    monkeypatch.setenv(VARIABLE, request.param)
    return request.param


@pytest.mark.parametrize("call", modes(), ids=str)
def test_modes_of_a_kernel(kernel, call):
    check(call, "cuda")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("call", [call for call in modes() if call.case.cell != "relu"], ids=str)
def test_modes_of_a_kernel_in_16_bits(kernel, call, dtype):
    check(call.in_dtype(dtype), "cuda")


@pytest.mark.parametrize("dtype", cuda_calls.DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_of_a_kernel(kernel, size, dtype):
    T, B, H = size
    for cell in ("tanh", "gru", "lstm"):
        if can_have(kernel, cell, H):
            check(Call(Case(T, B, 3, H, cell=cell, dtype=dtype)), "cuda")


@pytest.mark.parametrize("call", [call for call in modes() if call.case.cell != "relu"], ids=str)
def test_modes_of_a_kernel_in_tf32(kernel, call, tf32):  # noqa: F811
    if kernel == "lane":
        pytest.skip("its products are of float32 as it is")
    check_in_tf32(call, tf32, "cuda")


@pytest.mark.parametrize("truncation", [None, Sliding(4)], ids=str)
def test_places_over_many_steps(kernel, truncation):
    for call in cuda_calls.uneven_calls(truncation):
        check(call, "cuda")


@pytest.mark.parametrize("call", cuda_calls.long_calls(300, 17, 40), ids=str)
def test_many_steps_of_a_kernel(kernel, call):
    check(call, "cuda")


LARGE = [call for H in (512, 768) for call in cuda_calls.long_calls(40, 17, H)]


@pytest.mark.parametrize("call", LARGE, ids=str)
def test_large_layers(call):
    """By the kernel that is chosen: most take far more shared memory than a block has unasked."""
    check(call, "cuda")


def test_errors_of_activations():
    errors = cuda_calls.errors_of_activations("cuda")
    assert max(errors.values()) <= 2.5, errors


def on_gpu(value):
    """An operator's argument there; batch_sizes, of integers, stay on the CPU."""
    if isinstance(value, list):
        return [on_gpu(each) for each in value]
    stays = not isinstance(value, torch.Tensor) or value.dtype == torch.int64
    return value if stays else value.cuda()


@pytest.mark.parametrize("name", ["plain", "gru, packed", "lstm, projection", "lstm, empty batch"])
def test_opcheck(name):
    forward, backward = (make(CASES[name]) for make in (forward_arguments, backward_arguments))
    of_cuts = [{}] if CASES[name].B == 0 else [{}, *cuts(backward).values()]
    torch.library.opcheck(rnn_fwd.default, (), {n: on_gpu(v) for n, v in forward.items()})
    for cut in of_cuts:
        arguments = {n: on_gpu(v) for n, v in (backward | cut).items()}
        torch.library.opcheck(rnn_bwd.default, (), arguments)


SMALL = [
    Call(Case(9, 5, 6, 33, 2, cell=cell, dtype=dtype), truncation, "some")
    for cell in ("tanh", "gru", "lstm")
    for dtype, truncation in ((torch.float32, TBPTT(2, 5)), (torch.bfloat16, Chunked(4)))
]
every_small_call = pytest.mark.parametrize("call", SMALL, ids=str)


@every_small_call
def test_same_bits_each_time(call):
    assert_matches(call.ours("cuda"), call.ours("cuda"), rtol=0)


@every_small_call
def test_backward_in_eval_mode(call):
    module, (x, hx) = call.module().cuda(), call.case.data()
    training, evaluating = (
        step(module.train(mode), x.cuda(), on_states(hx, "cuda")) for mode in (True, False)
    )
    assert_matches(evaluating, training, rtol=0)


def on_states(hx, device: str):
    states = tuple(state.to(device) for state in parts(hx))
    return states if len(states) == 2 else states[0]


@every_small_call
def test_stream(call):
    """The work goes to the stream that is current, behind what is there."""
    module, (x, hx) = call.module().cuda(), call.case.data()
    x, hx = x.cuda(), on_states(hx, "cuda")
    expected = step(module, x, hx)
    late = torch.full_like(x, float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # what runs on another stream does not wait for the copy
        late.copy_(x)
        actual = step(module, late, hx)
    stream.synchronize()
    assert_matches(actual, expected, rtol=0)


@every_small_call
def test_nothing_waits_for_the_device(call):
    module, (x, hx) = call.module().cuda(), call.case.data()
    x, hx, resets = x.cuda(), on_states(hx, "cuda"), call.make_resets().cuda()
    cut = {"truncation": call.make_truncation(), "resets": resets}
    step(module, x, hx, call=lambda *a: module(*a, **cut))  # the first product makes a handle
    torch.cuda.synchronize()
    x.requires_grad_()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = tensors_of(module(x, hx, **cut))
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
    finally:
        torch.cuda.set_sync_debug_mode(before)


@every_small_call
def test_graph(call):
    """Captured once, replayed with other numbers."""
    module, (x, hx) = call.module().cuda(), call.case.data()
    x, hx, resets = x.cuda().requires_grad_(), on_states(hx, "cuda"), call.make_resets().cuda()
    cut = {"truncation": call.make_truncation(), "resets": resets}
    cuda_calls.check_replay(lambda: module(x, hx, **cut), x, resets, module)


def test_packed_input_in_a_graph_is_refused():
    module = fastbptt.GRU(3, 4).cuda()
    packed = pack_sequence([torch.randn(n, 3).cuda() for n in (4, 2)])
    module(packed)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="packed input.*CUDA graph"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            module(packed)


@pytest.mark.parametrize("cell", ["tanh", "lstm"])
@pytest.mark.parametrize("truncation", [None, Chunked(100), Sliding(2)], ids=str)
def test_more_steps_than_a_grid_has_blocks(truncation, cell):
    case = Case(70_000, 1, 2, 3, cell=cell)
    module, (x, hx) = case.module(truncation=truncation), case.data()
    expected = step(module, x, hx)  # the CPU kernels
    actual = step(module.cuda(), x.cuda(), on_states(hx, "cuda"))
    assert_matches({n: t.cpu() for n, t in actual.items()}, expected, rtol=1e-9)


@pytest.mark.parametrize("cell", CELLS)
def test_autocast(cell):
    case = Case(6, 3, 8, 16, 2, cell=cell, dtype=torch.float32)
    module, (x, hx) = case.module().cuda(), case.data()
    x, hx = x.cuda(), on_states(hx, "cuda")
    exact = tensors_of(module(x, hx))
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype), warnings.catch_warnings():
            warnings.simplefilter("error")
            outputs = tensors_of(module(x, hx, truncation=2))
        assert all(output.dtype == dtype for output in outputs)
        for output, truth in zip(outputs, exact, strict=True):
            assert (output - truth).abs().max() <= 16 * torch.finfo(dtype).eps * truth.abs().max()
        outputs[0].float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_that_is_not_current():
    case = Case(5, 3, 4, 6, 2, cell="lstm")
    module, (x, hx) = case.module(), case.data()
    expected = step(module, x, hx)
    actual = step(module.to("cuda:1"), x.to("cuda:1"), on_states(hx, "cuda:1"))
    assert torch.cuda.current_device() == 0
    assert_matches({n: t.cpu() for n, t in actual.items()}, expected)
