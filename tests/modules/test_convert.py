"""A model whose recurrent modules are converted is the model it was, and so is one reverted."""

from __future__ import annotations

import abc
import copy
import pickle
import re
import warnings
from contextlib import contextmanager
from typing import Generic, TypeVar

import pytest
import torch
from bi_lstm_crf import BiRnnCrf
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastbptt
from common import Case, assert_matches, cotangent, detach_loop, step, tensors_of, twin
from fastbptt import Chunked
from fastbptt.convert import convert, revert

CASES = [
    Case(6, 3, 4, 5, layers=2, bidirectional=True),
    Case(6, 3, 4, 5, cell="relu", bias=False),
    Case(6, 3, 4, 5, layers=2, cell="gru", batch_first=True),
    Case(6, 3, 4, 5, layers=2, bidirectional=True, cell="lstm", proj=3),
    Case(6, 3, 4, 5, cell="lstm", lengths=(3, 6, 1)),
]
OURS = (fastbptt.RNN, fastbptt.GRU, fastbptt.LSTM)


@contextmanager
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Model(nn.Module):
    """Embedding, the three cells one after the other, and a head: [T, B] numbers to [T, B, 2]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 4)
        self.encoder = nn.ModuleDict(
            {"rnn": nn.RNN(4, 5, nonlinearity="relu"), "gru": nn.GRU(5, 3, bidirectional=True)}
        )
        self.lstm = nn.LSTM(6, 5, 2, dropout=0.4)
        self.again = self.lstm  # one module in two places
        self.cell = nn.LSTMCell(5, 5)
        self.head = nn.Linear(5, 2)
        self.double()

    def forward(self, x):
        x = self.encoder["rnn"](self.embedding(x))[0]
        x, h_n = self.encoder["gru"](x)
        h, c = self.cell(self.again(x)[0][-1])
        return self.head(self.lstm(x, (h.expand(2, -1, -1), c.expand(2, -1, -1)))[0]) + h_n.sum()


def passes(model, x, seed=1):
    """Output and every gradient by name."""
    torch.manual_seed(seed)
    model.zero_grad()
    output = model(x)
    output.backward(cotangent(output, 0))
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **grads}


@pytest.fixture
def numbers():
    return torch.randint(7, (6, 3), generator=torch.Generator().manual_seed(2))


def classes(model):
    return {n: type(m) for n, m in model.named_modules(remove_duplicate=False)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_root_itself(case):
    module = twin(case.module())
    theirs = type(module)
    expected = step(module, *case.data())
    with silent():
        assert convert(module) is module
    assert type(module) in OURS and type(module).__name__ == theirs.__name__
    assert repr(module) == repr(case.module()) and not module.recompute
    assert_matches(step(module, *case.data()), expected)
    assert_matches(step(module, *case.data()), step(case.module(), *case.data()), rtol=0)
    with silent():
        assert revert(module) is module
    assert type(module) is theirs and vars(module).keys() == vars(theirs(2, 2)).keys()
    assert_matches(step(module, *case.data()), expected, rtol=0)


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_truncation(case):
    module = convert(twin(case.module()), truncation=4)
    assert module.truncation == Chunked(4)
    if not case.bidirectional and case.layers == 1:
        other = twin(module)
        expected = step(other, *case.data(), call=detach_loop(other, 4))
        assert_matches(step(module, *case.data()), expected)
    made = case.module(truncation=4)
    assert_matches(step(module, *case.data()), step(made, *case.data()), rtol=0)
    with pytest.warns(UserWarning, match="itself loses its truncation=Chunked"):
        revert(module)
    assert not hasattr(module, "truncation")


def test_a_model(numbers):
    model = Model()
    before, keys = classes(model), list(model.state_dict())
    expected = passes(model, numbers)
    with silent():
        assert convert(model) is model
    swapped = {n for n, cls in classes(model).items() if cls is not before[n]}
    assert swapped == {"encoder.rnn", "encoder.gru", "lstm", "again"}
    assert all(classes(model)[n] in OURS for n in swapped)
    assert model.again is model.lstm and list(model.state_dict()) == keys
    assert_matches(passes(model, numbers), expected)
    with silent():
        revert(model)
    assert classes(model) == before
    assert_matches(passes(model, numbers), expected, rtol=0)


def test_twice_is_harmless(numbers):
    model = convert(Model(), truncation=3)
    with silent():
        convert(convert(model), truncation=3)
    assert model.lstm.truncation == model.encoder["rnn"].truncation == Chunked(3)
    with pytest.warns(UserWarning) as caught:
        convert(model, truncation=2)
    assert len(caught) == 1 and caught[0].filename == __file__
    text = str(caught[0].message)
    assert text.count("already, with truncation=Chunked(k=3)") == 3 and "'again'" not in text
    assert model.lstm.truncation == Chunked(3)
    with pytest.warns(UserWarning, match="loses its truncation") as caught:
        revert(model)
    assert len(caught) == 1 and caught[0].filename == __file__
    with silent():
        revert(model)


def test_training_goes_on(numbers):
    def train(between):
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for i in range(4):
            between(model, i)
            passes(model, numbers, seed=i)
            optimizer.step()
        assert len(optimizer.state) == len(list(model.parameters()))
        return {n: p.detach() for n, p in model.named_parameters()}

    def swaps(model, i):
        parameters = dict(model.named_parameters())
        (revert if i == 3 else convert)(model)
        after = dict(model.named_parameters())
        assert all(after[n] is p for n, p in parameters.items()) and len(after) == len(parameters)

    assert_matches(train(swaps), train(lambda model, i: None))


def test_what_is_set_on_a_module_stays():
    module = nn.LSTM(4, 5, dtype=torch.float64).eval()
    module.note, module.counts = "mine", {"calls": 0}
    module.register_buffer("scale", torch.ones(2))
    module.add_module("norm", nn.LayerNorm(5))
    module.bias_hh_l0.requires_grad_(False)
    calls = []
    module.register_forward_pre_hook(lambda m, args: calls.append("pre"))
    module.register_forward_hook(lambda m, args, out: calls.append("forward"))
    module.register_forward_hook(
        lambda m, args, kwargs, out: calls.append(list(kwargs)), with_kwargs=True
    )
    module.register_full_backward_pre_hook(lambda m, grads: calls.append("backward pre"))
    module.register_full_backward_hook(lambda m, d_in, d_out: calls.append("backward"))
    module.register_state_dict_post_hook(lambda m, state, prefix, meta: calls.append("state"))
    module.register_load_state_dict_pre_hook(lambda m, *args: calls.append("load"))
    module.weight_hh_l0.register_hook(lambda grad: calls.append("grad"))
    x, h = (
        torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True),
        torch.zeros(1, 2, 5).double(),
    )

    def run():
        calls.clear()
        output, _ = module(x, hx=(h, h))
        output.sum().backward()
        module.load_state_dict(module.state_dict())
        return list(calls)

    expected = run()
    assert len(expected) == 8
    keys = list(module.state_dict())
    for change in (convert, revert):
        change(module)
        assert run() == expected and list(module.state_dict()) == keys
        assert module.note == "mine" and "calls" in module.counts and not module.training
        assert not module.bias_hh_l0.requires_grad and module.weight_ih_l0.requires_grad
        assert module.weight_ih_l0.dtype == torch.float64


def test_tied_weights():
    torch.manual_seed(0)
    pair = nn.ModuleList([nn.GRU(4, 4, dtype=torch.float64) for _ in range(2)])
    pair[1].weight_hh_l0 = pair[0].weight_hh_l0
    x = torch.randn(5, 2, 4, dtype=torch.float64)

    def run():
        pair.zero_grad()
        output = pair[1](pair[0](x)[0])[0]
        output.square().sum().backward()
        return {"output": output.detach(), **{n: p.grad for n, p in pair.named_parameters()}}

    expected = run()
    convert(pair)
    assert pair[0].weight_hh_l0 is pair[1].weight_hh_l0
    assert_matches(run(), expected)


# What is left alone.


class OwnForward(nn.LSTM):
    def forward(self, x, hx=None):
        return nn.LSTM.forward(self, 2 * x, hx)


class Mixed(nn.LSTM):
    def forward(self, x, hx=None):
        if hx is None:
            return super().forward(x)
        return torch._VF.lstm(x, hx, self._flat_weights, True, 1, 0.0, False, False, False)


class Unbound(nn.GRU):
    def forward(self, x, hx=None):
        for _ in range(1):
            output, hx = torch.gru(x, torch.zeros(1, 2, 4), list(self.parameters()), *GRU_OPTIONS)
        return output, hx


GRU_OPTIONS = (True, 1, 0.0, False, False, False)


class Refusing(nn.RNN):
    """Has no more subclasses once there are any."""

    final = False

    def __init_subclass__(cls, **kwargs):
        if Refusing.final:
            raise LookupError("no subclasses, please")


class OwnCheck(nn.GRU):
    def check_input(self, input, batch_sizes):
        super().check_input(input, batch_sizes)


class Mixin:
    def __call__(self, x):
        return super().__call__(3 * x)


class OwnCall(Mixin, nn.RNN):
    pass


class OwnName(nn.RNN):
    @property
    def truncation(self):
        return 5


class OwnNew(nn.LSTM):  # as fully_shard's classes have
    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)


class OurForward(fastbptt.LSTM):
    def forward(self, x, hx=None):
        return super().forward(-x, hx)


def refusing(*sizes):
    Refusing.final = True
    return Refusing(*sizes)


def with_other_weights(module):
    module._flat_weights[1] = torch.zeros_like(module.weight_hh_l0)
    return module


def with_forward(module):
    original = module.forward
    module.forward = lambda *args: original(*args)
    return module


def with_attribute(module, name):
    setattr(module, name, 1)
    return module


def scripted(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(module)


def traced(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(module, torch.randn(5, 2, 3))


def quantized(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(module), {type(module)})[0]


FOREIGN = {
    "own forward": (lambda: OwnForward(3, 4), "'foreign' (OwnForward) has its own forward"),
    "forward with kernels": (lambda: Mixed(3, 4), "'foreign' (Mixed) has its own forward"),
    "forward without super": (lambda: Unbound(3, 4), "'foreign' (Unbound) has its own forward"),
    "no subclasses": (
        lambda: refusing(3, 4),
        "'foreign' (Refusing) cannot change its class (LookupError: no subclasses, please)",
    ),
    "own check_input": (lambda: OwnCheck(3, 4), "'foreign' (OwnCheck) has its own check_input"),
    "own __call__": (lambda: OwnCall(3, 4), "'foreign' (OwnCall) has its own __call__"),
    "own __new__": (lambda: OwnNew(3, 4), "'foreign' (OwnNew) has its own __new__"),
    "own name": (
        lambda: OwnName(3, 4),
        "'foreign' (OwnName) has something of its own under the name trunc",
    ),
    "other weights": (
        lambda: with_other_weights(nn.LSTM(3, 4)),
        "'foreign' (LSTM) has other tensors in _flat_weights than under its weights' names",
    ),
    "replaced forward": (
        lambda: with_forward(nn.LSTM(3, 4)),
        "'foreign' (LSTM) has its own forward",
    ),
    "recompute": (
        lambda: with_attribute(nn.GRU(3, 4), "recompute"),
        "'foreign' (GRU) has something of its own under the name recompute",
    ),
    "parametrized": (
        lambda: parametrizations.weight_norm(OwnForward(3, 4), "weight_hh_l0"),
        "'foreign' (ParametrizedOwnForward) has its own forward",
    ),
    "scripted": (lambda: scripted(nn.Sequential(nn.GRU(3, 4))), "'foreign.0' (GRU) is scripted"),
    "traced": (lambda: traced(nn.LSTM(3, 4)), "'foreign' (LSTM) is scripted"),
    "quantized": (lambda: quantized(nn.LSTM(3, 4)), "'foreign' (LSTM) is quantized"),
    "quantizable": (lambda: torch.ao.nn.quantizable.LSTM(3, 4), "'foreign' (LSTM) is quantized"),
    "quantized reference": (
        lambda: torch.ao.nn.quantized.reference.LSTM(3, 4),
        "'foreign' (LSTM) is quantized",
    ),
}


@pytest.mark.parametrize("make, reason", FOREIGN.values(), ids=FOREIGN)
def test_left_alone_and_reported(make, reason):
    module = make()
    cls, x = type(module), torch.randn(5, 2, 3)
    expected = module(x)
    model = nn.ModuleDict({"foreign": module, "plain": nn.LSTM(3, 4)})
    with pytest.warns(UserWarning) as caught:
        convert(model)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert reason in str(caught[0].message)
    assert "plain" not in str(caught[0].message) and type(model["plain"]) is fastbptt.LSTM
    assert type(module) is cls
    for a, b in zip(tensors_of(module(x)), tensors_of(expected), strict=True):
        assert torch.equal(a, b)
    with silent():
        revert(model)
    assert type(model["plain"]) is nn.LSTM


def test_one_warning_names_all():
    model = nn.ModuleList([OwnForward(3, 4), nn.LSTM(3, 4), nn.Sequential(OwnCheck(3, 4))])
    model[0].original_name = "LSTM"  # no scripted module for that
    with pytest.warns(UserWarning) as caught:
        convert(model)
    (text,) = [str(w.message) for w in caught]
    assert "'0' (OwnForward)" in text and "'2.0' (OwnCheck)" in text


def test_a_subclass_of_ours_is_left_alone_by_both():
    module = OurForward(3, 4)
    with silent():
        convert(module)
    with pytest.warns(UserWarning, match="the OurForward itself left alone"):
        revert(module)
    assert type(module) is OurForward


def test_a_scripted_root():
    model = scripted(nn.Sequential(nn.Sequential(nn.GRU(3, 4))))
    with pytest.warns(UserWarning, match=re.escape("'0.0' (GRU) is scripted")):
        assert convert(model) is model


def test_no_recurrent_module_at_all():
    model = nn.Sequential(nn.Linear(3, 4), nn.LSTMCell(3, 4), nn.RNNCell(3, 4), nn.GRUCell(3, 4))
    before = classes(model)
    with silent():
        convert(model, truncation=3)
        revert(model)
    assert classes(model) == before


# Subclasses that leave the computation to torch.


class Forgetful(nn.LSTM):
    """Its own constructor, initialisation, repr and additions."""

    gain = 2

    def __init__(self, width: int):
        super().__init__(width, width, batch_first=True, dtype=torch.float64)
        self.width = width

    def reset_parameters(self):
        super().reset_parameters()
        with torch.no_grad():
            self.bias_ih_l0[: self.hidden_size].fill_(self.gain)

    def extra_repr(self):
        return f"width={self.width}"

    def zeros(self, B):
        return (torch.zeros(1, B, self.width, dtype=torch.float64),) * 2


def clones(module):
    return [copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module))]


def test_a_subclass_with_torchs_computation():
    torch.manual_seed(0)
    module, x = Forgetful(4), torch.randn(3, 6, 4, dtype=torch.float64)
    expected, text = step(module, x, module.zeros(3)), repr(module)
    with silent():
        convert(module)
    assert isinstance(module, Forgetful) and isinstance(module, fastbptt.LSTM)
    assert repr(module) == text and module.truncation is None
    assert_matches(step(module, x, module.zeros(3)), expected)
    for other in clones(module):
        assert type(other) is type(module)
        assert_matches(step(other, x, other.zeros(3)), step(module, x, module.zeros(3)), rtol=0)
    new = type(module)(3)  # as code does that makes another of the same class
    assert new.width == 3 and new.bias_ih_l0[0] == 2 and isinstance(new, fastbptt.LSTM)
    new(torch.randn(1, 2, 3, dtype=torch.float64))
    module.reset_parameters()
    assert module.bias_ih_l0[0] == 2
    module.load_state_dict(twin(module).state_dict())
    with silent():
        revert(module)
    assert type(module) is Forgetful and "truncation" not in vars(module)


def test_a_subclass_with_truncation():
    torch.manual_seed(0)
    module, x = Forgetful(4), torch.randn(3, 6, 4, dtype=torch.float64)
    expected = step(module, x, call=detach_loop(module, 4))
    convert(module, truncation=4)
    assert_matches(step(module, x), expected)
    for other in clones(module):
        assert_matches(step(other, x), expected)
    assert repr(module) == "Forgetful(width=4, truncation=Chunked(k=4))"


T = TypeVar("T")


class Listed(nn.GRU, Generic[T]):
    __slots__ = ("slot",)


class Abstract(abc.ABC):
    @abc.abstractmethod
    def states(self, B): ...


class Concrete(nn.RNN, Abstract):
    def states(self, B):
        return torch.zeros(self.num_layers, B, self.hidden_size)


class AbstractBase(abc.ABC, nn.RNNBase):
    @abc.abstractmethod
    def states(self, B): ...


class OfTwoBases(AbstractBase, nn.LSTM):
    def states(self, B):
        return None


class Slots:
    __slots__ = ("slot", "other")


class OfSlots(Slots, nn.GRU):
    pass


class Meta(type):
    pass


class OfMetaclass(nn.RNN, metaclass=Meta):
    pass


@pytest.mark.parametrize(
    "cls", [Listed, Concrete, OfTwoBases, OfSlots, OfMetaclass], ids=lambda cls: cls.__name__
)
def test_subclasses_of_several_bases(cls):
    module, x = cls(3, 4), torch.randn(5, 2, 3)
    expected = module(x)[0]
    with silent():
        convert(module)
    assert isinstance(module, cls) and isinstance(module, OURS)
    for other in (module, *clones(module)):
        torch.testing.assert_close(other(x)[0], expected)
        with silent():
            revert(other)
        assert type(other) is cls


# Parametrized modules.


class Packing(nn.LSTM):
    """Packs by itself and leaves the rest to torch, as pytorch-forecasting's modules do."""

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        output, states = super().forward(packed)
        return pad_packed_sequence(output)[0], states


class Residual(Packing):
    def forward(self, x, lengths):
        output, states = super().forward(x, lengths)
        return output + x, states


@pytest.mark.parametrize("cls", [Packing, Residual])
def test_a_forward_that_asks_super(cls):
    torch.manual_seed(0)
    module, x = cls(4, 4, dtype=torch.float64), torch.randn(6, 3, 4, dtype=torch.float64)
    call = {"call": lambda x, hx: module(x, [6, 2, 4])}
    expected, k = step(module, x, **call), 2
    with silent():
        convert(module)
    assert isinstance(module, cls) and isinstance(module, fastbptt.LSTM)
    assert_matches(step(module, x, **call), expected)
    convert(revert(module), truncation=k)
    cut = step(module, x, **call)
    assert_matches({"output": cut["output"]}, {"output": expected["output"]})
    assert (cut["dweight_hh_l0"] - expected["dweight_hh_l0"]).abs().max() > 1e-3
    for other in clones(module):
        assert_matches(step(other, x, call=lambda x, hx: other(x, [6, 2, 4])), cut, rtol=0)  # noqa: B023
    with pytest.warns(UserWarning, match="loses its truncation"):
        revert(module)
    assert type(module) is cls
    assert_matches(step(module, x, **call), expected)


def test_one_that_cannot_be_converted_stops_no_other():
    """Either every module has its new class or is named; nothing is raised half way."""
    model = nn.ModuleList([nn.LSTM(3, 4), refusing(3, 4), OfTwoBases(3, 4), nn.GRU(3, 4)])
    with pytest.warns(UserWarning, match=re.escape("'1' (Refusing) cannot change its class")):
        convert(model)
    assert [isinstance(module, OURS) for module in model] == [True, False, True, True]
    assert type(model[1]) is Refusing and model[1](torch.randn(5, 2, 3))[0].shape == (5, 2, 4)


class Half(nn.Module):
    def forward(self, weight):
        return 0.5 * weight

    def right_inverse(self, weight):
        return 2 * weight


def weight_norm(module):
    return parametrizations.weight_norm(module, "weight_hh_l0")


def orthogonal(module):
    # A square matrix, or the columns of a higher one.
    return parametrizations.orthogonal(module, "weight_hh_l0")


def two(module):
    parametrize.register_parametrization(module, "bias_ih_l0", Half())
    parametrize.register_parametrization(module, "weight_ih_l0", Half())
    parametrize.register_parametrization(module, "weight_ih_l0", Half())
    return module


def old_weight_norm(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(module, "weight_hh_l0")


def pruned(module):
    return prune.l1_unstructured(module, "weight_hh_l0", amount=0.5)


WAYS = [weight_norm, orthogonal, two, old_weight_norm, pruned]
SMALL = [
    Case(6, 3, 4, 5, layers=2),
    Case(6, 3, 4, 5, cell="gru", bidirectional=True),
    Case(6, 3, 4, 5, cell="lstm"),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_parametrized(way, case):
    module = way(twin(case.module()))
    theirs, keys = type(module), list(module.state_dict())
    # Of the old ways and after a call of torch's the weights are results, which do not copy.
    other = None if way in (old_weight_norm, pruned) else copy.deepcopy(module)
    expected = step(module, *case.data())
    with silent():
        convert(module)
    assert isinstance(module, OURS) and isinstance(module, (nn.RNN, nn.GRU, nn.LSTM))
    assert type(module).__name__ == theirs.__name__ and list(module.state_dict()) == keys
    assert_matches(step(module, *case.data()), expected)
    with parametrize.cached():
        assert_matches(step(module, *case.data()), expected)
    if other is not None:  # the copy shares the class that the module had
        assert not isinstance(other, OURS)
        copied = copy.deepcopy(convert(copy.deepcopy(other)))
        assert isinstance(copied, OURS) and not isinstance(other, OURS)
        assert_matches(step(copied, *case.data()), expected)
        assert_matches(step(copy.deepcopy(copied), *case.data()), expected)
        assert_matches(step(other, *case.data()), expected, rtol=0)
    with torch.no_grad():  # values assigned and trained go through the parametrization
        for parameter in module.parameters():
            parameter.mul_(0.75)
    changed = step(module, *case.data())
    assert (changed["output"] - expected["output"]).abs().max() > 1e-3
    with silent():
        revert(module)
    assert not isinstance(module, OURS) and type(module).__mro__[1:] == theirs.__mro__[1:]
    assert_matches(step(module, *case.data()), changed)


@pytest.mark.parametrize("way", [weight_norm, two], ids=lambda way: way.__name__)
def test_parametrized_in_between(way):
    case = SMALL[2]
    module = way(convert(twin(case.module())))
    expected = step(way(twin(case.module())), *case.data())
    assert_matches(step(module, *case.data()), expected)
    revert(module)
    assert isinstance(module, nn.LSTM)
    assert_matches(step(module, *case.data()), expected, rtol=0)
    convert(module)
    for name in list(module.parametrizations):
        parametrize.remove_parametrizations(module, name)
    assert type(module) is fastbptt.LSTM
    plain = {n: expected[n] for n in ("output", "h_n", "c_n", "dinput", "dhx", "dcx")}
    assert_matches({n: t for n, t in step(module, *case.data()).items() if n in plain}, plain)


def test_parametrized_subclass():
    torch.manual_seed(0)
    module, x = two(Forgetful(4)), torch.randn(3, 6, 4, dtype=torch.float64)
    expected = step(copy.deepcopy(module), x)
    with silent():
        convert(module)
    assert isinstance(module, Forgetful) and isinstance(module, fastbptt.LSTM)
    assert_matches(step(module, x), expected)
    assert_matches(step(copy.deepcopy(module), x), expected)
    with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
        pickle.dumps(module)
    revert(module)
    assert type(module).__bases__ == (Forgetful,)
    assert_matches(step(module, x), expected, rtol=0)


class WeightDrop(nn.Module):
    """DropConnect on the recurrent weights (Merity et al., 2018), drawn anew at every call."""

    def __init__(self, module, p):
        super().__init__()
        self.module, self.p = module, p
        self.raw = nn.Parameter(module.weight_hh_l0.data)
        del module._parameters["weight_hh_l0"]
        module.weight_hh_l0 = self.raw.data.clone()
        module.flatten_parameters = lambda: None

    def forward(self, x):
        self.module.weight_hh_l0 = nn.functional.dropout(self.raw, self.p, self.training)
        return self.module(x)[0]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_weight_drop(case):
    x, _ = case.data()
    model = WeightDrop(twin(case.module()), 0.5)
    expected = passes(model, x), passes(model, x, seed=2)
    assert "raw" in expected[0] and not torch.equal(expected[0]["output"], expected[1]["output"])
    with silent():
        convert(model)
    assert isinstance(model.module, OURS)
    for seed, results in enumerate(expected, 1):
        assert_matches(passes(model, x, seed), results)
    expected = passes(model.eval(), x)
    with silent():
        revert(model)
    assert_matches(passes(model, x), expected)


# Copies, and what else sees the class.


def test_copies_of_a_converted_model(numbers):
    model = convert(Model(), truncation=4)
    expected = passes(model, numbers)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert classes(other) == classes(model) and other.again is other.lstm
        assert_matches(passes(other, numbers), expected, rtol=0)
        with pytest.warns(UserWarning, match="loses its truncation"):
            revert(other)
    assert type(model.lstm) is fastbptt.LSTM  # the copies' changes are theirs alone


def test_state_dict_goes_both_ways(numbers):
    plain = Model()
    expected = passes(plain, numbers)
    converted = convert(Model())
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.zero_()
    converted.load_state_dict(plain.state_dict(), strict=True)
    assert_matches(passes(converted, numbers), expected)
    Model().load_state_dict(converted.state_dict(), strict=True)


def test_compiled(numbers):
    torch._dynamo.reset()
    model = Model().eval()
    expected = passes(model, numbers)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        compiled(numbers)  # what was compiled for torch's classes must not be used for ours
    assert convert(compiled) is compiled and type(model.lstm) is fastbptt.LSTM
    torch.compile(model, backend="aot_eager", fullgraph=True)(numbers)
    for _ in range(2):
        assert_matches(passes(model, numbers) | {"output": compiled(numbers).detach()}, expected)
        revert(compiled)


def test_a_module_saved_before_it_kept_its_nonlinearity():
    module = nn.RNN(3, 4, nonlinearity="relu")
    x = torch.randn(5, 2, 3)
    expected = module(x)[0]
    del module.nonlinearity
    torch.testing.assert_close(convert(module)(x)[0], expected)
    assert module.nonlinearity == "relu"


# Bad arguments.


@pytest.mark.parametrize("bad", [None, 3, nn.LSTM, "lstm", [nn.LSTM(3, 4)]], ids=repr)
def test_no_module(bad):
    for change in (convert, revert):
        with pytest.raises(TypeError, match="module must be a torch.nn.Module, got"):
            change(bad)


@pytest.mark.parametrize(
    "bad, error", [(0, ValueError), (-3, ValueError), (True, TypeError), (2.0, TypeError)]
)
def test_truncation_is_checked_first(bad, error):
    model = Model()
    before = classes(model)
    with pytest.raises(error, match="truncation"):
        convert(model, truncation=bad)
    assert classes(model) == before
    with pytest.raises(TypeError):
        convert(model, 3)  # by keyword only


def test_what_torch_cannot_express_is_refused_before_anything_changes():
    model = convert(nn.ModuleDict({"a": nn.LSTM(3, 4), "b": nn.GRU(3, 4)}), truncation=3)
    model["c"] = nn.Sequential(fastbptt.RNN(3, 4, nonlinearity="identity"))
    before = classes(model)
    with pytest.raises(ValueError, match=re.escape("identity', that of 'c.0' (RNN)")):
        revert(model)
    assert classes(model) == before and model["a"].truncation == Chunked(3)


# A model from elsewhere.


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_sequence_tagger(cell):
    """The bidirectional tagger with a CRF of the package bi-lstm-crf."""
    torch.manual_seed(0)
    model = BiRnnCrf(30, 5, embedding_dim=12, hidden_dim=16, num_rnn_layers=2, rnn=cell).double()
    sentences = torch.randint(1, 30, (6, 11))
    for row, length in enumerate((7, 11, 1, 4, 11, 9)):
        sentences[row, length:] = 0
    tags = torch.randint(5, (6, 11))

    def run():
        model.zero_grad()
        loss = model.loss(sentences, tags)
        loss.backward()
        scores, paths = model(sentences)
        grads = {n: p.grad.clone() for n, p in model.named_parameters()}
        return {"loss": loss.detach(), "scores": scores.detach(), **grads}, paths

    expected, expected_paths = run()
    with silent():
        convert(model)
    assert type(model.rnn) in OURS
    actual, paths = run()
    assert_matches(actual, expected)
    assert paths == expected_paths
    convert(revert(model), truncation=4)
    cut, paths = run()
    assert paths == expected_paths
    difference = (cut["rnn.weight_hh_l0"] - expected["rnn.weight_hh_l0"]).abs().max()
    assert difference > 1e-6, "the truncation did nothing"
