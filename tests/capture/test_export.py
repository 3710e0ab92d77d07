"""torch.export with a length and a batch size that stay open."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim

import fastbptt
from common import parts, whole

OPTIONS = [
    {},
    {"truncation": fastbptt.TBPTT(2, 6), "num_layers": 2},
    {"truncation": 3, "num_layers": 2, "bidirectional": True, "batch_first": True},
]


@pytest.mark.parametrize("cls", [fastbptt.RNN, fastbptt.GRU, fastbptt.LSTM])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("which", ["T", "B", "TB"])
@pytest.mark.parametrize("with_states", [False, True])
def test_open_sizes(cls, options, which, with_states):
    torch.manual_seed(0)
    module = cls(3, 4, **options)
    layers = module.num_layers * (2 if module.bidirectional else 1)
    time, batch = (1, 0) if module.batch_first else (0, 1)
    T, B = Dim("T"), Dim("B")
    count = 2 if cls is fastbptt.LSTM else 1

    def arguments(steps, sequences):
        shape = (sequences, steps, 3) if module.batch_first else (steps, sequences, 3)
        states = [torch.randn(layers, sequences, 4) for _ in range(count)]
        return (torch.randn(shape), whole(states)) if with_states else (torch.randn(shape),)

    sizes = {dim: size for dim, size, name in ((time, T, "T"), (batch, B, "B")) if name in which}
    of_state = {1: B} if "B" in which else {}
    of_states = (of_state,) * 2 if count == 2 else of_state
    program = torch.export.export(
        module,
        arguments(2, 5),
        dynamic_shapes=(sizes, of_states) if with_states else (sizes,),
    )
    other = arguments(4 if "T" in which else 2, 9 if "B" in which else 5)
    output, states = program.module()(*other)
    expected, expected_states = module(*other)
    assert torch.equal(output, expected)
    for a, b in zip(parts(states), parts(expected_states), strict=True):
        assert torch.equal(a, b)
