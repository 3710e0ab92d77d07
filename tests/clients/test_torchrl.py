"""TorchRL: its LSTMModule and GRUModule, with episodes that begin inside a row, and a loss."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torchrl")

from tensordict import TensorDict
from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode

from clients.swap import assert_ours, assert_same, assert_trains_alike, converted

MODULES = {"lstm": LSTMModule, "gru": GRUModule}
CLASSES = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}
every_cell = pytest.mark.parametrize("cell", MODULES)

B, T, I, H, LAYERS = 3, 12, 4, 5, 2


def make_module(cell: str, **settings: object) -> torch.nn.Module:
    return MODULES[cell](I, H, LAYERS, in_key="seen", out_key="features", **settings)


def make_data(resets: bool) -> TensorDict:
    is_init = torch.zeros(B, T, 1, dtype=torch.bool)
    is_init[:, 0] = True
    if resets:
        is_init[0, 5] = is_init[1, 3] = is_init[1, 4] = True
    states = {f"recurrent_state_{x}": torch.zeros(B, T, LAYERS, H) for x in ("h", "c")}
    states["recurrent_state"] = states["recurrent_state_h"]
    return TensorDict({"seen": torch.randn(B, T, I), "is_init": is_init, **states}, [B, T])


@every_cell
@pytest.mark.parametrize("resets", [False, True])
def test_rows(cell, resets):
    theirs = make_module(cell)
    ours, data = converted(theirs), make_data(resets)
    with set_recurrent_mode(True):
        assert_same(ours(data.clone()), theirs(data.clone()))
        target = torch.randn(B, T, H)
        assert_trains_alike(
            ours, theirs, lambda m: (m(data.clone())["features"] - target).square().mean()
        )


@every_cell
def test_steps(cell):
    """As a collector calls it: one step, its states the next one's."""
    theirs = make_module(cell)
    ours, data = converted(theirs), make_data(resets=True)
    states = [key for key in data.keys() if key.startswith("recurrent")]
    now = [data[:, 0].clone(), data[:, 0].clone()]
    for t in range(T):
        for i, module in enumerate((ours, theirs)):
            now[i].update(data[:, t].select("seen", "is_init"))
            now[i] = module(now[i])
        assert_same(*now)
        now = [each.update(each["next"].select(*states, strict=False)) for each in now]


@every_cell
def test_python_based_and_back(cell):
    """TorchRL's own cells in between: what it puts back afterwards is torch's, so convert again."""
    ours, data = converted(make_module(cell)), make_data(resets=True)
    assert ours.make_cudnn_based() is ours
    assert_ours(getattr(ours, cell), CLASSES[cell])  # nothing to be done: it is one
    with set_recurrent_mode(True):
        before = ours(data.clone())
        assert_same(ours.make_python_based()(data.clone())["features"], before["features"])
        assert_same(converted(ours.make_cudnn_based())(data.clone()), before)
