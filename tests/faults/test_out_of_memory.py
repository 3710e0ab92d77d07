"""Memory that is refused, at every allocation of a training step: an error, and nothing is lost."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common import CELLS, python

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="preloads a library"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
]

SCRIPT = '''
import ctypes, gc, sys
import torch, fastbptt
from torch.nn.utils.rnn import pack_padded_sequence

failing = ctypes.CDLL(sys.argv[1])
failing.fail_at.argtypes = [ctypes.c_int64]
failing.allocations.restype = failing.live_tensors.restype = ctypes.c_int64
failing.watch_library.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
with open("/proc/self/maps") as maps:
    own = [line.split()[0].split("-") for line in maps if fastbptt._C.__file__ in line]
failing.watch_library(min(int(b, 16) for b, _ in own), max(int(e, 16) for _, e in own))

gc.collect()
gc.freeze()  # what is loaded stays
torch.manual_seed(0)
torch.set_num_threads(2)
cell = sys.argv[2]
options = {"num_layers": 2, "dtype": torch.float64}
cls = {"gru": fastbptt.GRU, "lstm": fastbptt.LSTM}.get(cell, fastbptt.RNN)
if cls is fastbptt.RNN:
    options["nonlinearity"] = cell
x = torch.randn(24, 16, 32, dtype=torch.float64)
resets = torch.rand(24, 16) < 0.1
packed = pack_padded_sequence(x, sorted([24, 20, 20, 17] + 12 * [5], reverse=True))
calls = {
    "in waves": (cls(32, 64, **options | {"num_layers": 3}), x, {}),
    "two directions": (cls(32, 64, bidirectional=True, **options), x, {"resets": resets}),
    "packed, recomputed": (cls(32, 64, **options), packed, {"truncation": 5}),
    "windows": (cls(32, 64, **options), x, {"truncation": fastbptt.TBPTT(3, 5)}),
}
if cls is not fastbptt.RNN:
    calls["packed, recomputed"][0].recompute = True

def step(module, input, kwargs):
    leaves = [p for p in module.parameters()]
    output, states = module(input, **kwargs)
    output = getattr(output, "data", output)
    states = states if isinstance(states, tuple) else (states,)
    loss = output.square().sum() + sum(state.sum() for state in states)
    return [output.detach(), *torch.autograd.grad(loss, leaves)]

scalar = torch.zeros((), requires_grad=True)

def settle():
    """What the engine had queued when a node threw waits for the next backward pass to drop it."""
    torch.autograd.grad(scalar * 2, scalar)
    fastbptt._C.release_workspace()
    gc.collect()

for name, call in calls.items():
    expected = step(*call)
    points = 0
    while True:
        settle()
        before = failing.live_tensors()
        failing.fail_at(points + 1)
        try:
            step(*call)
        except (RuntimeError, MemoryError) as error:
            assert "memory" in str(error) or "bad_alloc" in str(error), error
            failed = True
        else:
            failed = False
        reached = failing.allocations()
        failing.fail_at(0)
        settle()
        lost = failing.live_tensors() - before
        assert lost == 0, f"{name}, allocation {points + 1}: {lost} tensors are not freed"
        assert failed == (reached > points), f"{name}, allocation {points + 1} failed in silence"
        if not failed:
            break
        points += 1
        if points % 7 == 0 or points < 8:
            for got, want in zip(step(*call), expected, strict=True):
                assert torch.equal(got, want), f"{name}: another result after allocation {points}"
    assert points >= 25, (name, points)
    assert all(map(torch.equal, step(*call), expected))
'''


@pytest.fixture(scope="module")
def failing_memory(tmp_path_factory) -> Path:
    library = tmp_path_factory.mktemp("memory") / "failing_memory.so"
    source = Path(__file__).with_name("failing_memory.cpp")
    command = ["c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"]
    subprocess.run(command, check=True)
    return library


@pytest.mark.slow(1)
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell in ("tanh", "gru", "lstm")])
def test_every_allocation_may_fail(failing_memory, cell):
    python(SCRIPT, failing_memory, cell, env={"LD_PRELOAD": str(failing_memory)})
