"""Lets ``torch.ao.quantization`` quantize the modules of this package as it does torch.nn's.

It finds what it quantizes by the exact class. So while it looks at a model, and replaces modules in
it, ours there have torch's classes, whose instances they are anyway. What it has not replaced has
its own class again afterwards.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from fastbptt.convert import torchs_class
from fastbptt.late import when_imported

# Functions that take a model first, by their module. They are private: what calls them, for all
# kinds of quantization, calls them under these names, whoever has imported it under which name.
_LOOKING = {
    "torch.ao.quantization.quantize": ("_propagate_qconfig_helper", "_add_observer_", "_convert"),
    "torch.ao.quantization.quantize_fx": ("_prepare_fx", "_convert_fx"),
}


@contextlib.contextmanager
def _torchs_classes(model: torch.nn.Module) -> Iterator[None]:
    changed = [(module, type(module), torchs_class(module)) for module in model.modules()]
    changed = [(module, own, cls) for module, own, cls in changed if cls is not None]
    for module, _, cls in changed:
        module.__class__ = cls
    try:
        yield
    finally:
        for module, own, _ in changed:
            module.__class__ = own


def _let_in(looking: ModuleType) -> None:
    for name in _LOOKING[looking.__name__]:
        wrapped = getattr(looking, name, None)
        if wrapped is not None:  # another version of torch may have others
            setattr(looking, name, _with_torchs_classes(wrapped))


def _with_torchs_classes(wrapped: Any) -> Any:
    @functools.wraps(wrapped)
    def look(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _torchs_classes(model):
            return wrapped(model, *args, **kwargs)

    return look


for _name in _LOOKING:
    when_imported(_name, _let_in)
