"""Calls every operator and module with arguments of all kinds: an error or a right answer.

    python tools/fuzz.py --calls 200000
    python tools/fuzz.py --seed 7 --only 1234      one round again, in this process

A round draws a call of a module, holds it against the reference in float64, and records the
operators that it and its derivatives call. Each is called again, some with their arguments laid out
otherwise, some with wrong ones, all in memory between pages that end the process when touched and
that nobody may write to. What is not refused must be what the arguments' plain copies give, and
what the plainest kernels give in float64. Memory that nothing fills is NaN.

Rounds run in processes that are replaced when they crash or hang. The status is 1 if anything was
found; the seed and the round say what to repeat.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import json
import math
import mmap
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

REFUSALS = (RuntimeError, TypeError, ValueError, IndexError, OverflowError, MemoryError)
# Words of errors that were not meant: nobody checked what was wrong.
UNMEANT = re.compile(
    r"INTERNAL ASSERT|vector::|basic_string|std::|bad_alloc|bad_array|bad optional"
)
NOTE_BYTES = 1 << 14
TIME_LIMIT = 120  # seconds, of a call
CALLS_OF_AN_OPERATOR = 6


class Wrong(Exception):
    """A call was neither refused nor right."""


class Note:
    """What a process is at, in memory that its parent sees, whole even where it died while writing.

    The first byte says in which of two halves it stands; it is written into the other one.
    """

    def __init__(self, path: Path) -> None:
        with open(path, "r+b") as file:
            self.memory = mmap.mmap(file.fileno(), NOTE_BYTES)

    @staticmethod
    def _half(which: int) -> slice:
        size = (NOTE_BYTES - 2) // 2
        return slice(2 + size * (which - 1), 2 + size * which)

    def write(self, what: str, **numbers: int) -> None:
        which = 2 if self.memory[0] == 1 else 1
        half = self._half(which)
        size = half.stop - half.start
        text = json.dumps({"what": what[: size // 8], **numbers}).encode()  # 6 bytes a character
        self.memory[half] = text.ljust(size, b"\0")
        self.memory[0] = which

    def read(self) -> dict[str, object]:
        while which := self.memory[0]:
            text = self.memory[self._half(which)].rstrip(b"\0")
            try:
                return json.loads(text)
            except ValueError:  # meanwhile it was written twice
                continue
        return {}


def tensors_in(results: object) -> list:
    import torch
    from torch.utils._pytree import tree_flatten

    return [r for r in tree_flatten(results)[0] if isinstance(r, torch.Tensor)]


def compare(got: object, want: object, tolerance: float, of: str) -> None:
    """Raises Wrong unless numbers agree but for rounding; NaN and infinities where they are."""
    import torch

    got, want = tensors_in(got), tensors_in(want)
    if len(got) != len(want):
        raise Wrong(f"{of}: {len(got)} results, not {len(want)}")
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.shape != b.shape:
            raise Wrong(f"{of}: result {i} has shape {tuple(a.shape)}, not {tuple(b.shape)}")
        if a.numel() == 0 or a.is_meta or b.is_meta:
            continue
        a, b = a.detach().double(), b.detach().double()
        finite = b.isfinite()
        scale = max(b[finite].abs().max().item() if finite.any() else 0.0, 1e-2)
        if not torch.allclose(a, b, rtol=0, atol=tolerance * scale, equal_nan=True):
            error = (a - b)[finite & a.isfinite()].abs()
            error = error.max().item() if error.numel() else math.nan
            raise Wrong(f"{of}: result {i} is off by {error:.3g}, largest value {scale:.3g}")


def tolerance_of(arguments: object) -> float:
    import torch

    dtypes = {t.dtype for t in tensors_in(arguments) if t.is_floating_point()}
    if dtypes <= {torch.float64}:
        return 1e-9
    return 1e-3 if dtypes <= {torch.float32, torch.float64} else 0.15


def describe(call, disturbed) -> str:
    import torch

    def short(value: object) -> str:
        if isinstance(value, torch.Tensor):
            where = "" if value.device.type == "cpu" else f" {value.device}"
            dtype = str(value.dtype).removeprefix("torch.")
            return f"{dtype}{list(value.shape)}{where}"
        if isinstance(value, list | tuple):
            return "[" + ", ".join(map(short, value)) + "]"
        return repr(value)[:40]

    changed = [f"{key}={short(disturbed.plain[key])}" for key in disturbed.changed]
    return f"{call.name}({', '.join(changed)})"


def check(call, choose: random.Random, note, count: Counter) -> None:
    """Calls an operator once more, with its arguments disturbed."""
    import torch

    import fastbptt
    from fuzz.disturbed import Disturbed, widened
    from fuzz.recorded import copied

    fixed = {0} if call.name in ("_C.user_forward", "_C.user_backward") else set()
    writes = "bernoulli" in call.name
    disturbed = Disturbed(call.arguments, fixed, choose, writable=writes)
    note(describe(call, disturbed))
    count[call.name] += 1
    torch.manual_seed(0)
    try:
        got = call.run(disturbed.given)
    except REFUSALS as error:
        count["refused"] += 1
        if not disturbed.changed and "contiguous" not in str(error):
            raise Wrong(f"refused without a cause: {error}") from error
        if UNMEANT.search(str(error)):
            raise Wrong(f"unclear error: {str(error)[:300]}") from error
        return
    torch.manual_seed(0)
    want = call.run(copied(disturbed.plain))
    tolerance = tolerance_of(disturbed.plain)
    compare(got, want, tolerance, "with plain copies of the arguments")
    draws = {"dropout", 10} & set(disturbed.changed) and call.name.endswith("network")
    if writes or draws or call.name.startswith("_C.user_") or not disturbed.is_moderate():
        return
    count["compared"] += 1
    isa = fastbptt._C.cpu_isa()
    fastbptt._C.set_cpu_isa("baseline")
    try:
        truth = call.run(widened(copied(disturbed.plain)))
    finally:
        fastbptt._C.set_cpu_isa(isa)
    is_kinked = "relu" in disturbed.plain.values()
    compare(got, truth, tolerance * (1e3 if is_kinked else 1), "beside the plainest kernels")


def networks() -> dict[str, Callable]:
    from fastbptt import Recurrent, cells

    shipped = ("gru", "coupled_lstm", "layer_norm_lstm")
    return {name: partial(Recurrent, getattr(cells, name)) for name in shipped}


def do_round(seed: int, number: int, note: Note, count: Counter, found) -> None:
    import torch

    from fuzz import recorded

    choose = random.Random(f"{seed} {number}")
    torch.set_num_threads(choose.choice([1, 1, 2]))
    at = {"round": number, "calls": 0, "what": "a call of a module"}

    def say(what: str) -> None:
        at.update(calls=at["calls"] + 1, what=what)
        note.write(**at)

    say("a call of a module")
    count["modules"] += 1
    try:
        if number % 20 == 19:
            calls, name = recorded.record_cell(choose, networks()), "a user's cell"
        else:
            call, calls = recorded.record(choose)
            name = str(call)
    except AssertionError as error:
        found(f"a module: {error}")
        return
    for call in calls if len(calls) < 12 else choose.sample(calls, 12):
        for _ in range(CALLS_OF_AN_OPERATOR):
            try:
                check(call, choose, say, count)
            except Wrong as error:
                found(f"{name}: {at['what']}: {error}")


def work(arguments: argparse.Namespace) -> int:
    """What a process does: rounds from the first on, one finding a line."""
    import torch

    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    note, count = Note(arguments.note), Counter()
    end = arguments.only + 1 if arguments.only is not None else None
    found_any = False

    def found(what: str) -> None:
        nonlocal found_any
        found_any = True
        print(f"round {number}: {what}", flush=True)

    for number in itertools.count(arguments.first):
        if number == end or count.total() - count["refused"] - count["compared"] >= arguments.calls:
            break
        do_round(arguments.seed, number, note, count, found)
    print("counts " + json.dumps(count), flush=True)
    return int(found_any)


def watch(arguments: argparse.Namespace) -> int:
    """Has processes do the rounds; replaces those that end or stand still. Returns the status."""
    findings, total, first = [], Counter(), arguments.first
    begin = time.monotonic()
    while (done := total.total() - total["refused"] - total["compared"]) < arguments.calls:
        with tempfile.NamedTemporaryFile() as file, tempfile.TemporaryFile("w+") as output:
            file.write(bytes(NOTE_BYTES))
            file.flush()
            batch = min(arguments.calls - done, 10_000)
            command = [sys.executable, __file__, f"--note={file.name}", f"--seed={arguments.seed}"]
            command += [f"--first={first}", f"--calls={batch}"]
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            note, before, since, calls = Note(Path(file.name)), None, time.monotonic(), 0
            hangs = False
            try:
                while process.poll() is None:
                    time.sleep(0.05)
                    now = note.read() if note.memory[0] else None
                    if now != before:
                        before, since = now, time.monotonic()
                    elif time.monotonic() - since > TIME_LIMIT:
                        hangs = True
                        process.kill()
                        process.wait()
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            output.seek(0)
            lines = output.read().splitlines()
            last = note.read()
        for line in lines:
            if line.startswith("counts "):
                counts = Counter(json.loads(line[7:]))
                total += counts
                calls = counts.total()
            elif line.startswith("round "):
                findings.append(line)
                print(line, flush=True)
        if process.returncode not in (0, 1) or not calls:
            how = f"no end after {TIME_LIMIT} s" if hangs else f"died with {process.returncode}"
            findings.append(f"round {last.get('round')}: {last.get('what')}: {how}")
            print(findings[-1], *lines[-15:], sep="\n", flush=True)
            total["lost"] += max(int(last.get("calls", 0)), 1)
            if not last:
                return 2  # it does not even begin
        first = int(last["round"]) + 1
        if len(findings) >= arguments.stop_after:
            break
    done = total.total() - total["refused"] - total["compared"]
    seconds = time.monotonic() - begin
    print(
        f"{done} calls in {first - arguments.first} rounds of seed {arguments.seed}, "
        f"{seconds:.0f} s: {total['refused']} refused, {total['compared']} held against the "
        f"plainest kernels, {total['modules']} against the "
        f"reference; {len(findings)} findings"
    )
    return int(bool(findings))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=2000, help="how many (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
    parser.add_argument("--first", type=int, default=0, help="the round to begin with")
    parser.add_argument("--only", type=int, help="do this round alone, in this process")
    parser.add_argument("--stop-after", type=int, default=50, help="findings (default: 50)")
    parser.add_argument("--note", type=Path, help=argparse.SUPPRESS)  # a process of rounds
    arguments = parser.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    if arguments.only is not None:
        arguments.first = arguments.only
        with tempfile.NamedTemporaryFile() as file:
            file.write(bytes(NOTE_BYTES))
            file.flush()
            arguments.note = Path(file.name)
            return work(arguments)
    return work(arguments) if arguments.note else watch(arguments)


if __name__ == "__main__":
    sys.exit(main())
