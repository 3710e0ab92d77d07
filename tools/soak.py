"""Calls the modules for an hour: the same results to the bit from first to last, and flat memory.

    python tools/soak.py --minutes 60
    python tools/soak.py --minutes 10 --busy 4     beside four processes that compute

A few hundred random training steps of the modules and of users' cells, of all cells, layouts,
truncations and resets, run over and over, from two threads of Python at a time, and a DataLoader's
workers are forked and end. The first pass over them says what each gives, by a checksum of its
results and gradients; every later pass is held to it.

After each pass two counts of memory are read. What is *allocated*, by the C library and through it
all that Python has: a leak is what has even the lowest count of the last tenth of the time above
the highest of the first minute, of 20 passes at least. (Passes differ by some 50 kB, by what of the
other thread is still there.) And what is *resident*, free memory of the C library included: by how
much its highest comes to be above that of the first minute.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

PAGE = 4096
BUSY = "while True: sum(range(10**6))"
# All that Python allocates comes to the C library, and what is freed is so at once.
COUNTED = {"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
MINUTE, WARM_PASSES = 60, 20  # seconds and passes, after which memory is to stay as it is


class _MallInfo2(ctypes.Structure):
    """The C library's count, over all arenas: see mallinfo2(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks "
        "keepcost".split()
    ]


def allocated_bytes() -> int:
    """In blocks that are in use, and in mappings of their own."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        sys.exit("error: this counts memory by mallinfo2, which glibc has since 2.33")
    mallinfo2.restype = _MallInfo2
    found = mallinfo2()
    return found.uordblks + found.hblkhd


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


class Span:
    """The least and the most of both counts in a time, in as much memory however many are read."""

    def __init__(self) -> None:
        self.reads, self.least_allocated = 0, sys.maxsize
        self.most_allocated = self.most_resident = 0

    def read(self) -> None:
        allocated = allocated_bytes()
        self.reads += 1
        self.least_allocated = min(self.least_allocated, allocated)
        self.most_allocated = max(self.most_allocated, allocated)
        self.most_resident = max(self.most_resident, resident_bytes())


class Memory:
    """The counts after passes: of the first minute, and of each tenth of the time after it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = max(seconds - MINUTE, 1.0)
        self.first, self.tenths = Span(), [Span() for _ in range(10)]

    def read(self, elapsed: float) -> None:
        is_first = elapsed < MINUTE or self.first.reads < WARM_PASSES
        tenth = min(max(int(10 * (elapsed - MINUTE) / self.seconds), 0), 9)
        (self.first if is_first else self.tenths[tenth]).read()

    def leaked(self) -> int:
        """Bytes by which what is allocated in the end is above all that was in the first minute."""
        last = next((tenth for tenth in reversed(self.tenths) if tenth.reads), self.first)
        return max(0, last.least_allocated - self.first.most_allocated)

    def report(self) -> str:
        allocated, resident = self.first.most_allocated, self.first.most_resident
        tenths = [tenth for tenth in self.tenths if tenth.reads]
        highest = [tenth.most_resident for tenth in tenths]
        return (
            f"{self.leaked():,} bytes leaked: {allocated:,} allocated at most in the first minute; "
            "the least by tenths of the time after it, less that: "
            f"{' '.join(str(tenth.least_allocated - allocated) for tenth in tenths)}\n"
            f"{max([resident, *highest]) - resident:,} bytes more resident than {resident:,} in "
            "the first minute; MiB at most by tenths: "
            + " ".join(f"{most / 2**20:.1f}" for most in highest)
        )


def make_steps(seed: int, count: int) -> list[Callable[[], list]]:
    """Training steps, each of which gives its results and gradients."""
    import torch

    import fastbptt
    from common import parts
    from fuzz.recorded import draw_call

    def of_call(number: int) -> Callable[[], list]:
        call = draw_call(random.Random(f"{seed} {number}"))
        module = call.module()

        def run(input, hx=None):
            return module(input, hx, truncation=call.make_truncation(), resets=call.make_resets())

        return lambda: list(call.run(run, module).values())

    def of_cell(name: str) -> Callable[[], list]:
        torch.manual_seed(seed)
        net = fastbptt.Recurrent(getattr(fastbptt.cells, name), 5, 19, num_layers=2)
        x = torch.randn(7, 3, 5)

        def step() -> list:
            output, states = net(x, truncation=3)
            results = [output, *parts(states)]
            loss = sum(t.square().sum() for t in results)
            return [*results, *torch.autograd.grad(loss, list(net.parameters()))]

        return step

    steps = [of_call(number) for number in range(count)]
    return steps + [of_cell(name) for name in ("gru", "coupled_lstm", "layer_norm_lstm")]


def checksum(results: list) -> str:
    digest = hashlib.sha256()
    for tensor in results:
        flat = tensor.detach().contiguous().flatten()
        digest.update(flat.numpy().tobytes())
    return digest.hexdigest()


def load_data(workers: int) -> None:
    import torch

    data = torch.utils.data.TensorDataset(torch.ones(16, 3))
    for _ in torch.utils.data.DataLoader(data, batch_size=4, num_workers=workers):
        pass


class Soak:
    def __init__(self, steps: list[Callable[[], list]]) -> None:
        self.steps = steps
        self.first: list[str | None] = [None] * len(steps)
        self.differing: set[int] = set()
        self.calls = 0

    def run(self, numbers: Sequence[int], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        for number in numbers:
            got = checksum(self.steps[number]())
            if self.first[number] is None:
                self.first[number] = got
            elif got != self.first[number]:
                self.differing.add(number)
            self.calls += 1

    def do_pass(self, choose: random.Random) -> None:
        """All steps once, half of them in another thread of Python and with one thread."""
        numbers = list(range(len(self.steps)))
        choose.shuffle(numbers)
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(self.run, [n for n in numbers if n % 2], 1)
            self.run([n for n in numbers if n % 2 == 0], 2)
            other.result()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60, help="how long (default: 60)")
    parser.add_argument("--steps", type=int, default=200, help="different ones (default: 200)")
    parser.add_argument("--busy", type=int, default=0, help="processes that compute meanwhile")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
    options = parser.parse_args(arguments)
    if any(os.environ.get(name) != value for name, value in COUNTED.items()):
        given = sys.argv[1:] if arguments is None else arguments
        command = [sys.executable, __file__, *given]
        os.execve(sys.executable, command, os.environ | COUNTED)

    soak, choose = Soak(make_steps(options.seed, options.steps)), random.Random(options.seed)
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(options.busy)]
    memory = Memory(60 * options.minutes)
    begin, passes = time.monotonic(), 0
    try:
        while passes < 3 or time.monotonic() - begin < 60 * options.minutes:
            soak.do_pass(choose)
            load_data(workers=2)
            gc.collect()
            passes += 1
            memory.read(time.monotonic() - begin)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    print(
        f"{soak.calls} training steps in {passes} passes, {time.monotonic() - begin:.0f} s, beside "
        f"{options.busy} busy processes: {len(soak.differing)} of {len(soak.steps)} differ from "
        "the first pass"
    )
    print(memory.report())
    return int(bool(soak.differing) or memory.leaked() > 0)


if __name__ == "__main__":
    sys.exit(main())
