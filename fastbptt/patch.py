"""torch.nn's three names mean fastbptt's classes for a while."""

from __future__ import annotations

import torch

from fastbptt import nn
from fastbptt.truncation import Truncation, as_truncation

__all__ = ["patch"]

_NAMES = ("RNN", "GRU", "LSTM")
# Not torch.nn.modules.rnn, where a pickle of torch's own classes looks them up.
_PLACES = (torch.nn, torch.nn.modules)


class patch:  # noqa: N801  (used like a function)
    """Makes ``torch.nn.RNN``, ``GRU`` and ``LSTM`` mean fastbptt's classes.

    For libraries that make their networks out of reach, inside ``fit`` or a factory, where there
    is no model to ``convert`` in time. It holds from the call on, for the whole process; as a
    context manager until the block ends, else until ``undo()``:

        with fastbptt.patch(truncation=32):
            model.fit(data)  # every torch.nn.LSTM made here is a fastbptt.LSTM

    It reaches code that asks ``torch.nn`` for the class when it makes a module. Modules made
    before, names imported before (``from torch.nn import LSTM``) and classes derived before are as
    they were: import such code inside, or ``convert`` the model. Modules made while it holds stay
    fastbptt's afterwards.

    Args:
        truncation: of the modules made while it holds, unless they are given their own.

    Raises:
        TypeError, ValueError: ``truncation`` is no truncation. Nothing has been changed then.
    """

    def __init__(self, *, truncation: Truncation | int | None = None):
        cut = as_truncation(truncation)
        self._before = [(place, n, getattr(place, n)) for place in _PLACES for n in _NAMES]
        self._truncation_before = nn.defaults.truncation
        nn.defaults.truncation = cut
        for place, name, _ in self._before:
            setattr(place, name, getattr(nn, name))

    def undo(self) -> None:
        """Puts back what the names meant before; harmless when it has been done."""
        if self._before:
            nn.defaults.truncation = self._truncation_before
        while self._before:
            setattr(*self._before.pop())

    def __enter__(self) -> patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()
