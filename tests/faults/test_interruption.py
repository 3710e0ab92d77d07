"""Calls that end otherwise than planned: interrupted, at the interpreter's exit, in a wrong one."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import pytest

from common import python
from fastbptt import _builds

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux alone")

LONG = """
import os, signal, sys, threading, time
import torch, fastbptt

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
torch.manual_seed(0)
torch.set_num_threads(2)
rnn = fastbptt.LSTM(64, 256, dtype=torch.float64)
x = torch.randn(64, 16, 64, dtype=torch.float64)
expected = rnn(x)[0].detach().clone()

def long_call():  # half a second and more
    for length in (4, 8, 16, 32, 64):
        begin = time.monotonic()
        longer = x.repeat(length, 1, 1).requires_grad_()
        rnn(longer)[0].sum().backward()
        if time.monotonic() - begin > 0.5:
            return longer
"""


def test_keyboard_interrupt_in_a_long_call():
    """It comes when the call has ended, as with torch's; gradients and the next call are whole."""
    python(
        LONG
        + """
longer = long_call().detach().requires_grad_()
def interrupt():
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)

rnn.zero_grad()
thread = threading.Thread(target=interrupt)
try:
    thread.start()
    rnn(longer)[0].sum().backward()
    time.sleep(10)
except KeyboardInterrupt:
    pass
else:
    sys.exit("not interrupted")
thread.join()
assert torch.equal(rnn(x)[0], expected)
rnn.zero_grad()
leaf = x.requires_grad_()
rnn(leaf)[0].sum().backward()
assert leaf.grad.isfinite().all() and torch.equal(rnn(x)[0], expected)
"""
    )


@pytest.mark.slow(1)
@pytest.mark.parametrize("end", ["pass", "sys.exit(0)", "os._exit(0)", "raise SystemExit"])
def test_exit_with_calls_under_way(end):
    python(
        LONG
        + f"""
longer = x.repeat(4, 1, 1)
started = []
def work():
    with torch.no_grad():
        while True:
            rnn(longer)
            started.append(1)

for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
while len(started) < 3:
    time.sleep(0.01)
{end}
"""
    )


def test_subinterpreters_are_refused(monkeypatch):
    """Before torch is imported, which hangs in one: so what Python says is given here."""

    def current():
        return 0

    def number(interpreter):
        return 1

    answers = SimpleNamespace(PyInterpreterState_Get=current, PyInterpreterState_GetID=number)
    _builds._refuse_subinterpreters()  # this is the main one
    monkeypatch.setattr(ctypes, "pythonapi", answers)
    with pytest.raises(ImportError, match="must be imported in the main interpreter"):
        _builds._refuse_subinterpreters()


def test_sixteen_threads_of_python():
    python(
        LONG
        + """
classes = (fastbptt.RNN, fastbptt.GRU, fastbptt.LSTM)
modules = [cls(32, 48, 2, dtype=torch.float64) for cls in classes]
inputs = [torch.randn(12 + i, 6, 32, dtype=torch.float64) for i in range(16)]

def step(i):
    leaf, module = inputs[i].clone().requires_grad_(), modules[i % 3]
    output, _ = module(leaf, truncation=1 + i)
    return output, *torch.autograd.grad(output.square().sum(), [leaf, *module.parameters()])

expected = [step(i) for i in range(16)]
wrong = []

def work(i):
    try:
        for _ in range(6):
            for got, want in zip(step(i), expected[i], strict=True):
                torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    except BaseException as error:
        wrong.append(error)

def change():
    for i in range(40):
        torch.set_num_threads(1 + i % 3)
        time.sleep(0.005)

workers = [threading.Thread(target=work, args=(i,)) for i in range(16)]
workers.append(threading.Thread(target=change))
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
assert not wrong, wrong[0]
"""
    )
