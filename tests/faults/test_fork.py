"""Processes made before, during and after calls with two threads: they train like their parent."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from common import python

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

SET_UP = f"""
import multiprocessing, os, sys, threading
sys.path[:0] = {[str(Path(__file__).parent)]!r}
import torch, fastbptt
import training

def close(a, b):
    assert len(a) == len(b) and all(abs(p - q) <= 1e-12 * abs(q) for p, q in zip(a, b)), (a, b)

def child_of(method):
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=training.report, args=(queue,))
    process.start()
    got, threads = queue.get(timeout=200)  # on a machine that does other things, too
    process.join(200)
    assert process.exitcode == 0
    return got, threads
"""


@pytest.mark.slow(1)
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children(method):
    """After their parent has threads, and where they are forked before too: they have two."""
    python(
        SET_UP
        + f"""
before = child_of("fork")[0] if {method!r} == "fork" else None
expected = training.losses(threads=2)
close(before or expected, expected)
after, threads = child_of({method!r})
close(after, expected)
assert threads >= 2 + ({method!r} == "fork"), threads  # the queue's own among a forked one's
close(training.losses(), expected)  # and the parent goes on
"""
    )


def test_fork_during_calls_of_another_thread():
    python(
        SET_UP
        + """
expected = training.losses(threads=2)
stop, done = threading.Event(), []

def work():
    while not stop.is_set():
        done.append(training.losses(1) == expected[:1] or close(training.losses(1), expected[:1]))

worker = threading.Thread(target=work)
worker.start()
try:
    for _ in range(2):
        while not done:
            pass
        got, _ = child_of("fork")
        close(got, expected)
finally:
    stop.set()
    worker.join()
""",
        timeout=500,
    )


@pytest.mark.slow
def test_a_child_of_a_child():
    python(
        SET_UP
        + """
expected = training.losses(threads=2)
child = os.fork()
if child == 0:
    close(training.losses(), expected)
    grandchild = os.fork()
    close(training.losses(), expected)
    if grandchild == 0:
        os._exit(0)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    )


@pytest.mark.slow
def test_fork_inside_another_parallel_region(tmp_path):
    """The region's threads cannot be given up: the child keeps to the thread it has."""
    region = Path(tmp_path, "region.c")
    region.write_text(
        "void run(void (*call)(void)) {\n"
        "#pragma omp parallel num_threads(2)\n#pragma omp master\n  call();\n}\n"
    )
    python(
        SET_UP
        + """
import ctypes, subprocess
library = sys.argv[1] + ".so"
subprocess.run(["cc", "-fopenmp", "-shared", "-fPIC", "-o", library, sys.argv[1]], check=True)
torch.set_num_threads(2)
rnn = fastbptt.RNN(32, 128, 2, dtype=torch.float64)
x = torch.ones(10, 8, 32, dtype=torch.float64)
expected = rnn(x)[0].detach().clone()

@ctypes.CFUNCTYPE(None)
def call():
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(rnn(x)[0], expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

ctypes.CDLL(library).run(call)
assert torch.equal(rnn(x)[0], expected)
""",
        str(region),
    )
