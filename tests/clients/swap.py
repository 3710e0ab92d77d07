"""What the tests of this folder share: a model, its converted copy, and the two compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch

import fastbptt

_M = TypeVar("_M", bound=torch.nn.Module)

_PAIRS = {
    torch.nn.RNN: fastbptt.RNN,
    torch.nn.GRU: fastbptt.GRU,
    torch.nn.LSTM: fastbptt.LSTM,
}


def converted(model: _M) -> _M:
    """A converted copy of a model, in which nothing of torch.nn's was left."""
    before = recurrent(model)
    assert before, "nothing to convert"
    ours = fastbptt.convert(copy.deepcopy(model))
    assert recurrent(ours).keys() == before.keys()
    for name, module in recurrent(ours).items():
        assert_ours(module, type(before[name]))
    return ours


def recurrent(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """A model's recurrent modules of either library, by name."""
    classes = (torch.nn.RNNBase, *_PAIRS.values())
    return {name: each for name, each in model.named_modules() if isinstance(each, classes)}


def assert_ours(module: torch.nn.Module, cls: type) -> None:
    """A module is fastbptt's, and for whoever asks still the ``cls`` that it was."""
    ours = next(ours for torchs, ours in _PAIRS.items() if issubclass(cls, torchs))
    assert isinstance(module, ours), f"{type(module).__mro__} has no {ours}"
    assert isinstance(module, cls), f"{type(module).__mro__} has no {cls}"


def assert_same(ours: object, theirs: object, rtol: float = 1e-5, atol: float = 0.0) -> None:
    """Tensors in containers of one shape, each close relative to its largest element."""
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=0, atol=rtol * _scale(theirs) + atol)
    elif isinstance(theirs, Mapping):
        assert list(ours.keys()) == list(theirs.keys())
        assert_same(list(ours.values()), list(theirs.values()), rtol, atol)
    elif isinstance(theirs, Iterable):
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other, rtol, atol)
    else:
        assert ours is None and theirs is None, f"nothing compares {ours!r} and {theirs!r}"


def assert_same_gradients(ours: torch.nn.Module, theirs: torch.nn.Module) -> float:
    """Returns the difference that is rounding and no more, however small the gradient."""
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    largest = max(_scale(g) for g in gradients.values() if g is not None)
    assert largest > 0, "no gradients"
    # Some are 0 but for the rounding of others, as that of a bias before a normalisation.
    rounding = torch.finfo(torch.float32).eps * largest
    assert_same({name: p.grad for name, p in ours.named_parameters()}, gradients, atol=rounding)
    return rounding


def _scale(tensor: torch.Tensor) -> float:
    return tensor.double().abs().max().item() if tensor.numel() else 0.0


def assert_trains_alike(
    ours: torch.nn.Module,
    theirs: torch.nn.Module,
    loss: Callable[[torch.nn.Module], torch.Tensor],
    *,
    steps: int = 3,
    lr: float = 0.1,
) -> None:
    """Gradients, losses and weights of some steps of SGD on ``loss(model)`` are the same."""
    initial = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    optimizers = [torch.optim.SGD(model.parameters(), lr) for model in (ours, theirs)]
    rounding = 0.0
    for _ in range(steps):
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(loss(model))
            losses[-1].backward()
        assert_same(*losses)
        rounding += lr * assert_same_gradients(ours, theirs)
        for optimizer in optimizers:
            optimizer.step()
    assert_same(ours.state_dict(), theirs.state_dict(), atol=rounding)
    trained = dict(theirs.named_parameters())
    for name in (f"{n}.weight_hh_l0" if n else "weight_hh_l0" for n in recurrent(theirs)):
        assert name not in trained or not torch.equal(trained[name], initial[name]), name
