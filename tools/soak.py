"""Calls the modules for an hour: the same results to the bit from first to last, and flat memory.

    python tools/soak.py --minutes 60
    python tools/soak.py --minutes 10 --busy 4     beside four processes that compute

A few hundred random training steps of the modules and of users' cells, of all cells, layouts,
truncations and resets, run over and over, from two threads of Python at a time, and a DataLoader's
workers are forked and end. The first pass over them says what each gives, by a checksum of its
results and gradients; every later pass is held to it. The memory that the process has resident is
read after each pass: how far it comes to be above its highest in the first minute, and its highest
in each tenth of the time after that, which a leak would have grow to the end.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
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


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


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

    soak, choose = Soak(make_steps(options.seed, options.steps)), random.Random(options.seed)
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(options.busy)]
    begin, passes = time.monotonic(), 0
    settled, highest = 0, [0] * 10
    try:
        while passes < 3 or time.monotonic() - begin < 60 * options.minutes:
            soak.do_pass(choose)
            load_data(workers=2)
            gc.collect()
            passes += 1
            # Passes differ in what is alive at a time: the highest of both spans are compared.
            elapsed = time.monotonic() - begin
            if passes < 3 or elapsed < 60:
                settled = max(settled, resident_bytes())
            else:
                part = min(int(10 * (elapsed - 60) / max(60 * options.minutes - 60, 1)), 9)
                highest[part] = max(highest[part], resident_bytes())
    finally:
        for process in busy:
            process.kill()
            process.wait()
    print(
        f"{soak.calls} training steps in {passes} passes, {time.monotonic() - begin:.0f} s, beside "
        f"{options.busy} busy processes: {len(soak.differing)} of {len(soak.steps)} differ from "
        f"the first pass; {max(*highest, settled) - settled:,} bytes grown over {settled:,} after "
        f"the first minute; MiB at most, by tenths of the time: "
        + " ".join(f"{most / 2**20:.1f}" for most in highest if most)
    )
    return int(bool(soak.differing))


if __name__ == "__main__":
    sys.exit(main())
