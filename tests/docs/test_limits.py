"""The table of docs/limits.md is what the code does, with torch.nn's modules and with ours."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import pack_sequence

import fastbptt
from common import DOCS

T, B, I, H = 5, 2, 3, 4
TORCH, CPU, CUDA = "torch.nn", "fastbptt on a CPU", "fastbptt on CUDA"
RESETS = torch.zeros(T, B, dtype=torch.bool)
RESETS[2, 1] = True
Run = Callable[[ModuleType, str], object]

# What a feature's row is checked by: a call that works, or raises. `nn` is torch.nn or fastbptt.
CHECKS: dict[str, Run] = {}


def check(name: str) -> Callable[[Run], Run]:
    def add(run: Run) -> Run:
        CHECKS[name] = run
        return run

    return add


def inputs(device: str, **options: object) -> torch.Tensor:
    return torch.randn(T, B, I, device=device, **options)


def train(nn: ModuleType, device: str, cell: str = "GRU", *, call: dict | None = None, **made):
    """A forward and a backward pass."""
    module = getattr(nn, cell)(I, H, device=device, **made)
    output, _, *rest = module(inputs(device, dtype=made.get("dtype")), **(call or {}))
    output.sum().backward()
    assert module.weight_hh_l0.grad.isfinite().all()
    return module, rest


def dtypes(*of: torch.dtype) -> Run:
    def run(nn, device):
        for dtype in of:
            for cell in ("RNN", "GRU", "LSTM"):
                train(nn, device, cell, dtype=dtype)

    return run


def truncated(truncation: object, **made: object) -> Run:
    return lambda nn, device: train(nn, device, call={"truncation": truncation}, **made)


CHECKS["float32 and float64"] = dtypes(torch.float32, torch.float64)
CHECKS["bfloat16 and float16"] = dtypes(torch.bfloat16, torch.float16)
CHECKS['`nonlinearity="identity"`'] = lambda nn, device: train(
    nn, device, "RNN", nonlinearity="identity"
)
CHECKS["`proj_size` of an LSTM"] = lambda nn, device: train(nn, device, "LSTM", proj_size=2)
CHECKS["`recompute=True`: gates computed again"] = lambda nn, device: train(
    nn, device, recompute=True
)
CHECKS["`Chunked`, `TBPTT`, `Sliding`"] = truncated(fastbptt.Sliding(2))
CHECKS["`Randomized`, `Gated`"] = truncated(fastbptt.Randomized(pi=0.5))
CHECKS["overlapping windows in both directions"] = truncated(
    fastbptt.Sliding(2), bidirectional=True
)
CHECKS["`clip_grad=` from step to step"] = lambda nn, device: train(nn, device, clip_grad=1.0)


@check("layers, directions, dropout, `batch_first`, packed input")
def _(nn, device):
    options = dict(num_layers=2, bidirectional=True, dropout=0.1, batch_first=True)
    module = nn.LSTM(I, H, device=device, **options)
    packed = pack_sequence([torch.randn(n, I, device=device) for n in (5, 3)])
    module(packed)[0].data.sum().backward()


@check("`torch.autocast`")
def _(nn, device):
    with torch.autocast(device, torch.bfloat16):
        train(nn, device)


@check("`resets=`")
def _(nn, device):
    train(nn, device, call={"resets": RESETS.to(device)})


@check("`return_states=`, `reset_to=`")
def _(nn, device):
    start = torch.zeros(1, 1, H, device=device)
    call = {"return_states": True, "resets": RESETS.to(device), "reset_to": start}
    (states,) = train(nn, device, call=call)[1]
    assert states.shape == (1, T, B, H)


@check("cells from a function")
def _(nn, device):
    x = inputs(device)
    nn.Recurrent(fastbptt.cells.leaky, I, H, alpha=0.1, device=device)(x)[0].sum().backward()


def loss_of(nn, device, **call):
    module = nn.GRU(I, H, device=device, dtype=torch.float64)
    x = inputs(device, dtype=torch.float64)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    return lambda w: functional_call(module, w, (x,), call)[0].sin().sum(), weights


def differentiate(times: int, **call: object) -> Run:
    def run(nn, device):
        loss, weights = loss_of(nn, device, **call)
        w = {name: p.requires_grad_() for name, p in weights.items()}
        value = loss(w)
        for _ in range(times):
            (slope,) = torch.autograd.grad(value, w["weight_hh_l0"], create_graph=True)
            value = slope.square().sum()

    return run


def forward_mode(**call: object) -> Run:
    def run(nn, device):
        loss, weights = loss_of(nn, device, **call)
        jvp(loss, (weights,), (weights,))

    return run


CHECKS["gradients of gradients"] = differentiate(2)
CHECKS["gradients of truncated gradients"] = differentiate(2, truncation=2)
CHECKS["gradients of clipped gradients"] = differentiate(2, clip_grad=1.0)
CHECKS["third derivatives"] = differentiate(3)
CHECKS["forward mode"] = forward_mode()
CHECKS["forward mode with `clip_grad=`"] = forward_mode(clip_grad=1.0)


@check("each sample's gradient by `vmap(grad)`")
def _(nn, device):
    module = nn.GRU(I, H, device=device)
    weights = {name: p.detach() for name, p in module.named_parameters()}

    def loss(w, sample):
        return functional_call(module, w, (sample,))[0].sum()

    samples = vmap(grad(loss), in_dims=(None, 1))(weights, inputs(device))
    assert samples["weight_hh_l0"].shape == (B, 3 * H, H)


@check("`torch.export`")
def _(nn, device):
    torch.export.export(nn.GRU(I, H, device=device), (inputs(device),))


@check("`torch.jit.trace`")
def _(nn, device):
    torch.jit.trace(nn.GRU(I, H, device=device), (inputs(device),), check_trace=False)


@check("`torch.jit.trace` with `clip_grad=`")
def _(nn, device):
    module = nn.GRU(I, H, device=device, clip_grad=1.0)
    torch.jit.trace(module, (inputs(device),), check_trace=False)


class Part(torch.nn.Module):
    def __init__(self, rnn: torch.nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)[0]


def script(**made: object) -> Run:
    return lambda nn, device: torch.jit.script(Part(nn.GRU(I, H, **made)))


CHECKS["`torch.jit.script`, as a part of a model"] = script()
CHECKS["`torch.jit.script` with windows"] = script(truncation=2)
CHECKS["`torch.jit.script` with `Gated` or `Randomized`"] = script(
    truncation=fastbptt.Randomized(pi=0.5)
)


@check("`deepcopy`, pickle, `state_dict`")
def _(nn, device):
    module = nn.GRU(I, H, device=device)
    copy.deepcopy(module).load_state_dict(module.state_dict())


@check("dynamic quantization")
def _(nn, device):
    model = Part(nn.LSTM(I, H))
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.LSTM})
    assert "quantized" in type(quantized.rnn).__module__


def works(run: Run, nn: ModuleType, device: str) -> bool:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run(nn, device)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return False
    return True


def table() -> dict[str, dict[str, str]]:
    """The page's rows, by feature and column."""
    text = (DOCS / "limits.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| (.*) \|$", text, re.MULTILINE)
    head, *rows = (line.split(" | ") for line in lines)
    assert head[1:] == [TORCH, CPU, CUDA]
    return {name: dict(zip(head[1:], cells, strict=True)) for name, *cells in rows}


def test_every_row_is_checked():
    assert set(table()) == set(CHECKS)


@pytest.mark.parametrize("column", [TORCH, CPU, CUDA])
@pytest.mark.parametrize("name", CHECKS)
def test_a_row_says_what_happens(name, column):
    if column == CUDA and not (torch.cuda.is_available() and fastbptt._C.cuda_built()):
        pytest.skip("no GPU")
    said = table()[name][column].split(":")[0]
    assert said in ("yes", "no") or (said == "varies" and column == TORCH)
    if column == TORCH and not torch.__version__.startswith("2.13."):
        pytest.skip("the page speaks of torch 2.13")
    if said in ("yes", "no"):
        nn = torch.nn if column == TORCH else fastbptt
        assert works(CHECKS[name], nn, "cuda" if column == CUDA else "cpu") == (said == "yes")
