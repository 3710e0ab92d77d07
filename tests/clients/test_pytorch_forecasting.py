"""pytorch-forecasting: its modules for sequences of length 0, and a model that trains with them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pytorch_forecasting")

import numpy as np
import pandas as pd
from pytorch_forecasting import DeepAR, TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.models.nn import get_rnn

from clients.swap import assert_same, assert_trains_alike, converted

every_cell = pytest.mark.parametrize("cell", ["LSTM", "GRU"])


@every_cell
@pytest.mark.parametrize("lengths", [[6, 0, 2], [0, 0, 0], None])
def test_module(cell, lengths):
    """A subclass that packs, calls what it derives from, and mends the states of empty rows."""
    theirs = get_rnn(cell)(4, 5, num_layers=2, batch_first=True)
    ours = converted(theirs)
    x = torch.randn(3, 6, 4)
    lengths = lengths and torch.tensor(lengths)
    results = [each(x, lengths=lengths, enforce_sorted=False) for each in (ours, theirs)]
    assert_same(*results)
    if results[1][0].requires_grad:
        loss = lambda m: m(x, lengths=lengths, enforce_sorted=False)[0].square().mean()  # noqa: E731
        assert_trains_alike(ours, theirs, loss)


@pytest.fixture
def dataset() -> TimeSeriesDataSet:
    time = np.arange(40)
    frame = pd.DataFrame(
        {
            "time": np.tile(time, 2),
            "group": np.repeat(["a", "b"], len(time)),
            "value": np.concatenate([np.sin(time / 3), np.cos(time / 4)]).astype("float32"),
        }
    )
    return TimeSeriesDataSet(
        frame, time_idx="time", target="value", group_ids=["group"], max_encoder_length=8,
        min_encoder_length=3, max_prediction_length=4, time_varying_known_reals=["time"],
        time_varying_unknown_reals=["value"],
    )  # fmt: skip


@pytest.mark.parametrize(
    "model, settings",
    [
        (DeepAR, {"cell_type": "LSTM", "hidden_size": 6}),
        (DeepAR, {"cell_type": "GRU", "hidden_size": 6}),
        (TemporalFusionTransformer, {"hidden_size": 4, "attention_head_size": 1}),
    ],
)
def test_model(model, settings, dataset):
    theirs = model.from_dataset(dataset, dropout=0.0, **settings)
    ours = converted(theirs)
    x, y = next(iter(dataset.to_dataloader(batch_size=8, shuffle=False, num_workers=0)))

    def loss(model: torch.nn.Module) -> torch.Tensor:
        return model.loss(model(x)["prediction"], y)

    assert_trains_alike(ours, theirs, loss, lr=0.01)
