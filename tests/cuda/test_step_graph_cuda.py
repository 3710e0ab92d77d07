"""Graphs of steps on a GPU; test_step_graph.py is what can be shown without one."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

import fastbptt
from common import Case, assert_as_exact, assert_matches, cotangent, step, tensors_of
from fastbptt import Chunked, Sliding
from test_modes import expected_of, peer_of
from test_step_graph import modes, replays

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(
        not fastbptt._C.cuda_built(), reason="needs a build of fastbptt with its CUDA kernels"
    ),
    pytest.mark.filterwarnings("error:.*no CUDA graph"),
]


@pytest.fixture(autouse=True)
def stepwise(monkeypatch):
    monkeypatch.setenv("FASTBPTT_CUDA_KERNEL", "stepwise")


@pytest.mark.parametrize("call", modes(), ids=str)
def test_modes(call):
    assert_as_exact(call.ours("cuda"), peer_of(call), expected_of(call))


CASES = [
    Case(99, 4, 3, 33, cell="lstm", dtype=torch.float16, hx=False),
    Case(99, 4, 3, 33, cell="lstm", dtype=torch.float32, proj=7, hx=False),
    Case(99, 4, 3, 33, cell="gru", hx=False),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
def test_replays_are_made(case):
    module, x = case.module().cuda(), case.data()[0].cuda()
    step(module, x)  # in which the library may allocate its workspaces
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step(module, x)
    launches = [event for event in profile.events() if event.name == "cudaGraphLaunch"]
    assert len(launches) == 2 * replays(99)


@every_case
def test_the_plain_loops_bits(case):
    """Inside a capture of the caller's there is the plain loop."""
    module, x = case.module(truncation=Chunked(80)).cuda(), case.data()[0].cuda().requires_grad_()
    leaves = [x, *module.parameters()]
    weights = [cotangent(t, i) for i, t in enumerate(tensors_of(module(x)))]

    def run():
        """Leaves nothing of autograd's behind, which would tie the capture to this stream."""
        outputs = tensors_of(module(x))
        gradients = torch.autograd.grad(outputs, leaves, weights)
        return [*(t.detach() for t in outputs), *gradients]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    expected, graph = run(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    graph.replay()
    assert_matches(dict(enumerate(results)), dict(enumerate(expected)), rtol=0)


@every_case
def test_the_order_of_streams(case):
    """Steps wait for what is there, what follows for them, and no memory is given away early."""
    module, x = case.module(truncation=Sliding(70)).cuda(), case.data()[0].cuda()
    expected = step(module, x)
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(5):
                late = torch.full_like(x, float("nan"))
                torch.cuda._sleep(20_000_000)
                late.copy_(x)
                actual = step(module, late)
                del late
                torch.full((1 << 20,), float("nan"), device="cuda")  # where a workspace was
                assert_matches(actual, expected, rtol=0)


def test_threads_at_once():
    module, x = CASES[1].module().cuda(), CASES[1].data()[0].cuda()
    expected, results = step(module, x), []

    def run(own):
        results.extend(step(own, x) for _ in range(20))

    threads = [threading.Thread(target=run, args=(copy.deepcopy(module),)) for _ in range(3)]
    torch.cuda.synchronize()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 60
    for result in results:
        assert_matches(result, expected, rtol=0)
