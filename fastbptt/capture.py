"""How a module's call is written down by what records programs rather than runs them."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Proxy


def fx_leaf(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Proxy | None:
    """The call of a module as one node of the graph that torch.fx is tracing.

    torch.fx has such nodes for the modules of torch.nn: it knows them by the place of their class.

    Returns:
        The node's value, or None if no argument is a proxy.
    """
    found: list[Proxy] = []

    def look(argument: Any) -> Any:
        if isinstance(argument, Proxy):
            found.append(argument)
        return argument

    torch.fx.node.map_aggregate((args, kwargs), look)
    if not found:
        return None
    tracer = found[0].tracer
    target = tracer.path_of_module(module)  # type: ignore[attr-defined]
    return tracer.create_proxy("call_module", target, args, kwargs)
