"""d2l 0.17: the RNNModel of Dive into Deep Learning, whose states depend on the module's class."""

from __future__ import annotations

import sys
import types

import pytest
import torch


@pytest.fixture(scope="module")
def d2l():
    """It imports torchvision first, of which none of this needs anything."""
    pytest.importorskip("d2l")
    with pytest.MonkeyPatch.context() as patch:
        if "torchvision" not in sys.modules:
            torchvision = types.ModuleType("torchvision")
            torchvision.transforms = types.ModuleType("torchvision.transforms")
            patch.setitem(sys.modules, "torchvision", torchvision)
        module = pytest.importorskip("d2l.torch")
        if not hasattr(module, "RNNModel"):
            pytest.skip("d2l 1.0 has another RNN")
        yield module


from clients.swap import assert_same, assert_trains_alike, converted  # noqa: E402

VOCABULARY, H, B = 11, 6, 2


@pytest.fixture(params=[torch.nn.RNN, torch.nn.GRU, torch.nn.LSTM])
def models(request, d2l):
    layers = request.param(VOCABULARY, H, num_layers=2, bidirectional=True)
    theirs = d2l.RNNModel(layers, VOCABULARY)
    return converted(theirs), theirs


def test_begin_state(models):
    ours, theirs = (model.begin_state("cpu", B) for model in models)
    assert_same(ours, theirs)
    characters = torch.randint(VOCABULARY, (B, 9))
    assert_same(models[0](characters, ours), models[1](characters, theirs))


def test_training(models):
    characters = torch.randint(VOCABULARY, (B, 10))

    def loss(model: torch.nn.Module) -> torch.Tensor:
        output, _ = model(characters[:, :-1], model.begin_state("cpu", B))
        return torch.nn.functional.cross_entropy(output, characters[:, 1:].T.reshape(-1))

    assert_trains_alike(*models, loss)


def test_its_own_training(models, d2l):
    """Its epoch, which carries the state from batch to batch and detaches it by its kind."""
    text = torch.randint(VOCABULARY, (4, B, 10))
    perplexities = [
        d2l.train_epoch_ch8(
            model, [(each[:, :-1], each[:, 1:]) for each in text], torch.nn.CrossEntropyLoss(),
            torch.optim.SGD(model.parameters(), 0.5), "cpu", use_random_iter=False,
        )[0]
        for model in models
    ]  # fmt: skip
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-5)
    assert_same(*(model.state_dict() for model in models))
