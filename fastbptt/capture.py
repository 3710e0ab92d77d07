"""Lets torch.fx see one node for a call of a recurrent module of this package."""

from __future__ import annotations

import functools

import torch


def make_leaves(cls: type[torch.nn.Module]) -> None:
    """Makes every module of a class a leaf of torch.fx's graphs.

    torch.fx has a ``call_module`` node for each call of torch.nn's modules, known by the place of
    their class, and looks into all others; what it hands them has no values and no shapes. The
    modules' own hooks run with the node, as with torch.nn's.
    """
    wrapped = torch.fx.Tracer.is_leaf_module

    @functools.wraps(wrapped)
    def is_leaf_module(self: torch.fx.Tracer, m: torch.nn.Module, module_qualified_name: str):
        return isinstance(m, cls) or wrapped(self, m, module_qualified_name)

    torch.fx.Tracer.is_leaf_module = is_leaf_module  # type: ignore[method-assign]
