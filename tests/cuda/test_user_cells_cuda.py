"""Users' cells on a GPU; tests/cells/test_kernels_emulated.py is what can be shown without one."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import by_hand
import cuda_calls
from common import assert_as_exact, assert_matches, parts, refuse_loops, step, tensors_of
from fastbptt import TBPTT, Chunked, Gated, Recurrent, _cell_network, _loops, cells
from shipped import SHIPPED
from test_shipped_cells import Net

DEVICE = "cuda"

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("error:fastbptt could not compile"),
]


@pytest.fixture(autouse=True)
def by_kernels(monkeypatch):
    """Fails where a network on the GPU falls back to loops."""
    refuse_loops(monkeypatch)


def by_loops(call):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cell_network, "unroll_of", lambda *_: _loops.unroll)
        return call()


def results_of(net: Net, device, truncation=None, resets=None, lengths=None, **options):
    """Outputs and gradients by name, as by_hand has them, on the CPU."""
    leaves = {n: leaf.detach().to(device).requires_grad_() for n, leaf in net.leaves.items()}
    given = dict(leaves)
    hx = [given.pop(f"hx{i}") for i in range(len(net.hx))]
    x, inputs = given.pop("x"), {keyword: given.pop(keyword) for keyword in net.inputs}
    if lengths is not None:
        x = pack_padded_sequence(x, lengths, enforce_sorted=False)
    if isinstance(truncation, Gated):
        truncation = Gated(truncation.kappa.to(device))
    options |= inputs | {"truncation": truncation, "return_states": True}
    if resets is not None:
        options["resets"] = resets.to(device)
    if "reset_to" in options:
        own = tuple(each.to(device) for each in options["reset_to"])
        options["reset_to"] = own if len(own) > 1 else own[0]
    output, last, every = torch.func.functional_call(
        net.module, given, (x, tuple(hx) if len(hx) > 1 else hx[0]), options
    )
    output = output if lengths is None else output.data
    found = by_hand.gradients(leaves, output, parts(last), parts(every))
    return [
        {name: None if t is None else t.detach().cpu() for name, t in each.items()}
        for each in found
    ]


TRUNCATIONS = {
    "full": None,
    "chunked": Chunked(2),
    "windows": TBPTT(2, 4),
    "gated": Gated(torch.tensor([0.5, 1.0, 0.25, 2.0, 0.0, 0.75])),
}


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_cells(name, truncation):
    cut = TRUNCATIONS[truncation]
    for bidirectional in (False,) if truncation == "windows" else (False, True):
        net = Net(name, 2, bidirectional)
        for resets in (None, net.resets):
            want = by_loops(lambda: results_of(net, "cpu", cut, resets))  # noqa: B023
            by_hand.assert_equal(results_of(net, DEVICE, cut, resets), want)


@pytest.mark.parametrize("name", SHIPPED)
def test_packed(name):
    net = Net(name, 2, bidirectional=True, bias=False)
    options = {"resets": net.resets, "lengths": (3, 6, 5)}
    want = by_loops(lambda: results_of(net, "cpu", **options))
    by_hand.assert_equal(results_of(net, DEVICE, **options), want)


@pytest.mark.parametrize("name", ["elman", "lstm", "zoneout_gru", "layer_norm_gru"])
def test_options(name):
    net = Net(name, 2)
    states = [torch.rand(*each.shape, dtype=each.dtype) for each in net.hx]
    options = {"resets": net.resets, "reset_to": tuple(states), "clip_grad": 0.2}
    want = by_loops(lambda: results_of(net, "cpu", **options))
    by_hand.assert_equal(results_of(net, DEVICE, **options), want)


def net_of(name, dtype=torch.float32, H=70, **options):
    extras = {"alpha": 0.2} if name == "leaky" else {}
    extras |= {"zone_h": 0.3} if name == "zoneout_gru" else {}
    torch.manual_seed(0)
    net = Recurrent(getattr(cells, name), 12, H, 2, dtype=dtype, **extras, **options)
    return net, torch.randn(23, 5, 12, dtype=dtype)


NAMES = ["leaky", "lstm", "zoneout_gru", "layer_norm_gru", "dreamer_gru"]


@pytest.mark.parametrize("H", [70, 600])
@pytest.mark.parametrize("name", NAMES)
def test_float32_is_as_exact_as_the_plain_loop(name, H):
    net, x = net_of(name, H=H)
    net, x = net.to(DEVICE), x.to(DEVICE)
    ours = step(net, x)
    peer = by_loops(lambda: step(net, x))
    truth = by_loops(lambda: step(net.double(), x.double()))
    assert_as_exact(ours, peer, truth)


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_each_time(name):
    net, x = net_of(name)
    net, x = net.to(DEVICE), x.to(DEVICE)
    assert_matches(step(net, x), step(net, x), rtol=0)


def test_nothing_waits_for_the_device():
    net, x = net_of("layer_norm_lstm")
    net, x = net.to(DEVICE), x.to(DEVICE)
    resets = torch.rand(23, 5, device=DEVICE) < 0.2
    step(net, x)  # compiles, and the first product makes a handle
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = tensors_of(net(x.requires_grad_(), resets=resets))
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("name", ["leaky", "lstm", "layer_norm_gru"])
def test_graph(name):
    """Captured once, replayed with other numbers."""
    net, x = net_of(name, truncation=Chunked(7), clip_grad=0.5)
    net, x = net.to(DEVICE), x.to(DEVICE).requires_grad_()
    resets = torch.rand(23, 5, device=DEVICE) < 0.2
    cuda_calls.check_replay(lambda: net(x, resets=resets), x, resets, net)


def test_stream():
    """The work goes to the stream that is current, behind what is there."""
    net, x = net_of("lstm")
    net, x = net.to(DEVICE), x.to(DEVICE)
    expected = step(net, x)
    late = torch.full_like(x, float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # what runs on another stream does not wait for the copy
        late.copy_(x)
        actual = step(net, late)
    stream.synchronize()
    assert_matches(actual, expected, rtol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_that_is_not_current():
    net, x = net_of("layer_norm_gru", torch.float64)
    expected = step(net, x)
    actual = step(net.to("cuda:1"), x.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert_matches({n: t.cpu() for n, t in actual.items()}, expected)


def test_under_autocast_the_loop_runs(monkeypatch):
    monkeypatch.undo()
    net, x = net_of("lstm")
    net, x = net.to(DEVICE), x.to(DEVICE)
    exact = net(x)[0]
    with torch.autocast(DEVICE, torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        output = net(x)[0]
    torch.testing.assert_close(output, exact, rtol=0.05, atol=0.05)
