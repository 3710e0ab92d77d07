"""Windows as sequences of one batch give what they give one by one."""

from functools import partial

import pytest
import torch

from fastbptt import TBPTT
from fastbptt._layouts import run_windows, run_windows_together
from fastbptt._loops import PerStep, stack_layers
from fastbptt.reference import lstm_cell

T, B, I, H, LAYERS = 7, 2, 3, 4, 2


def results(run, truncation, with_states):
    """Outputs, last states, and the gradients of all that is given."""
    torch.manual_seed(0)
    draw = partial(torch.randn, dtype=torch.float64)
    sizes = [[(4 * H, width), (4 * H, H), (4 * H,), (4 * H,)] for width in (I, H)]
    weights = [[draw(*size).requires_grad_() for size in of_layer] for of_layer in sizes]
    input = draw(T, B, I).requires_grad_()
    states = tuple(draw(LAYERS, B, H).requires_grad_() for _ in range(2))
    reset_to = tuple(draw(T, B, LAYERS, H).requires_grad_() for _ in range(2))
    masks = (draw(T, B, H).requires_grad_(),)
    per_step = PerStep(resets=torch.rand(T, B) < 0.3, masks=masks, reset_to=reset_to, clip_grad=0.3)
    stack = partial(stack_layers, lstm_cell, weights, 1, with_states=with_states)
    output, last = run(stack, input, states, per_step, truncation)
    loss = sum((x * draw(x.shape)).sum() for x in (output, *last))
    leaves = [input, *states, *masks, *reset_to, *(w for of_layer in weights for w in of_layer)]
    return [output, *last, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("loss", ["window", "last"])
@pytest.mark.parametrize("k1", [1, 2, 3, 4, 7, 9])
@pytest.mark.parametrize("more", [1, 2, 3, 5, 20])
def test_as_one_by_one(k1, more, loss, with_states):
    truncation = TBPTT(k1, k1 + more, loss)
    found = results(run_windows_together, truncation, with_states)
    expected = results(run_windows, truncation, with_states)
    assert all(x.requires_grad for x in found[:1])
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_all_windows_are_in_one_run():
    lengths = []

    def stack(input, *arguments, **options):
        lengths.append(tuple(input.shape[:2]))
        return stack_layers(
            lambda x, states: (x + states[0],), [[]], 1, input, *arguments, **options
        )

    def run(truncation):
        lengths.clear()
        run_windows_together(
            stack, torch.ones(T, B, H), (torch.zeros(1, B, H),), PerStep(), truncation
        )
        return lengths

    assert run(TBPTT(1, 3)) == [(T, B), (3, T * B)]
    assert run(TBPTT(2, 4)) == [(T, B), (4, 3 * B), (3, B)]  # the last window is shorter
    assert run(TBPTT(1, 9)) == [(T, B), (T, T * B)]
