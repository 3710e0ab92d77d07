"""The tasks by name, and many of their environments side by side."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import gymnasium
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit

from . import repeat, tmaze


class Task(NamedTuple):
    """An environment whose best return is 1."""

    make: Callable[[int], gymnasium.Env]  # of how long what is seen is to be kept
    keep: int  # steps, unless one says otherwise
    best_without_memory: float


def _maze(length: int) -> gymnasium.Env:
    return TimeLimit(tmaze.TMaze(length), 4 * length)


TASKS = {
    "tmaze": Task(_maze, 10, tmaze.BEST_WITHOUT_MEMORY),
    "repeat-first": Task(repeat.RepeatFirst, 24, repeat.BEST_WITHOUT_MEMORY),
    "repeat-previous": Task(repeat.RepeatPrevious, 2, repeat.BEST_WITHOUT_MEMORY),
}


def make_envs(count: int, name: str = "tmaze", keep: int | None = None) -> SyncVectorEnv:
    """`count` environments of a task side by side.

    The mode of their automatic resets is SAME_STEP: the step that ends an episode already returns
    the first observation of the next one, and what the ended one would have shown is in
    ``info["final_obs"]``. So every step of a rollout is one of an episode, and ``dones[t]`` says
    that the state has to be zeros before step t + 1. In Gymnasium's default, NEXT_STEP, the first
    observation comes one step later: the state would have to be reset at t + 2, and step t + 1,
    whose action is ignored, kept out of the loss.
    """
    task = TASKS[name]
    make = partial(task.make, keep or task.keep)
    return SyncVectorEnv([make] * count, autoreset_mode=AutoresetMode.SAME_STEP)
