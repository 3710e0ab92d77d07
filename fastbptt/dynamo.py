"""Lets ``torch.compile`` take the recurrent modules of this package.

They are instances of torch.nn.RNN, GRU or LSTM, so that whoever asks is answered as by torch's.
torch.compile asks too, and refuses every instance of those three, which it cannot trace into well,
unless ``torch._dynamo.config.allow_rnn`` is set. Ours are one operator. The setting would let in
torch's own as well, so it is set for the moment alone in which dynamo looks at one of ours.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

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

    if _BUILDER in sys.modules:
        wrap(sys.modules[_BUILDER])
    else:
        sys.meta_path.insert(0, _WhenImported(_BUILDER, wrap))


class _WhenImported(importlib.abc.MetaPathFinder):
    """Calls ``action`` with a module when it has been imported, once."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]):
        self.name = name
        self.action = action

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.action(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
