"""The callback of the documentation in Lightning: it sets the truncation, and is resumed."""

from __future__ import annotations

import sys

import pytest
import torch

import fastbptt
from common import python_blocks

lightning = pytest.importorskip("pytorch_lightning")


class Model(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = fastbptt.GRU(3, 5)
        self.seen: list[object] = []

    def loss(self, output, target):
        return (output - target).square().mean()

    def training_step(self, batch, batch_idx):
        self.seen.append(self.rnn.truncation)
        return self.loss(self.rnn(batch[0])[0], batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_callback(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning", lightning)  # the same under its older name
    names: dict = {}
    (block,) = (b for b in python_blocks("choosing_a_truncation.md") if "lightning" in b)
    exec(block, names)
    torch.manual_seed(0)
    batches = [(torch.randn(20, 8, 3), torch.randn(20, 8, 5)) for _ in range(3)]

    def fit(epochs, checkpoint=None):
        schedule = fastbptt.AdaptiveTruncation(0.5, k_max=10, every=100)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            default_root_dir=tmp_path,
            callbacks=[names["AdaptTruncation"](schedule)],
            **quiet,
        )
        model = Model()
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        trainer.fit(model, loader, ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return schedule, model

    schedule, model = fit(1)
    expected = fastbptt.TBPTT(schedule.k, 2 * schedule.k - 1)
    assert schedule.calls == 3 and model.seen == [expected] * 3
    schedule, model = fit(2, tmp_path / "last.ckpt")
    assert schedule.calls == 6 and model.seen == [expected] * 3  # not measured again
