"""darts: models that make their networks inside `fit`, so torch.nn's names are patched."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("darts")
pytest.importorskip("pytorch_lightning")

import numpy as np
from darts import TimeSeries
from darts.models import BlockRNNModel, RNNModel

import fastbptt
from clients.swap import assert_ours, assert_same

QUIET = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
}
MODELS = {
    RNNModel: {"training_length": 12},
    BlockRNNModel: {"output_chunk_length": 4, "n_rnn_layers": 2},
}


@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("model", MODELS)
def test_fit_and_predict(model, cell):
    series = TimeSeries.from_values(np.sin(np.arange(60) / 4).astype("float32"))

    def fitted() -> torch.nn.Module:
        return model(
            model=cell, input_chunk_length=8, hidden_dim=6, batch_size=16, n_epochs=2,
            random_state=0, pl_trainer_kwargs=QUIET, optimizer_cls=torch.optim.SGD,
            optimizer_kwargs={"lr": 0.1}, **MODELS[model],
        ).fit(series)  # fmt: skip

    theirs = fitted()
    with fastbptt.patch():
        ours = fitted()
        predicted = ours.predict(6)
    cls = getattr(torch.nn, cell)
    assert type(theirs.model.rnn) is cls
    assert_ours(ours.model.rnn, cls)
    assert_same(ours.model.state_dict(), theirs.model.state_dict())
    values = [torch.from_numpy(each.values()) for each in (predicted, theirs.predict(6))]
    assert_same(*values)
