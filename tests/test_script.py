"""torch.jit.script: torch's modules with the same Parameters are compiled, and that is said."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastbptt
from common import Case, tensors_of
from fastbptt import convert

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

OURS = "torch.jit.script compiles torch.nn"
CELLS = {"tanh": nn.RNN, "relu": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


class WithState(nn.Module):
    def __init__(self, rnn: nn.RNNBase):
        super().__init__()
        self.rnn = rnn

    def forward(self, x, hx: torch.Tensor):
        return self.rnn(x, hx)


class WithStates(WithState):
    def forward(self, x, hx: tuple[torch.Tensor, torch.Tensor]):
        return self.rnn(x, hx)


@pytest.mark.parametrize("hx", [True, False], ids="hx={}".format)
@pytest.mark.parametrize("cell", CELLS)
def test_inside_a_net(cell, hx):
    case = Case(cell=cell, layers=2, bidirectional=True, hx=hx)
    module, (x, states) = case.module(truncation=2), case.data()
    if hx:
        net: nn.Module = (WithStates if cell == "lstm" else WithState)(module)
    else:
        net = nn.Sequential(module)
    arguments = (x,) if states is None else (x, states)
    expected = tensors_of(net(*arguments))
    with pytest.warns(UserWarning, match=rf"{OURS}.*without truncation=Chunked\(k=2\).*convert"):
        scripted = torch.jit.script(net)
    for a, b in zip(tensors_of(scripted(*arguments)), expected, strict=True):
        torch.testing.assert_close(a, b)
    own = [parameter.data_ptr() for parameter in module.parameters()]
    assert [parameter.data_ptr() for parameter in scripted.parameters()] == own


class Policy(nn.Module):
    """A copy of a net that keeps its state, as exporters of policies make it."""

    def __init__(self, rnn: nn.RNNBase):
        super().__init__()
        self.rnn = copy.deepcopy(rnn).cpu()
        self.head = nn.Linear(4, 2)
        self.register_buffer("hidden", torch.zeros(1, 1, 4))

    def forward(self, x):
        output, hidden = self.rnn(x.unsqueeze(0), self.hidden)
        self.hidden[:] = hidden
        return self.head(output.squeeze(0))


def test_an_exporters_copy(tmp_path):
    rnn = convert(nn.GRU(3, 4), truncation=3)
    policy = Policy(rnn)
    with pytest.warns(UserWarning, match=OURS):
        scripted = torch.jit.script(policy)
    scripted.save(tmp_path / "policy.pt")
    loaded, x = torch.jit.load(tmp_path / "policy.pt"), torch.randn(6, 1, 3)
    expected = policy.head(rnn(x)[0])
    for step, wanted in zip(x, expected, strict=True):
        torch.testing.assert_close(loaded(step), wanted)
    assert type(rnn) is fastbptt.GRU and rnn.truncation == fastbptt.Chunked(3)


def test_the_eager_model_afterwards():
    """torch.jit puts the modules that it compiles into the model; convert undoes that."""
    model = nn.Sequential(fastbptt.LSTM(3, 4, truncation=2)).eval()
    parameters = list(model.parameters())
    with pytest.warns(UserWarning, match=OURS):
        torch.jit.script(model)
    assert type(model[0]) is nn.LSTM and not model[0].training
    assert not hasattr(model[0], "truncation")
    convert(model, truncation=2)
    assert type(model[0]) is fastbptt.LSTM
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


class OwnForward(fastbptt.GRU):
    def forward(self, x):
        return super().forward(x)[0]


@pytest.mark.parametrize(
    "module, error, reason",
    [
        (fastbptt.RNN(3, 4, nonlinearity="identity"), ValueError, "no nonlinearity 'identity'"),
        (OwnForward(3, 4), TypeError, "cannot compile OwnForward, a subclass of fastbptt's"),
    ],
    ids=["identity", "subclass"],
)
def test_what_torch_has_not_got(module, error, reason):
    with pytest.raises(error, match=reason):
        torch.jit.script(nn.Sequential(module))
