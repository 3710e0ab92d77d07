"""Recurrent PPO by the length of backpropagation: the tasks of ``examples/recurrent_ppo.py``.

A training pass runs over rollouts of 128 steps with resets inside. Cut into chunks it sends no
gradient from one to the one before; the state goes on.
"""

from __future__ import annotations

import statistics
from typing import Any

from recurrent_ppo_lib.options import make_parser
from recurrent_ppo_lib.tasks import TASKS
from recurrent_ppo_lib.training import Trainer

CHUNKS = (1, 4, 16, None)  # None: not cut
CELLS = ("gru", "lstm")
UPDATES = {"tmaze": 60, "repeat-first": 60, "repeat-previous": 120}


def _trainer(task: str, cell: str, chunk: int | None, seed: int, updates: int, backend: str) -> Any:
    words = [f"--task={task}", f"--cell={cell}", f"--seed={seed}", f"--updates={updates}"]
    words += [f"--chunk={chunk}"] * (chunk is not None)
    return Trainer(make_parser("").parse_args(words), backend)


def train(task: str, cell: str, chunk: int | None, seed: int, updates: int) -> list[float]:
    """The mean return of 100 episodes after each update."""
    trainer = _trainer(task, cell, chunk, seed, updates, "fastbptt")
    for _ in range(updates):
        trainer.update()
    return [round(each, 3) for each in trainer.progress.mean_return]


def times(cell: str, chunk: int | None, updates: int) -> dict[str, float]:
    """Seconds an update, medians: of the core in training and of everything, by backend.

    The backends take turns, an update each; torch's runs step by step, for the resets.
    """
    task = next(iter(TASKS))
    trainers = [_trainer(task, cell, chunk, 0, updates, name) for name in ("torch", "fastbptt")]
    found: dict[str, list[float]] = {}
    for _ in range(updates):
        for trainer in trainers:
            before = trainer.core_seconds
            trainer.update()
            seconds = trainer.progress.seconds
            whole = seconds[-1] - (seconds[-2] if len(seconds) > 1 else 0)
            for what, value in (("core", trainer.core_seconds - before), ("whole", whole)):
                found.setdefault(f"{trainer.backend} {what}", []).append(value)
    return {name: round(statistics.median(values), 5) for name, values in found.items()}
