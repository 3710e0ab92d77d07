"""torch.fx's graphs, and objects that take part in torch's functions without being tensors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fastbptt
from common import Case, assert_matches, step, tensors_of, twin

CELLS = ["tanh", "gru", "lstm"]


class Net(nn.Module):
    """What a recurrent net does with a module's results: all of them, taken apart."""

    def __init__(self, rnn: nn.RNNBase, hx: bool = False, **options):
        super().__init__()
        self.rnn, self.hx, self.options = rnn, hx, options
        self.head = nn.Linear(4, 2, dtype=torch.float64)
        torch.nn.init.ones_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, x, hx=None, resets=None):
        options = self.options if resets is None else {**self.options, "resets": resets}
        arguments = (x.tanh(), hx) if self.hx else (x.tanh(),)
        if self.rnn.mode == "LSTM":
            output, (h, c) = self.rnn(*arguments, **options)
            return self.head(output), h + c
        output, h = self.rnn(*arguments, **options)
        return self.head(output), h


def leaves(graph_module: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in graph_module.graph.nodes if node.target == "rnn"]


@pytest.mark.parametrize("hx", [False, True], ids="hx={}".format)
@pytest.mark.parametrize("cell", CELLS)
def test_one_leaf_as_for_torchs_module(cell, hx):
    case = Case(cell=cell)
    module, (x, states) = case.module(truncation=2), case.data()
    traced = torch.fx.symbolic_trace(Net(module, hx))
    (leaf,) = leaves(traced)
    assert leaf.op == "call_module" and traced.get_submodule("rnn") is module
    assert traced.code == torch.fx.symbolic_trace(Net(twin(module), hx)).code
    arguments = (x, states) if hx else (x,)

    def run(net):
        return lambda x, hx=None: net(*arguments)

    assert_matches(
        step(module, *arguments, call=run(traced)),
        step(module, *arguments, call=run(Net(module, hx))),
        rtol=0,
    )


@pytest.mark.parametrize("through", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("cell", CELLS)
def test_a_copy_trains_on(cell, through):
    module, (x, _) = Case(cell=cell).module(truncation=2), Case().data()
    traced = torch.fx.symbolic_trace(Net(module))
    other = through(traced)
    traced.graph.lint()
    other.recompile()
    assert type(other.rnn) is type(module) and other.rnn.truncation == fastbptt.Chunked(2)
    grads = []
    for each in (traced, other):
        each(x)[0].square().sum().backward()
        grads.append({name: p.grad for name, p in each.named_parameters()})
    assert_matches(grads[1], grads[0], rtol=0)


def test_options_of_the_call():
    """Truncation and resets are arguments of the leaf."""
    module, (x, hx) = Case().module(), Case().data()
    resets = torch.tensor([False, True, False, True, False])
    traced = torch.fx.symbolic_trace(Net(module, True, truncation=fastbptt.TBPTT(1, 2)))
    assert set(leaves(traced)[0].kwargs) == {"truncation", "resets"}
    net = Net(module, True, truncation=fastbptt.TBPTT(1, 2))
    results = [
        step(module, x, hx, call=lambda x, hx, each=each: each(x, hx, resets))
        for each in (traced, net)
    ]
    assert_matches(results[0], results[1], rtol=0)


def test_hooks_run_with_the_leaf():
    """Not when it is traced, with what has no values; and once."""
    net, (x, _) = Net(Case(cell="gru").module()), Case().data()
    seen = []
    net.rnn.register_forward_hook(lambda module, inputs, results: seen.append(results[0].sum()))
    traced = torch.fx.symbolic_trace(net)
    assert not seen
    traced(x)
    assert len(seen) == 1 and isinstance(seen[0], torch.Tensor)


class Negated(fastbptt.GRU):
    def forward(self, x, resets=None):
        return super().forward(-x)


def test_a_subclass_with_a_forward_of_its_own():
    """It is one leaf as a whole: what it does beside is not done twice."""
    net, (x, _) = Net(Negated(3, 4, dtype=torch.float64)), Case().data()
    traced = torch.fx.symbolic_trace(net)
    assert len(leaves(traced)) == 1
    for a, b in zip(traced(x), net(x), strict=True):
        assert torch.equal(a, b)


class FixedInput(nn.Module):
    """The state alone is unknown."""

    def __init__(self, rnn, pair):
        super().__init__()
        self.rnn, self.pair = rnn, pair
        self.x = nn.Parameter(Case().data()[0])

    def forward(self, h):
        return self.rnn(self.x, (h, h) if self.pair else h)[0]


@pytest.mark.parametrize("cell", CELLS)
def test_only_the_state_is_a_proxy(cell):
    net = FixedInput(Case(cell=cell).module(), cell == "lstm")
    h = torch.randn(1, 3, 4, dtype=torch.float64)
    assert torch.equal(torch.fx.symbolic_trace(net)(h), net(h))


class Wrapper:
    """Holds a tensor, and is asked what torch's functions do with it."""

    def __init__(self, value: torch.Tensor):
        self.value = value
        self.asked: list = []

    def __getattr__(self, name):
        return getattr(self.__dict__["value"], name)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        def plain(value):
            if isinstance(value, cls):
                value.asked.append(func)
                return value.value
            return type(value)(map(plain, value)) if isinstance(value, tuple | list) else value

        result = func(*plain(args), **{k: plain(v) for k, v in (kwargs or {}).items()})
        return type(result)(map(cls, result)) if isinstance(result, tuple | list) else cls(result)


@pytest.mark.parametrize("wrapped", ["input", "hx", "both"])
@pytest.mark.parametrize("cell", CELLS)
def test_like_a_tensor(cell, wrapped):
    case = Case(cell=cell)
    module, (x, hx) = case.module(truncation=2), case.data()
    expected = tensors_of(module(x, hx))
    first = x
    if wrapped != "input":
        hx = tuple(map(Wrapper, hx)) if isinstance(hx, tuple) else Wrapper(hx)
        first = hx[0] if isinstance(hx, tuple) else hx
    if wrapped != "hx":
        x = first = Wrapper(x)
    output, states = module(x, hx)
    states = states if isinstance(states, tuple) else (states,)
    assert torch.ops.fastbptt.network.default in first.asked
    for a, b in zip((output, *states), expected, strict=True):
        assert isinstance(a, Wrapper) and torch.equal(a.value, b)


def test_no_tensor_at_all():
    with pytest.raises(TypeError, match="input must be a Tensor or a PackedSequence, got list"):
        fastbptt.GRU(3, 4)([1.0])
    with pytest.raises(TypeError, match="hx must hold a Tensor for each state, got int"):
        fastbptt.GRU(3, 4)(torch.randn(5, 2, 3), 1)
