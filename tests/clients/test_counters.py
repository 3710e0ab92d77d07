"""thop and ptflops count operations by tables in which they look a module's exact class up."""

from __future__ import annotations

import pytest
import torch

import fastbptt
from clients.swap import converted

CLASSES = {
    torch.nn.RNN: fastbptt.RNN,
    torch.nn.GRU: fastbptt.GRU,
    torch.nn.LSTM: fastbptt.LSTM,
}
every_cell = pytest.mark.parametrize("cls", CLASSES)
T, B, I, H = 7, 3, 4, 5


@every_cell
def test_thop(cls):
    thop = pytest.importorskip("thop")
    from thop.profile import register_hooks

    def count(model: torch.nn.Module) -> tuple[float, float]:
        ops = {ours: register_hooks[theirs] for theirs, ours in CLASSES.items()}
        return thop.profile(model, (torch.randn(T, B, I),), custom_ops=ops, verbose=False)

    theirs = cls(I, H, 2)
    expected = count(theirs)
    assert expected[0] > 0
    assert count(converted(theirs)) == expected


@every_cell
def test_ptflops(cls):
    ptflops = pytest.importorskip("ptflops")
    from ptflops.pytorch_ops import MODULES_MAPPING

    def count(model: torch.nn.Module) -> tuple[float, float]:
        hooks = {ours: MODULES_MAPPING[theirs] for theirs, ours in CLASSES.items()}
        return ptflops.get_model_complexity_info(
            model, (T, I), as_strings=False, print_per_layer_stat=False, backend="pytorch",
            custom_modules_hooks=hooks,
        )  # fmt: skip

    theirs = cls(I, H, 2)
    expected = count(theirs)
    assert expected[0] > 0
    assert count(converted(theirs)) == expected
