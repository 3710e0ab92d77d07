"""What the tests share: cases, a training step that names every gradient, and the comparisons."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastbptt
from fastbptt import _cell_network, _loops

Results = dict[str, Tensor]
States = Tensor | tuple[Tensor, Tensor]  # what a call takes and returns: h, or an LSTM's (h, c)

DOCS = Path(__file__).parents[1] / "docs"

# Every cell, by the operators' name of it.
CELLS = ("tanh", "relu", "identity", "gru", "lstm")

# The order of the emulated threads, and whether asynchronous copies are early.
SCHEDULES = [
    ("forward", False),
    ("reverse", False),
    ("forward", True),
    ("reverse", True),
    ("random", False),
]

# What the choice of kernel, tile and division of labour depends on: (T, B, I, H).
SHAPES = [
    (1, 1, 1, 1),
    (1, 4, 3, 5),
    (7, 1, 3, 1),
    (3, 2, 1, 64),
    (9, 1, 5, 33),
    (9, 1, 64, 256),
    (6, 5, 9, 17),
    (4, 7, 64, 33),
    (11, 13, 16, 64),
    (5, 29, 7, 130),
    (3, 64, 20, 8),
    (40, 20, 12, 160),
    (6, 2, 48, 384),
    (5, 70, 31, 96),
    (200, 3, 2, 15),
]


@dataclass(frozen=True)
class Case:
    """A module with its data. ``B`` None is unbatched input, ``lengths`` (B of them) packed."""

    T: int = 5
    B: int | None = 3
    I: int = 3
    H: int = 4
    layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    bias: bool = True
    cell: str = "tanh"
    proj: int = 0
    hx: bool = True
    lengths: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def __str__(self) -> str:  # the test's id
        fields = self.__dataclass_fields__.values()
        changed = [(f.name, getattr(self, f.name)) for f in fields]
        changed = [(n, v) for (n, v), f in zip(changed, fields, strict=True) if v != f.default]
        return ",".join(f"{name}={value}".replace("torch.", "") for name, value in changed) or "-"

    def module(self, **kwargs) -> fastbptt.RNN | fastbptt.GRU | fastbptt.LSTM:
        torch.default_generator.manual_seed(self.seed)  # the CPU's: on every device it takes longer
        options = {
            "bias": self.bias,
            "batch_first": self.batch_first,
            "bidirectional": self.bidirectional,
            "dtype": self.dtype,
            **kwargs,
        }
        if self.cell == "gru":
            return fastbptt.GRU(self.I, self.H, self.layers, **options)
        if self.cell == "lstm":
            return fastbptt.LSTM(self.I, self.H, self.layers, proj_size=self.proj, **options)
        return fastbptt.RNN(self.I, self.H, self.layers, self.cell, **options)

    def data(self) -> tuple[Tensor | PackedSequence, States | None]:
        """Input and hx. The values are float32's in every dtype, so a cast is never a rounding."""
        generator = torch.Generator().manual_seed(self.seed + 1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        batch = () if self.B is None else (self.B,)
        first = (*batch, self.T) if self.batch_first else (self.T, *batch)
        x: Tensor | PackedSequence = draw(*first, self.I)
        if self.lengths is not None:
            x = pack_padded_sequence(x, self.lengths, self.batch_first, enforce_sorted=False)
            if list(self.lengths) == sorted(self.lengths, reverse=True):
                x = PackedSequence(x.data, x.batch_sizes)  # what enforce_sorted=True makes
        if not self.hx:
            return x, None
        count = self.layers * (2 if self.bidirectional else 1)
        h = draw(count, *batch, self.proj or self.H)
        return x, (h, draw(count, *batch, self.H)) if self.cell == "lstm" else h


def parts(states: States | None) -> tuple[Tensor, ...]:
    """States as a tuple: () for None, (h,) or (h, c)."""
    if states is None:
        return ()
    return (states,) if isinstance(states, Tensor) else tuple(states)


def whole(states: Sequence[Tensor]) -> States | None:
    """The inverse of parts: what a module's call takes."""
    if len(states) == 2:
        return tuple(states)
    return states[0] if states else None


def tensors_of(results: tuple[Tensor | PackedSequence, States]) -> tuple[Tensor, ...]:
    """What a call returned, in a row: output, h_n and, of an LSTM, c_n."""
    output, states = results
    return output.data if isinstance(output, PackedSequence) else output, *parts(states)


def twin(module: torch.nn.RNNBase) -> torch.nn.RNN | torch.nn.GRU | torch.nn.LSTM:
    """torch's own module with the same parameters' values."""
    weight = module.weight_ih_l0
    options = {
        "bias": module.bias,
        "batch_first": module.batch_first,
        "dropout": module.dropout,
        "bidirectional": module.bidirectional,
        "device": weight.device,
        "dtype": weight.dtype,
    }
    sizes = module.input_size, module.hidden_size, module.num_layers
    if module.mode == "GRU":
        other = torch.nn.GRU(*sizes, **options)
    elif module.mode == "LSTM":
        other = torch.nn.LSTM(*sizes, proj_size=module.proj_size, **options)
    else:
        other = torch.nn.RNN(*sizes, module.nonlinearity, **options)
    other.load_state_dict(module.state_dict())
    return other.train(module.training)


def referee(module: torch.nn.RNNBase, truncation=None) -> tuple[torch.nn.RNNBase, Callable]:
    """A float64 copy of the module, and the call that runs it by the reference's loops."""
    module = copy.deepcopy(module).double()

    def call(input, hx=None):
        return fastbptt.reference.run(module, input, hx, truncation=truncation)

    return module, call


@contextlib.contextmanager
def one_thread():
    """On which many small operators are fastest."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def refuse_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes it an error where a network of cells falls back to plain loops."""
    unroll_of = _cell_network.unroll_of

    def checked(*args):
        unroll = unroll_of(*args)
        assert unroll is not _loops.unroll
        return unroll

    monkeypatch.setattr(_cell_network, "unroll_of", checked)


CACHES: list[Callable] = []  # of `once`; cleared after each file of tests


def once(function: Callable) -> Callable:
    """Has what a function gives computed once for the same arguments, and on one thread.

    For what ours is held against: it is the same whichever instruction set and number of threads a
    test runs ours with.
    """
    cached = functools.cache(one_thread()(function))
    CACHES.append(cached)
    return cached


def detach_loop(module: torch.nn.RNNBase, k: int):
    """torch's module on k steps at a time, the state (h and c alike) detached in between."""

    def call(input: Tensor, hx: States | None = None):
        time = 1 if module.batch_first and input.dim() == 3 else 0
        outputs = []
        for start in range(0, input.size(time), k):
            length = min(k, input.size(time) - start)
            if start > 0:
                hx = whole([state.detach() for state in parts(hx)])
            output, hx = module(input.narrow(time, start, length), hx)
            outputs.append(output)
        return torch.cat(outputs, dim=time), hx

    return call


def leaf(value: Tensor | PackedSequence | None, dtype: torch.dtype | None = None):
    """A fresh leaf that asks for a gradient, and the argument to call with (packed like value)."""
    if value is None:
        return None, None
    data = value.data if isinstance(value, PackedSequence) else value
    data = data.detach().to(dtype or data.dtype, copy=True).requires_grad_()
    packed = isinstance(value, PackedSequence)
    return data, PackedSequence(data, *value[1:]) if packed else data


def cotangent(like: Tensor, seed: int, rounded: torch.dtype | None = None) -> Tensor:
    """The gradient of a loss in an output: the same numbers in every dtype that holds them."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(like.shape, generator=generator).to(rounded or like.dtype).to(like)


def step(module, input, hx=None, *, call: Callable | None = None, through=None, rounded=None):
    """Forward and backward: outputs and every gradient, each under its name.

    The losses' gradients in the outputs are the same numbers in every call, those that the dtype
    ``rounded`` has if it is given. ``call`` runs the forward pass, the module itself unless given;
    ``through`` names the outputs in the loss, if not all are.
    """
    dtype = module.weight_ih_l0.dtype
    x, input = leaf(input, dtype)
    states = [leaf(state, dtype)[0] for state in parts(hx)]
    module.zero_grad()
    tensors = tensors_of((call or module)(input, whole(states)))
    results = dict(zip(("output", "h_n", "c_n"), tensors, strict=False))
    through = through or tuple(results)
    torch.autograd.backward(
        [t for name, t in results.items() if name in through],
        [cotangent(t, i, rounded) for i, (n, t) in enumerate(results.items()) if n in through],
    )
    grads = {"dinput": x, **dict(zip(("dhx", "dcx"), states, strict=False))}
    grads |= {"d" + name: p for name, p in module.named_parameters()}
    results |= {name: t.grad for name, t in grads.items()}
    return {name: t.detach().clone() for name, t in results.items() if t is not None}


def assert_matches(actual: Results, expected: Results, rtol: float = 1e-12) -> None:
    """Same names, shapes and dtypes; in each tensor |a - b| <= rtol max|b| (0: the same bits).

    A tensor below 1e-3 counts as 1e-3: its values are sums of terms of about 1 that cancel, and
    keep those terms' rounding errors (a state that is one number alone may be anything small).
    """
    assert actual.keys() == expected.keys()
    for name, b in expected.items():
        a = actual[name]
        assert a.shape == b.shape, f"{name}: shape {tuple(a.shape)}, not {tuple(b.shape)}"
        assert a.dtype == b.dtype, f"{name}: {a.dtype}, not {b.dtype}"
        if b.numel() == 0:
            continue
        error, scale = (a - b).abs().max().item(), b.abs().max().item()
        assert error <= rtol * max(scale, 1e-3), (
            f"{name}: off by {error:.3g}, largest value {scale:.3g}"
        )


def assert_as_exact(actual: Results, peer: Results, truth: Results) -> None:
    """The error against the float64 truth is at most twice the peer's, plus 4 ulp.

    The ulp is that of the tensor's largest value. It is needed where the peer happens to hit the
    rounded truth exactly: even the last operation of a correct result may round by half an ulp,
    and the library's tanh and the vectors' are each good to an ulp or two.
    """
    assert actual.keys() == peer.keys() == truth.keys()
    for name, exact in truth.items():
        a, p = actual[name], peer[name]
        assert a.shape == exact.shape and a.dtype == p.dtype, name
        if exact.numel() == 0:
            continue
        ours, theirs = ((t.double() - exact).abs().max().item() for t in (a, p))
        ulp = torch.finfo(a.dtype).eps * exact.abs().max().item()
        assert ours <= 2 * theirs + 4 * ulp, f"{name}: {ours / ulp:.2f} ulp, {theirs / ulp:.2f}"


def surrounded(value: Tensor, contiguous: bool) -> Tensor:
    """The same values inside a storage whose every other number is NaN.

    Contiguous: between two stretches of NaN, starting one element off any vector's alignment.
    Otherwise: a strided view, with NaN before, between and behind the rows and columns.
    """
    nan = float("nan")
    if contiguous:
        storage = torch.full((value.numel() + 129,), nan, dtype=value.dtype)
        view = storage[65 : 65 + value.numel()].view(value.shape)
    else:
        storage = torch.full([2 * n + 3 for n in value.shape], nan, dtype=value.dtype)
        view = storage[tuple(slice(1, 1 + 2 * n, 2) for n in value.shape)]
    view.copy_(value.detach())
    return view.requires_grad_(value.requires_grad)


def python(script: str, *args: object, timeout: float = 120, check: bool = True, env=None):
    """Runs a script in a fresh interpreter, for what must not disturb or be disturbed."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | env if env else None,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as expired:
        os.killpg(process.pid, signal.SIGKILL)  # its forked children too
        raise AssertionError(f"not done after {timeout} s") from expired
    if check:
        assert process.returncode == 0, err or f"ended with {process.returncode}"
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def through_pickle(module: torch.nn.Module) -> torch.nn.Module:
    return pickle.loads(pickle.dumps(module))


def through_file(module: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def python_blocks(page: str) -> list[str]:
    """The Python on a page of docs/, in its order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
