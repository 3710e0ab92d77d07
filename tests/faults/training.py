"""What a process of the tests of faults does: a few steps of training, with torch's operators."""

from __future__ import annotations

import torch

import fastbptt


class Training:
    """A model with a head, whose work pays two threads, here and in torch."""

    def __init__(self, cls: type = fastbptt.GRU) -> None:
        # The CPU's alone: torch.manual_seed takes locks, and a child may be forked while another
        # thread holds one of them.
        torch.default_generator.manual_seed(0)
        self.layer = cls(32, 96, 2, dtype=torch.float64)
        self.head = torch.nn.Linear(96, 300, dtype=torch.float64)
        self.parameters = [*self.layer.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-2)
        self.x = torch.randn(60, 24, 32, dtype=torch.float64)

    def step(self) -> float:
        self.optimizer.zero_grad()
        loss = self.head(self.layer(self.x)[0]).logsumexp(-1).mean()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def losses(steps: int = 4, threads: int | None = None) -> list[float]:
    """Of a training run from the start; the same numbers wherever it is done."""
    if threads is not None:
        torch.set_num_threads(threads)
    training = Training()
    return [training.step() for _ in range(steps)]


def threads_of_this_process() -> int:
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("Threads:")).split()[1])


def report(queue) -> None:
    """In a child: its losses with two threads, and how many threads it came to have."""
    queue.put((losses(threads=2), threads_of_this_process()))
