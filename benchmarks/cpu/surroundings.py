"""What a measurement takes place in: a number of threads, autocast, other processes."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..common.workload import Contender, Results


@dataclass(frozen=True)
class WithThreads:
    """A step on a number of threads; to set it is off the clock."""

    step: Contender
    threads: int

    def clear(self) -> None:
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        self.step.clear()

    def run(self) -> object:
        return self.step.run()

    def results(self) -> Results:
        self.clear()
        return self.step.results()


def autocast(dtype: str | None) -> contextlib.AbstractContextManager:
    """A region of torch.autocast on the CPU, or nothing."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast("cpu", getattr(torch, dtype))


# It ends by itself too, should this process be killed.
_SPIN = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(10**6):
        pass
"""


@contextlib.contextmanager
def busy(count: int) -> Iterator[list[subprocess.Popen]]:
    """Other processes that compute all the while; they are ended at its end."""
    processes: list[subprocess.Popen] = []
    try:
        for _ in range(count):
            processes.append(subprocess.Popen([sys.executable, "-c", _SPIN]))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
