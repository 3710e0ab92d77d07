"""Lets ``torch.compile`` take the recurrent modules of this package.

They are instances of torch.nn.RNN, GRU or LSTM, so that whoever asks is answered as by torch's.
torch.compile asks too, and refuses every instance of those three, which it cannot trace into well,
unless ``torch._dynamo.config.allow_rnn`` is set. Ours are one operator. The setting would let in
torch's own as well, so it is set for the moment alone in which dynamo looks at one of ours.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch

from fastbptt.late import when_imported

_BUILDER = "torch._dynamo.variables.builder"


def let_in(cls: type) -> None:
    """Lets torch.compile take the instances of a class; does not import dynamo, which is slow."""

    def wrap(builder: ModuleType) -> None:
        wrapped = builder.VariableBuilder.wrap_module

        @functools.wraps(wrapped)
        def wrap_module(self: Any, value: torch.nn.Module) -> Any:
            if not isinstance(value, cls):
                return wrapped(self, value)
            with torch._dynamo.config.patch(allow_rnn=True):
                return wrapped(self, value)

        builder.VariableBuilder.wrap_module = wrap_module

    when_imported(_BUILDER, wrap)
