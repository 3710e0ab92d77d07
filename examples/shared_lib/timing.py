"""Seconds spent in a layer."""

import time
from typing import Any

from torch import nn


class LayerTimer:
    """Adds up the seconds that a layer spends in its forward and in its backward pass.

    Both backends are measured by the same hooks. The backward clock runs from the moment when
    the gradient of the layer's output is known until that of its input and those of all its
    parameters are. The input must need a gradient, as that of an embedding does.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.forward = 0.0
        self.backward = 0.0
        self._begun = 0.0
        layer.register_forward_pre_hook(self._begin)
        layer.register_forward_hook(self._end_forward)
        layer.register_full_backward_pre_hook(self._begin)
        layer.register_full_backward_hook(self._lap_backward)
        for parameter in layer.parameters():
            parameter.register_post_accumulate_grad_hook(self._lap_backward)

    def _begin(self, *_: Any) -> None:
        self._begun = time.perf_counter()

    def _end_forward(self, *_: Any) -> None:
        self.forward += time.perf_counter() - self._begun

    def _lap_backward(self, *_: Any) -> None:
        # Whichever gradient comes last ends the measurement: each of them adds the time since
        # the one before.
        now = time.perf_counter()
        self.backward += now - self._begun
        self._begun = now
