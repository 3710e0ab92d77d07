"""A process that computes and times what it is asked to, with the fastbptt of its own folder.

    python -m benchmarks.cpu.worker --threads 2

Two of them time two builds of the package, which one process cannot hold: each answers a line of
JSON by a line of JSON, and sleeps while the other one is asked.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastbptt

from ..common import arguments
from ..common.contenders import contenders, results_of_ours
from ..common.files import ROOT, Record
from ..common.rows import BACKWARD, Row, parse_size
from ..common.timing import LONG_S, lead_in, sample, seconds_a_call
from ..common.workload import OURS, Mismatch, ModuleStep, Workload
from . import networks
from .surroundings import autocast


def step_of(item: Record) -> tuple[ModuleStep, str | None]:
    """What an item describes, a row or a use, as a step of ours; and the dtype of its autocast."""
    cell, mode = item["cell"], item["mode"]
    if "suite" in item:
        use = networks.SUITES[item["suite"]][item["index"]]
        return networks.build(use, cell, mode)[0], use.dtype
    work = Workload(Row(cell, *parse_size(item["size"])), mode)
    return contenders(work, ())[OURS], None


# Longer than within a process: all of this one's threads were asleep, and a core that another
# process's thread has just left takes some time to be found.
LEAD_S = 0.02


class Server:
    """The requests by their names; between them it holds one step."""

    step: ModuleStep | None = None
    mode: str = BACKWARD
    dtype: str | None = None
    length: float = 0.0

    def _within(self, call: Callable[[], Any]) -> Any:
        with torch.set_grad_enabled(self.mode == BACKWARD), autocast(self.dtype):
            return call()

    def facts(self) -> Record:
        """Which package this is, and what it runs on."""
        folder = str(Path(fastbptt.__file__).parent.parent)
        isa, threads = fastbptt._C.cpu_isa(), torch.get_num_threads()
        return {"folder": folder, "isa": isa, "threads": threads}

    def build(self, item: Record, into: str) -> Record:
        """Makes a step, and writes its results into a file."""
        self.step = None
        gc.enable()
        gc.collect()
        gc.disable()  # stays off the clock
        self.mode = item["mode"]
        self.step, self.dtype = step_of(item)
        try:
            torch.save(self._within(lambda: results_of_ours(self.step)), into)
        except Mismatch as mismatch:
            return {"error": str(mismatch)}
        self.length = self._within(lambda: seconds_a_call(self.step))
        return {"error": None, "seconds": self.length}

    def sample(self, calls: int) -> Record:
        """Times calls of the step, once the other's threads have gone to sleep."""

        def timed() -> float:
            if self.length < LONG_S:
                lead_in(self.step, seconds=LEAD_S)
            return sample(self.step, calls)

        return {"seconds": self._within(timed)}


class Ended(Exception):
    """A worker is no longer there to be asked; says what it said last."""


class Worker:
    """A worker as its parent sees it, to be closed."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder = folder
        # The package of the folder, but the benchmarks of this tree.
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.cpu.worker", "--threads", str(threads)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: str, **arguments: object) -> Record:
        """The answer to a request.

        Raises:
            Ended: it has ended instead; what it had to say stands on the terminal.
        """
        try:
            print(json.dumps([request, arguments]), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise Ended(f"the process of {self.folder} ended with status {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        """Ends it."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def main() -> None:
    """Answers until there are no more requests."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu.worker", description=__doc__)
    parser.add_argument("--threads", type=arguments.count, required=True, metavar="N")
    torch.set_num_threads(parser.parse_args().threads)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    server = Server()
    for line in sys.stdin:
        request, words = json.loads(line)
        print(json.dumps(getattr(server, request)(**words)), file=answers, flush=True)


if __name__ == "__main__":
    main()
