"""return_states, reset_to and clip_grad in use: dtypes, transforms, copies, exports, bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastbptt
from common import parts, through_file, through_pickle
from fastbptt import cells
from option_nets import CLIP, B, H, I, Net, T, whole_of


def test_autocast():
    x, resets = torch.randn(T, B, I), torch.rand(T, B) < 0.4
    for cls in (fastbptt.RNN, fastbptt.GRU, fastbptt.LSTM):
        net = cls(I, H, 2)
        zeros = whole_of([torch.zeros(2, B, H)] * (2 if cls is fastbptt.LSTM else 1))
        with torch.autocast("cpu", torch.bfloat16):
            output, last = net(x, resets=resets)
            got, final, every = net(x, resets=resets, reset_to=zeros, return_states=True)
        assert got.dtype == output.dtype
        assert [s.dtype for s in parts(final)] == [s.dtype for s in parts(last)]
        assert [s.dtype for s in parts(every)] == [s.dtype for s in parts(last)]
        torch.testing.assert_close(got, output, rtol=0.03, atol=0.01)
        got.sum().backward()
        assert net.weight_hh_l0.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    net = Net("lstm", 2)
    options = {"resets": net.resets, "reset_to": tuple(net.reset_to), "clip_grad": CLIP}
    exact = net.call(return_states=True, **options)
    hx = tuple(state.to(dtype) for state in net.hx)
    module = net.module.to(dtype)
    output, last, every = module(net.x.to(dtype), hx, return_states=True, **options)
    assert {s.dtype for s in (output, *last, *every)} == {dtype}
    torch.testing.assert_close(output.double(), exact[0], rtol=0.03, atol=0.02)


def test_transforms():
    net = fastbptt.GRU(I, H, dtype=torch.float64)
    x = torch.randn(5, T, B, I, dtype=torch.float64)
    resets = torch.rand(T, B) < 0.4
    start = torch.randn(1, 1, H, dtype=torch.float64)

    def loss(start, x):
        output, _ = net(x, resets=resets, reset_to=start, clip_grad=CLIP)
        return output.square().sum()

    got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(start, x)
    for i in range(5):
        own = start.clone().requires_grad_()
        torch.testing.assert_close(got[i], torch.autograd.grad(loss(own, x[i]), own)[0])


def test_compiled():
    net = fastbptt.LSTM(I, H, clip_grad=CLIP)
    x, resets = torch.randn(T, B, I), torch.rand(T, B) < 0.4
    start = (torch.zeros(1, 1, H), torch.randn(1, 1, H, requires_grad=True))

    def call(x):
        output, _, (_, c) = net(x, resets=resets, reset_to=start, return_states=True)
        return output.sum() + c.square().sum()

    results = []
    for each in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        loss = each(x)
        results.append((loss, torch.autograd.grad(loss, [start[1], net.weight_hh_l0])))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("through", [copy.deepcopy, through_pickle, through_file])
def test_copies(through):
    net = fastbptt.LSTM(I, H, 2, clip_grad=0.5, truncation=2)
    other = through(net)
    assert other.clip_grad == 0.5 and repr(other) == repr(net)
    assert repr(net) == "LSTM(2, 4, num_layers=2, truncation=Chunked(k=2), clip_grad=0.5)"
    assert net.state_dict().keys() == torch.nn.LSTM(I, H, 2).state_dict().keys()
    net = fastbptt.Recurrent(cells.elman, I, H, clip_grad=2)
    assert repr(through(net)) == "Recurrent(elman, 2, 4, clip_grad=2.0)"


def test_converting():
    model = torch.nn.Sequential(fastbptt.GRU(I, H, clip_grad=0.5))
    with pytest.warns(UserWarning, match=r"'0' \(GRU\) loses its clip_grad=0.5"):
        fastbptt.revert(model)
    assert type(model[0]) is torch.nn.GRU and "clip_grad" not in vars(model[0])
    net = fastbptt.convert(model)[0]
    assert net.clip_grad is None
    net.clip_grad = 0.25
    assert "clip_grad=0.25" in repr(net)
    with fastbptt.patch():
        assert torch.nn.LSTM(I, H, clip_grad=1).clip_grad == 1.0
    x = torch.randn(T, B, I)
    a = net(x, return_states=True)[2]
    assert a.shape == (1, T, B, H)


class Model(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.rnn = fastbptt.GRU(I, H, **options)

    def forward(self, x):
        return self.rnn(x)[0]


def test_torchscript():
    with pytest.raises(NotImplementedError, match="GRU: clip_grad=0.5 cannot be scripted"):
        torch.jit.script(Model(clip_grad=0.5))
    model, x = Model(clip_grad=0.5), torch.randn(T, B, I)
    with pytest.raises(NotImplementedError, match="trace cannot have clip_grad=0.5"):
        torch.jit.trace(model, (x,))
    with torch.no_grad():
        traced = torch.jit.trace(model, (x,))
    torch.testing.assert_close(traced(x), model(x))
    model.rnn.clip_grad = None
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_forward_mode_has_no_clipping():
    net, x = fastbptt.GRU(I, H, clip_grad=0.5), torch.randn(T, B, I)
    with pytest.raises(NotImplementedError, match="forward mode cannot have clip_grad=0.5"):
        torch.func.jvp(lambda x: net(x)[0], (x,), (x,))


def net(cls=fastbptt.GRU, **options):
    return cls(I, H, 2, dtype=torch.float64, **options)


X = torch.zeros(T, B, I, dtype=torch.float64)
RESETS = torch.zeros(T, B, dtype=torch.bool)
TO = torch.zeros(2, B, H, dtype=torch.float64)
PACKED = pack_padded_sequence(X, [6, 5, 2])


def to(reset_to, x=X, resets=RESETS, cls=fastbptt.GRU, **options):
    return lambda: net(cls, **options)(x, resets=resets, reset_to=reset_to)


def recurrent(reset_to):
    cell = fastbptt.Recurrent(cells.dropout_lstm, I, H, mask=1.0, dtype=torch.float64)
    return lambda: cell(X, resets=RESETS, reset_to=reset_to)


ERRORS = {
    "no bool": (
        lambda: net()(X, return_states=1),
        TypeError,
        "return_states must be a bool, got 1",
    ),
    "no resets": (
        to(TO, resets=None),
        ValueError,
        "reset_to must go with resets, which say where, got none",
    ),
    "list": (to([TO]), TypeError, "reset_to must be a Tensor, got list"),
    "number": (to(0.0), TypeError, "reset_to must be a Tensor, got float"),
    "one state of two": (
        to(TO, cls=fastbptt.LSTM),
        TypeError,
        "reset_to must be a tuple of 2 Tensors, one for each state of lstm, got Tensor",
    ),
    "three states": (
        to((TO,) * 3, cls=fastbptt.LSTM),
        TypeError,
        "a tuple of 2 Tensors, one for each state of lstm, got 3 of them",
    ),
    "none": (
        to((TO, None), cls=fastbptt.LSTM),
        TypeError,
        r"reset_to\[1\] must be a Tensor, got N",
    ),
    "of Recurrent": (
        recurrent((TO, TO)),
        TypeError,
        "a tuple of 3 Tensors, one for each state of dropout_lstm, got 2 of them",
    ),
    "integers": (to(TO.long()), ValueError, "reset_to must be floating point, got torch.int64"),
    "device": (to(TO.to("meta")), ValueError, "reset_to must be on input's device cpu, got meta"),
    "layers": (
        to(TO[:1]),
        ValueError,
        r"reset_to must have shape \(2, 3, 4\) or \(2, 1, 4\) or \(2, 6, 3, 4\), got \(1, 3, 4\)",
    ),
    "batch first": (
        to(torch.zeros(2, T, B, H), X.transpose(0, 1), RESETS.t(), batch_first=True),
        ValueError,
        r"or \(2, 3, 6, 4\), got \(2, 6, 3, 4\)",
    ),
    "packed": (to(torch.zeros(2, B, T, H), PACKED), ValueError, r"\(2, 6, 3, 4\), got \(2, 3, 6"),
    "unbatched": (
        to(TO, X[:, 0], RESETS[:, 0]),
        ValueError,
        r"reset_to must have shape \(2, 4\) or \(2, 6, 4\), got \(2, 3, 4\)",
    ),
    "projection": (
        to((TO, TO), cls=fastbptt.LSTM, proj_size=2),
        ValueError,
        r"reset_to\[0\] must have shape \(2, 3, 2\) or .*, got \(2, 3, 4\)",
    ),
    "text": (
        lambda: net(clip_grad="1"),
        TypeError,
        "clip_grad must be a number, got '1' of type st",
    ),
    "true": (lambda: net()(X, clip_grad=True), TypeError, "clip_grad must be a number, got True"),
    "zero": (lambda: net(clip_grad=0), ValueError, "clip_grad must be positive and finite, got 0"),
    "negative": (lambda: net()(X, clip_grad=-1.0), ValueError, "must be positive .* got -1.0"),
    "nan": (lambda: net(clip_grad=float("nan")), ValueError, "must be positive .* got nan"),
    "infinite": (lambda: net(clip_grad=float("inf")), ValueError, "must be .* finite, got inf"),
    "Recurrent's": (
        lambda: fastbptt.Recurrent(cells.elman, I, H, clip_grad=-1),
        ValueError,
        "clip_grad must be positive and finite, got -1",
    ),
    "name": (
        lambda: fastbptt.Recurrent(cells.leaky, I, H, alpha="reset_to"),
        ValueError,
        "alpha must be the name of an input per step that a call can have, got 'reset_to'",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    what, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        what()
