"""torch.ao.quantization quantizes ours as it does torch's, and leaves the others what they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.ao.quantization import quantize_fx

import fastbptt
from common import tensors_of
from fastbptt import convert

ao = torch.ao.quantization
DYNAMIC = torch.ao.nn.quantized.dynamic

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:.*must run observer"),
]


class Net(nn.Module):
    """One net of each kind, one after another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
        self.gru = nn.GRU(8, 6, batch_first=True)
        self.rnn = nn.RNN(6, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        x, _ = self.lstm(x)
        x, _ = self.gru(x)
        x, _ = self.rnn(x)
        return self.head(x)


def pair():
    theirs = Net()
    return theirs, convert(copy.deepcopy(theirs), truncation=2)


SPECS = {
    "LSTM": ({nn.LSTM}, ("lstm",)),
    "GRU": ({nn.GRU}, ("gru",)),
    "by name": ({"gru"}, ("gru",)),
    "configuration": ({nn.LSTM: ao.float16_dynamic_qconfig}, ("lstm",)),
    "Linear": ({nn.Linear}, ()),
    "default": (None, ("lstm", "gru")),
}


@pytest.mark.parametrize("inplace", [False, True], ids="inplace={}".format)
@pytest.mark.parametrize("spec, quantized", SPECS.values(), ids=SPECS)
def test_dynamic(spec, quantized, inplace):
    theirs, ours = pair()
    x = torch.randn(5, 2, 3)
    before = ours(x)
    results = []
    for model in (theirs, ours):
        results.append(ao.quantize_dynamic(model, spec, torch.qint8, inplace=inplace))
    assert (results[1] is ours) == inplace
    for name in ("lstm", "gru", "rnn", "head"):
        a, b = (model.get_submodule(name) for model in results)
        if name == "head" or name in quantized:
            assert type(a) is type(b) and ("dynamic" in type(a).__module__) == (
                name in quantized or spec is None or nn.Linear in spec
            )
        else:
            assert isinstance(b, fastbptt.nn._Recurrent) and b.truncation == fastbptt.Chunked(2)
    torch.testing.assert_close(results[1](x), results[0](x))
    if not inplace:
        assert torch.equal(ours.train()(x), before)
        assert {type(ours.lstm), type(ours.gru), type(ours.rnn)} == {
            fastbptt.LSTM,
            fastbptt.GRU,
            fastbptt.RNN,
        }


def test_made_by_this_package():
    model = nn.Sequential(fastbptt.GRU(3, 4, truncation=2)).eval()
    x = torch.randn(5, 2, 3)
    quantized = ao.quantize_dynamic(model, {nn.GRU}, torch.float16)
    assert type(quantized[0]) is DYNAMIC.GRU
    for a, b in zip(tensors_of(quantized(x)), tensors_of(model(x)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)  # weights of 16 bits
    torch.jit.script(quantized)


def test_what_torch_has_not_got_stays():
    model = nn.Sequential(fastbptt.RNN(3, 4, nonlinearity="identity"))
    assert type(ao.quantize_dynamic(model)[0]) is fastbptt.RNN


def test_an_error_leaves_the_model_as_it_was():
    _, ours = pair()
    with pytest.raises(AttributeError):
        ao.quantize_dynamic(ours, {nn.LSTM: "no configuration"}, inplace=True)
    assert type(ours.lstm) is fastbptt.LSTM and ours.lstm.truncation == fastbptt.Chunked(2)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.Linear])
def test_dynamic_by_graph(kind):
    x = torch.randn(5, 2, 3)
    mapping = ao.QConfigMapping().set_object_type(kind, ao.default_dynamic_qconfig)
    results = []
    for model in pair():
        prepared = quantize_fx.prepare_fx(model.eval(), mapping, (x,))
        prepared(x)
        results.append(quantize_fx.convert_fx(prepared))
    theirs, ours = results
    torch.testing.assert_close(ours(x), theirs(x))
    for name, child in theirs.named_children():
        other = ours.get_submodule(name)
        if isinstance(child, nn.RNNBase):
            assert isinstance(other, type(child)) and isinstance(other, fastbptt.nn._Recurrent)
        else:
            assert type(other) is type(child)
    assert sum("quantized" in type(m).__module__ for m in ours.children()) == 1


def test_static():
    """Observed, calibrated and converted, as torch's LSTM is: into torch.ao's own."""
    torch.manual_seed(0)
    theirs = nn.Sequential(ao.QuantStub(), nn.LSTM(3, 4)).eval()
    theirs.qconfig = ao.get_default_qconfig("x86")
    x, results = torch.randn(5, 2, 3), []
    for model in (theirs, convert(copy.deepcopy(theirs))):
        prepared = ao.prepare(model)
        assert type(prepared[1]) is torch.ao.nn.quantizable.LSTM
        prepared(x)
        results.append(ao.convert(prepared)(x)[0].dequantize())
    assert torch.equal(*results)
