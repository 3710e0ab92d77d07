"""What a process may do around the module: run long, fork, change threads, call from several.

Each runs in an interpreter of its own, against a time limit: what goes wrong here hangs or dies.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest

import fastbptt
from common import python as interpreter

# Threads spin for as long as they do by default; elsewhere conftest has them sleep.
python = partial(interpreter, env={"GOMP_SPINCOUNT": "300000"})

# A size at which the kernels wake their threads, and results to compare with later.
SET_UP = """
import os, sys, threading
import torch, fastbptt

torch.manual_seed(0)
options = {"bidirectional": True, "truncation": 10, "dtype": torch.float64}
rnn = fastbptt.RNN(32, 128, 2, **options)
gru = fastbptt.GRU(32, 64, **options)
lstm = fastbptt.LSTM(32, 64, proj_size=40, **options)
x = torch.randn(50, 16, 32, dtype=torch.float64)

def step(module=rnn, x=x):
    leaf = x.detach().requires_grad_()
    output, states = module(leaf)
    results = [output, *(states if isinstance(states, tuple) else [states])]
    grads = torch.autograd.grad(results, [leaf, *module.parameters()],
                                [result.detach() for result in results])
    return [*(result.detach() for result in results), *grads]

def same(a, b):
    return all(torch.allclose(p, q, rtol=0, atol=1e-12 * float(q.abs().max()))
               for p, q in zip(a, b, strict=True))

"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("truncation", [None, 7])
def test_hundreds_of_passes_leak_nothing(truncation):
    # The smallest tensor of a pass but for the biases is h_n with 4 KB; one of them a pass would
    # be 2.4 MB. The collector is off, so that a reference cycle counts as a leak. The heap is
    # trimmed and grows again by up to 2 MB at a time, so the median of three growths decides.
    script = f"""
import gc, resource, torch, fastbptt
from torch.nn.utils.rnn import pack_padded_sequence

rnn, gru, lstm = (cls(16, 32, 2, bidirectional=True, truncation={truncation})
                  for cls in (fastbptt.RNN, fastbptt.GRU, fastbptt.LSTM))
functional = [p.detach().clone().requires_grad_() for p in list(rnn.parameters())[:4]]
x = torch.randn(10, 8, 16)
packed = pack_padded_sequence(x, [10, 9, 7, 7, 4, 3, 1, 1])
leaf = x.clone().requires_grad_()

def once():
    output, h_n = rnn(leaf)
    (output.sum() + h_n.sum()).backward()
    output, h_n = rnn(packed, h_n)  # never differentiated: the graph dies by itself
    output, h_n = fastbptt.rnn(leaf, h_n[0].detach(), *functional, truncation={truncation})
    h_n.sum().backward()
    output, h_n = gru(leaf)
    (output.sum() + h_n.sum()).backward()
    output, states = lstm(leaf)
    (output.sum() + states[1].sum()).backward()
    output, states = lstm(packed, states)
    lstm.recompute = gru.recompute = not gru.recompute
    leaf.grad = None

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()

gc.collect()
gc.disable()
for _ in range(150):
    once()
growths = []
for _ in range(3):
    before = resident()
    for _ in range(600):
        once()
    growths.append(resident() - before)
print(sorted(growths)[1])
"""
    assert int(interpreter(script).stdout) < 2 << 20


def test_forked_loader_worker():
    python(
        SET_UP
        + """
from torch.utils.data import DataLoader, Dataset

modules = [rnn, gru, lstm]

class Steps(Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, i):
        return step(modules[i % 3], x + i)

torch.set_num_threads(2)
expected = [Steps()[i] for i in range(6)]  # the parent's threads are running when it forks
loader = DataLoader(Steps(), batch_size=None, num_workers=1, multiprocessing_context="fork")
count = 0
for got, want in zip(loader, expected, strict=True):
    assert same(got, want)
    assert same(Steps()[count], want)  # and the parent goes on
    count += 1
assert count == 6
"""
    )


@pytest.mark.slow(1)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_fork(threads):
    # With torch's own parallel operators too: tests/faults/test_fork.py.
    python(
        SET_UP
        + f"""
torch.set_num_threads({threads})
x = x[:15, :8].contiguous()
def results():
    return [t.numpy() for module in (rnn, gru, lstm) for t in step(module, x)]

expected = results()
child = os.fork()
if child == 0:
    try:
        got = results()
        ok = all((g == e).all() for g, e in zip(got, expected))  # alone: the same bits
    except BaseException as error:
        print(error, file=sys.stderr, flush=True)
        ok = False
    os._exit(0 if ok else 1)
assert all((g == e).all() for g, e in zip(results(), expected))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
""",
        timeout=60,
    )


def test_threads_change_in_mid_run():
    python(
        SET_UP
        + """
expected = step()
for i in range(40):
    torch.set_num_threads(1 + i % 4)
    leaf = x.detach().requires_grad_()
    output, h_n = rnn(leaf)
    torch.set_num_threads(1 + (i // 4) % 4)  # backward with another number than forward
    grads = torch.autograd.grad([output, h_n], [leaf, *rnn.parameters()],
                                [output.detach(), h_n.detach()])
    assert same([output, h_n, *grads], expected), i
"""
    )


@pytest.mark.slow
def test_threads_change_while_running():
    python(
        SET_UP
        + """
modules = [rnn, gru, lstm]
expected, done = [step(module) for module in modules], threading.Event()

def change():
    i = 0
    while not done.wait(1e-3):
        torch.set_num_threads(1 + i % 4)
        i += 1

changer = threading.Thread(target=change)
changer.start()
try:
    for i in range(60):
        assert same(step(modules[i % 3]), expected[i % 3])
finally:
    done.set()
    changer.join()
"""
    )


@pytest.mark.slow
def test_busy_machine():
    """Whoever gets to compute what, and whether threads are given up, results are the same bits."""
    python(
        SET_UP
        + """
import subprocess, time
torch.set_num_threads(2)
modules = [(rnn, x), (gru, x), (lstm, x)]
for cls in (fastbptt.RNN, fastbptt.GRU, fastbptt.LSTM):  # one row: over units, a barrier a step
    modules.append((cls(32, 256, dtype=torch.float64), x[:, :1]))
expected = [step(*pair) for pair in modules]
spin = [sys.executable, "-c", "while True: pass"]
others = [subprocess.Popen(spin) for _ in range(2 * os.cpu_count())]
try:
    end = time.monotonic() + 4
    while time.monotonic() < end:
        for pair, want in zip(modules, expected):
            assert all(map(torch.equal, step(*pair), want))
finally:
    for other in others:
        other.kill()
"""
    )


@pytest.mark.slow
def test_verbose():
    """A line for each run of a kernel, on stderr, where it is asked for."""
    script = """
import torch, fastbptt
torch.set_num_threads(2)
fastbptt.LSTM(8, 128, dtype=torch.float64)(torch.randn(64, 3, 8).double())[0].sum().backward()
fastbptt.GRU(8, 4, bidirectional=True)(torch.randn(5, 3, 8))
"""
    run = partial(subprocess.run, [sys.executable, "-c", script], capture_output=True, text=True)
    lines = run(env=os.environ | {"FASTBPTT_VERBOSE": "1"}, check=True).stderr.splitlines()
    assert [line.split(", ")[0] for line in lines] == [
        "fastbptt: lstm forward",
        "fastbptt: lstm backward",
        "fastbptt: gru forward",
    ]
    isa = fastbptt._C.cpu_isa()
    assert f", float64, {isa}, T 64, B 3, I 8, H 128, 3 lanes, 2 threads, steps by " in lines[1]
    assert f", float32, {isa}, T 5, B 3, I 8, H 4, 3 lanes, 1 thread, " in lines[2]
    assert all(re.fullmatch(r"\d+\.\d{3} ms", line.split(", ")[-1]) for line in lines)
    assert run(env=os.environ | {"FASTBPTT_VERBOSE": "0"}, check=True).stderr == ""


@pytest.mark.slow
def test_more_threads_than_cores():
    python(
        SET_UP
        + """
modules = [(rnn, x), (gru, x), (lstm, x)]
for cls in (fastbptt.RNN, fastbptt.GRU, fastbptt.LSTM):  # one row: over units, a barrier a step
    modules.append((cls(32, 256, dtype=torch.float64), x[:, :1]))
expected = [step(*pair) for pair in modules]
torch.set_num_threads(4 * os.cpu_count())
for _ in range(4):
    for pair, want in zip(modules, expected):
        assert same(step(*pair), want)
"""
    )


def test_python_threads():
    python(
        SET_UP
        + """
torch.set_num_threads(2)
modules = [rnn, rnn, gru, lstm]  # two share one module
inputs = [x, x[:33] + 1, x - 1, x]
expected = [step(m, i) for m, i in zip(modules, inputs)]
wrong = []

def work(module, input, want):
    try:
        for _ in range(15):
            if not same(step(module, input), want):
                raise AssertionError("another result than alone")
    except BaseException as error:
        wrong.append(error)

workers = [threading.Thread(target=work, args=a) for a in zip(modules, inputs, expected)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
assert not wrong, wrong
"""
    )


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_inside_another_parallel_region(tmp_path):
    # A region that is not ours calls back into Python from each of its threads.
    (tmp_path / "region.c").write_text(
        "void run(void (*call)(void)) {\n#pragma omp parallel num_threads(2)\n  call();\n}\n"
    )
    library = str(tmp_path / "region.so")
    subprocess.run(
        ["cc", "-fopenmp", "-shared", "-fPIC", "-o", library, str(tmp_path / "region.c")],
        check=True,
    )
    python(
        SET_UP
        + """
import ctypes
torch.set_num_threads(2)
expected = step()
idents, good = set(), []

@ctypes.CFUNCTYPE(None)
def call():
    torch.set_num_threads(2)
    idents.add(threading.get_ident())
    good.append(same(step(), expected))

ctypes.CDLL(sys.argv[1]).run(call)
assert good == [True] * len(good) and len(good) == 2 and len(idents) == 2, (good, idents)
assert same(step(), expected)
""",
        library,
    )
