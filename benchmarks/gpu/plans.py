"""Which kernel runs a row's recurrence on the card, and how it is divided there."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import Tensor

from ..common.files import Record
from ..common.rows import FORWARD
from .rows import BACKWARD_ALONE, Task

CELLS = {"rnn": "tanh", "gru": "gru", "lstm": "lstm"}


def operator() -> Callable[..., str] | None:
    """What knows it; builds from before it have none."""
    return getattr(torch.ops.fastbptt, "cuda_plan", None)


def of(like: Tensor, task: Task) -> Record:
    """The plan of each pass for tensors like this, or under ``unknown`` why there is none.

    In float32 it depends on whether torch may round to tf32; and on the kernel that is asked for.
    """
    ask, row = operator(), task.row
    if ask is None:
        return {"unknown": "this build has no operator fastbptt::cuda_plan"}
    passes = {"forward": False, "backward": True}
    if task.mode in (FORWARD, BACKWARD_ALONE):
        passes = {task.mode: passes[task.mode]}
    try:
        return {
            name: json.loads(ask(like, CELLS[row.cell], row.H, row.lanes(backward), backward))
            for name, backward in passes.items()
        }
    except (RuntimeError, ValueError) as error:
        return {"unknown": str(error).splitlines()[0]}
