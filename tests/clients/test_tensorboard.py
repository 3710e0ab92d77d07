"""TensorBoard: the graph of a model, which is traced for it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from clients.swap import converted

T, B, I, H = 7, 3, 4, 5


class Net(torch.nn.Module):
    def __init__(self, cls: type) -> None:
        super().__init__()
        self.layers = cls(I, H, 2)
        self.head = torch.nn.Linear(H, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x)[0])


@pytest.mark.parametrize("cls", [torch.nn.RNN, torch.nn.GRU, torch.nn.LSTM])
def test_add_graph(cls, tmp_path):
    """The same modules with the same parameters; what is inside one is its own affair."""
    seen = []
    theirs = Net(cls)
    for name, model in (("ours", converted(theirs)), ("theirs", theirs)):
        with SummaryWriter(tmp_path / name) as writer:
            writer.add_graph(model, torch.randn(T, B, I))
        events = EventAccumulator(str(tmp_path / name)).Reload()
        nodes = [node.name for node in events.Graph().node]
        seen.append({each for each in nodes if "weight" in each or "bias" in each})
    assert len(seen[1]) == 8 + 2
    assert seen[0] == seen[1]
