"""torch.jit.script: a scripted model computes as the eager one, in outputs and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fastbptt
from common import (
    CELLS,
    Case,
    assert_matches,
    python,
    step,
    tensors_of,
    through_file,
    through_pickle,
)
from fastbptt import TBPTT, Chunked, Gated, Randomized, convert, revert

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

CUTS = (None, Chunked(2), TBPTT(2, 3))
LAYOUTS = {
    "dense": {},
    "batch first": {"batch_first": True},
    "unbatched": {"B": None},
    "unbatched, batch first": {"B": None, "batch_first": True},
    "packed": {"lengths": (5, 2, 4)},
    "packed, sorted": {"lengths": (5, 4, 2), "batch_first": True},
}


class Net(nn.Module):
    def __init__(self, rnn: nn.Module):
        super().__init__()
        self.rnn = rnn


class OfTensor(Net):
    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.rnn(input, hx)


class OfTensorLSTM(Net):
    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self.rnn(input, hx)


class OfPacked(Net):
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None
    ) -> tuple[PackedSequence, Tensor]:
        return self.rnn(input, hx)


class OfPackedLSTM(Net):
    def forward(
        self, input: PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]:
        return self.rnn(input, hx)


def scripted(module: nn.RNNBase) -> torch.jit.ScriptModule:
    return torch.jit.script((OfTensorLSTM if isinstance(module, nn.LSTM) else OfTensor)(module))


def scripted_packed(module: nn.RNNBase) -> Callable:
    script = torch.jit.script((OfPackedLSTM if isinstance(module, nn.LSTM) else OfPacked)(module))

    def call(input: PackedSequence, hx=None):
        output, states = script(input, hx)
        return PackedSequence(*output), states  # TorchScript gives a tuple with its fields

    return call


def assert_scripts(case: Case, **options) -> None:
    module, (x, hx) = case.module(**options), case.data()
    script = (scripted_packed if isinstance(x, PackedSequence) else scripted)(module)
    expected = step(module, x, hx)
    for _ in range(3):  # the first calls are profiled, the next ones optimised
        assert_matches(step(module, x, hx, call=script), expected, rtol=0)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", CELLS)
def test_as_eager(cell, layout, cut):
    assert_scripts(Case(cell=cell, layers=2, **LAYOUTS[layout]), truncation=cut)


@pytest.mark.parametrize(
    "case",
    [
        Case(cell="lstm", hx=False),
        Case(cell="gru", hx=False, lengths=(5, 2, 4)),
        Case(cell="lstm", layers=3, bidirectional=True, proj=2),
        Case(cell="lstm", layers=2, bidirectional=True, proj=2, lengths=(2, 5, 4)),
        Case(cell="gru", layers=2, bidirectional=True, batch_first=True, bias=False),
        Case(cell="tanh", layers=2, bidirectional=True, B=None),
        Case(cell="lstm", dtype=torch.float32),
        Case(cell="gru", dtype=torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("cut", (None, Chunked(2)), ids=str)
def test_other_networks(case, cut):
    assert_scripts(case, truncation=cut)


@pytest.mark.parametrize("cell", ("gru", "lstm"))
def test_recompute(cell):
    assert_scripts(Case(cell=cell), recompute=True)


def test_each_module_has_its_own_truncation():
    """Modules of one class share their TorchScript type where they can; here they cannot."""
    case = Case(cell="gru")
    modules = [case.module(truncation=cut) for cut in (None, 1, 2, 1)]
    model = torch.jit.script(nn.ModuleList(OfTensor(module) for module in modules))
    x, hx = case.data()
    for module, script in zip(modules, model, strict=True):
        assert_matches(step(module, x, hx, call=script), step(module, x, hx), rtol=0)


def test_dropout():
    module = Case(cell="gru", layers=2).module(dropout=0.5)
    script, (x, hx) = scripted(module), Case(cell="gru", layers=2).data()
    results = []
    for call in (module, script):
        torch.manual_seed(3)
        results.append(call(x, hx)[0])
    assert torch.equal(*results)
    assert torch.equal(script.eval()(x, hx)[0], module.eval()(x, hx)[0])
    assert not torch.equal(script(x, hx)[0], results[0])


class Policy(nn.Module):
    """A step at a time, with the states as buffers: how policies are exported."""

    def __init__(self, rnn: nn.LSTM):
        super().__init__()
        self.rnn = copy.deepcopy(rnn)
        self.register_buffer("hidden_state", torch.zeros(2, 1, 4))
        self.register_buffer("cell_state", torch.zeros(2, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        x, (h, c) = self.rnn(x.unsqueeze(0), (self.hidden_state, self.cell_state))
        self.hidden_state[:] = h
        self.cell_state[:] = c
        return x.squeeze(0)

    @torch.jit.export
    def reset(self) -> None:
        self.hidden_state[:] = 0.0
        self.cell_state[:] = 0.0


@pytest.mark.slow
def test_a_policy_in_another_process(tmp_path):
    """Saved and loaded where only fastbptt is imported; moved to another dtype there."""
    policy = Policy(fastbptt.LSTM(3, 4, 2, truncation=2)).eval()
    torch.jit.script(policy).save(tmp_path / "policy.pt")
    x = torch.randn(5, 1, 3)
    with torch.no_grad():
        outputs = torch.stack([policy(each) for each in x])
    torch.save((x, outputs), tmp_path / "data.pt")
    script = """
import sys, torch, fastbptt
policy = torch.jit.load(sys.argv[1])
x, outputs = torch.load(sys.argv[2])
for dtype in (torch.float32, torch.float64):
    policy.to(dtype).reset()
    with torch.no_grad():
        results = torch.stack([policy(each) for each in x.to(dtype)])
    torch.testing.assert_close(results, outputs.to(dtype), rtol=1e-5, atol=1e-6)
"""
    python(script, tmp_path / "policy.pt", tmp_path / "data.pt")


def test_frozen():
    policy = Policy(fastbptt.LSTM(3, 4, 2)).eval()
    frozen = torch.jit.freeze(torch.jit.script(copy.deepcopy(policy)))  # which shares its buffers
    for x in torch.randn(3, 1, 3):
        torch.testing.assert_close(frozen(x), policy(x))


def train(module: nn.Module, call: nn.Module) -> list[float]:
    optimizer = torch.optim.Adam(call.parameters(), lr=0.05)
    x, hx = Case(cell="gru").data()
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = call(x, hx)[0].square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training():
    """The script's parameters are the module's own, as with torch.nn."""
    module = Case(cell="gru").module(truncation=2)
    eager = copy.deepcopy(module)
    losses = train(module, scripted(module))
    assert losses == train(eager, eager) and losses[-1] < losses[0]
    assert_matches(dict(module.named_parameters()), dict(eager.named_parameters()), rtol=0)


# Truncations and calls that are refused.


@pytest.mark.parametrize("cut", (Gated(torch.ones(5)), Randomized(pi=0.5)), ids=("G", "R"))
def test_what_torchscript_cannot_draw(cut):
    model = OfTensor(fastbptt.GRU(3, 4, truncation=cut))
    with pytest.raises(NotImplementedError, match=r"truncation=.* scripted; fastbptt\.revert\("):
        torch.jit.script(model)
    with pytest.warns(UserWarning, match="loses its truncation"):
        revert(model)
    torch.jit.script(model)


class Old(torch.jit.ScriptModule):
    def __init__(self, rnn: nn.GRU):
        super().__init__()
        self.rnn = rnn

    @torch.jit.script_method
    def forward(self, input: Tensor) -> Tensor:
        return self.rnn(input)[0]


def test_inside_a_script_module():
    module, (x, _) = Case(cell="gru").module(truncation=2), Case(cell="gru").data()
    assert torch.equal(Old(module)(x), module(x)[0])
    model = Old(Case(cell="gru").module(truncation=Gated(torch.ones(5))))
    with pytest.raises(torch.jit.Error, match=r"fastbptt\.revert"):
        model(x)


def test_windows_that_overlap_in_both_directions():
    model = scripted(fastbptt.GRU(3, 4, bidirectional=True, truncation=TBPTT(1, 2)))
    with pytest.raises(torch.jit.Error, match=r"windows that overlap \(k1 < k2\)"):
        model(torch.randn(5, 3, 3))


WRONG = {
    "features": ((5, 3, 2), None),
    "dimensions": ((5, 3, 3, 3), None),
    "hx of another batch": ((5, 3, 3), (1, 2, 4)),
    "hx of other features": ((5, 3, 3), (1, 3, 3)),
    "hx without batch": ((5, 3, 3), (1, 4)),
    "hx with batch": ((5, 3), (1, 3, 4)),
}


@pytest.mark.parametrize("shape, state", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("cls", (fastbptt.GRU, fastbptt.LSTM))
def test_wrong_shapes(cls, shape, state):
    module = cls(3, 4)
    hx = None if state is None else torch.randn(state)
    if cls is fastbptt.LSTM and hx is not None:
        hx = (hx, hx)
    with pytest.raises((ValueError, RuntimeError)):
        module(torch.randn(shape), hx)
    script = scripted(module)
    with pytest.raises(torch.jit.Error, match=r"(?i)input|expected hidden|hx"):
        script(torch.randn(shape), hx)


def test_a_wrong_cell_state():
    script, h = scripted(fastbptt.LSTM(3, 4, proj_size=2)), torch.randn(1, 3, 2)
    with pytest.raises(torch.jit.Error, match=r"Expected hidden\[1\] size \(1, 3, 4\)"):
        script(torch.randn(5, 3, 3), (h, h))


def test_wrong_dtype():
    with pytest.raises(RuntimeError, match="dtype|Double"):
        scripted(fastbptt.GRU(3, 4))(torch.randn(5, 3, 3).double())


# Autocast.


class Inside(Net):
    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.rnn(input)[0]


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("cell", ("tanh", "gru", "lstm"))
def test_autocast(cell, dtype, packed):
    """On and off by turns: what was compiled under one must not stay under the other."""
    case = Case(cell=cell, lengths=(5, 2, 4) if packed else None, dtype=torch.float32)
    module, (x, hx) = case.module(truncation=2), case.data()
    script = (scripted_packed if packed else scripted)(module)
    for enabled in (False, True, True, False, True, False):
        with torch.autocast("cpu", dtype, enabled=enabled):
            assert_matches(step(module, x, hx, call=script), step(module, x, hx), rtol=0)


def test_autocast_inside_the_script():
    case = Case(cell="gru", dtype=torch.float32)
    model, (x, _) = Inside(case.module()), case.data()
    script = torch.jit.script(model)
    for _ in range(3):
        result = script(x)
        assert result.dtype == model(x).dtype and torch.equal(result, model(x))


# Before and after scripting.


@pytest.mark.parametrize("cls", (nn.RNN, nn.GRU, nn.LSTM))
def test_convert_after_scripting(cls):
    """Scripting leaves its notes on a module; they are no obstacle, and convert's are new."""
    module = cls(3, 4)
    x = torch.randn(5, 3, 3)
    expected = tensors_of(module(x))
    for turn in (convert, revert, convert):
        turn(module)
        for call in (module, scripted(module)):
            for a, b in zip(tensors_of(call(x)), expected, strict=True):
                torch.testing.assert_close(a, b)
    assert type(module) is getattr(fastbptt, cls.__name__)


@pytest.mark.parametrize("cls", (nn.GRU, nn.LSTM))
def test_convert_what_torch_has_scripted(cls):
    module = cls(3, 4)
    scripted(module)
    convert(module, truncation=2)
    assert type(module) is getattr(fastbptt, cls.__name__)
    x = torch.randn(5, 3, 3)
    assert_matches(step(module, x, call=scripted(module)), step(module, x), rtol=0)


def test_scripting_changes_nothing_of_the_module():
    module = fastbptt.LSTM(3, 4)
    before = dict(vars(module))
    scripted(module)
    assert vars(module) == before


@pytest.mark.parametrize("through", (copy.deepcopy, copy.copy, through_pickle, through_file))
def test_copies(through):
    module, x = through(fastbptt.LSTM(3, 4, truncation=2)), torch.randn(5, 3, 3)
    assert_matches(step(module, x, call=scripted(module)), step(module, x), rtol=0)


def test_a_parametrized_module_is_refused():
    """As torch.nn's is: its weight would stay that of the moment of scripting."""
    module = nn.utils.parametrizations.weight_norm(fastbptt.GRU(3, 4), "weight_hh_l0")
    with pytest.raises(NotImplementedError, match="weight_hh_l0 cannot be scripted"):
        scripted(module)
    nn.utils.parametrize.remove_parametrizations(module, "weight_hh_l0")
    x = torch.randn(5, 3, 3)
    assert_matches(step(module, x, call=scripted(module)), step(module, x), rtol=0)


class Doubled(fastbptt.GRU):
    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().forward(2 * input, hx)


class Halved(nn.GRU):
    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().forward(0.5 * input, hx)


@pytest.mark.parametrize("make", (lambda: Doubled(3, 4), lambda: convert(Halved(3, 4))))
def test_a_forward_of_a_subclass_is_not_passed_over(make):
    """TorchScript does not know super(), with torch.nn's modules as with ours."""
    with pytest.raises(RuntimeError, match="forward"):
        torch.jit.script(OfTensor(make()))
