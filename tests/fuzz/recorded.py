"""Random calls of the modules, held against the reference, and what operators they come to call."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import fastbptt
from calls import Call, Gates
from common import CELLS, Case, parts, tensors_of
from fastbptt import TBPTT, Chunked, Sliding

# Functions of the _C module that take tensors, and no address but that of a cell.
FUNCTIONS = ("network", "user_forward", "user_backward", "read_user_arguments")
WAYS = ("backward", "double backward", "forward", "forward over backward", "per sample")
#: A call of the modules is within this of the reference, of the tensor's largest value.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-4}


@dataclass
class OperatorCall:
    """An operator or function with its arguments, none of which shares memory with another."""

    name: str
    function: Callable
    arguments: dict[str | int, object]

    def run(self, arguments: dict[str | int, object] | None = None) -> object:
        given = self.arguments if arguments is None else arguments
        by_position = [value for key, value in given.items() if isinstance(key, int)]
        by_name = {key: value for key, value in given.items() if isinstance(key, str)}
        return self.function(*by_position, **by_name)


def copied(value: object) -> object:
    return tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, value)


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[OperatorCall]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "fastbptt":
            names = [argument.name for argument in func._schema.arguments]
            positional = {n: value for n, value in zip(names, args, strict=False) if n != "self"}
            if "self" in names:
                positional = {0: args[0], **positional}
            arguments = copied(positional | kwargs)
            self.calls.append(OperatorCall(str(func), func, arguments))
        return func(*args, **kwargs)


@contextmanager
def recording(calls: list[OperatorCall]) -> Iterator[None]:
    """Adds what is called to the list."""
    before = {name: getattr(fastbptt._C, name) for name in FUNCTIONS}

    def recorder(name: str, function: Callable) -> Callable:
        def call(*arguments):
            is_plain = all(
                torch._C._functorch.is_functorch_wrapped_tensor(a) is False
                for a in arguments
                if isinstance(a, Tensor)
            )
            if is_plain and forward_ad._current_level < 0:
                kept = dict(enumerate(copied(list(arguments))))
                calls.append(OperatorCall(f"_C.{name}", function, kept))
                if name == "network":
                    op = torch.ops.fastbptt.network.default
                    calls.append(OperatorCall("fastbptt.network", op, dict(kept)))
            return function(*arguments)

        return call

    for name, function in before.items():
        setattr(fastbptt._C, name, recorder(name, function))
    try:
        with _Recorder(calls):
            yield
    finally:
        for name, function in before.items():
            setattr(fastbptt._C, name, function)


def draw_call(choose: random.Random) -> Call:
    """A small one, mostly of sizes about those of vectors, tiles and blocks."""
    cell = choose.choice(CELLS)
    T, H = choose.choice([1, 1, 2, 3, 5, 9]), choose.choice([1, 2, 3, 4, 7, 8, 9, 16, 17, 33, 65])
    layout = choose.choice(["padded", "padded", "unbatched", "packed"])
    B = None if layout == "unbatched" else choose.choice([0, 1, 1, 2, 3, 4, 7, 13])
    lengths = None
    if layout == "packed":
        lengths = tuple(choose.randint(1, T) for _ in range(max(B or 1, 1)))
        B, T = len(lengths), max(lengths)
    bidirectional = choose.random() < 0.3
    case = Case(
        T=T,
        B=B,
        I=choose.choice([1, 2, 3, 5, 8, 16, 19]),
        H=H,
        layers=choose.choice([1, 1, 2, 3]),
        bidirectional=bidirectional,
        batch_first=choose.random() < 0.4,
        bias=choose.random() < 0.7,
        cell=cell,
        proj=choose.randrange(H) if cell == "lstm" and choose.random() < 0.4 else 0,
        hx=choose.random() < 0.6,
        lengths=lengths,
        dtype=choose.choice([torch.float64, torch.float32]),
        seed=choose.randrange(10**6),
    )
    k = choose.randint(1, T + 1)
    truncations = [None, k, Chunked(k), TBPTT(k, k), Gates(dtype=case.dtype)]
    if not bidirectional:
        truncations += [TBPTT(k, k + choose.randint(1, 4)), Sliding(k)]
        truncations += [TBPTT(k, 2**62)]
    return Call(
        case,
        truncation=choose.choice(truncations),
        resets=choose.choice(["none", "none", "by step", "by sequence", "always"]),
        recompute=cell in ("gru", "lstm") and choose.random() < 0.3,
    )


def compare_with_reference(call: Call) -> None:
    ours, expected = call.ours(), call.reference()
    tolerance = TOLERANCES[call.case.dtype]
    for name, want in expected.items():
        got = ours.get(name)
        assert got is not None and got.shape == want.shape, f"{name} is missing or misshapen"
        if want.numel() == 0:
            continue
        error = (got.double() - want).abs().max().item()
        scale = max(want.abs().max().item(), 1e-2)
        # relu's kink: a number that is 0 but for rounding may fall on either side
        limit = tolerance * scale * (1e3 if call.case.cell == "relu" else 1)
        assert error <= limit, f"{name}: off by {error:.3g}, largest value {scale:.3g}"


def differentiate(call: Call, way: str) -> None:
    """Runs the call so that its derivatives are made in some way."""
    case = call.case
    module = call.module()
    x, hx = case.data()
    names, leaves = zip(*module.named_parameters(), strict=True)
    options = {"truncation": call.make_truncation(), "resets": call.make_resets()}

    def run(*parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        results = functional_call(module, given, (x, hx), options)
        return sum(t.square().sum() for t in tensors_of(results))

    if way in ("backward", "double backward"):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        twice = way == "double backward"
        first = torch.autograd.grad(run(*leaves), leaves, create_graph=twice)
        if twice:
            torch.autograd.grad(sum(g.square().sum() for g in first), leaves, allow_unused=True)
    elif way == "forward":
        with forward_ad.dual_level():
            run(*[forward_ad.make_dual(leaf.detach(), torch.ones_like(leaf)) for leaf in leaves])
    elif way == "forward over backward":
        plain = tuple(leaf.detach() for leaf in leaves)
        ones = tuple(torch.ones_like(leaf) for leaf in leaves)
        jvp(lambda *p: grad(lambda first: run(first, *p[1:]))(p[0]), plain, ones)
    elif case.lengths is None and case.B:
        plain = {n: leaf.detach() for n, leaf in zip(names, leaves, strict=True)}
        batch = 0 if case.batch_first else 1

        def of_one(parameters, row):
            results = functional_call(module, parameters, (row.unsqueeze(batch),))
            return sum(t.square().sum() for t in tensors_of(results))

        vmap(grad(of_one), in_dims=(None, batch))(plain, x)


def record(choose: random.Random) -> tuple[Call, list[OperatorCall]]:
    """A random call of a module, checked, and the calls of operators that it makes."""
    call = draw_call(choose)
    compare_with_reference(call)
    calls: list[OperatorCall] = []
    way = choose.choice(WAYS)
    if way != "backward":  # of these dtypes and truncations
        call = replace(call, truncation=choose.choice([None, choose.randint(1, call.case.T)]))
    with recording(calls):
        differentiate(call, way)
    return call, calls


def record_cell(choose: random.Random, networks: dict[str, type]) -> list[OperatorCall]:
    """The same for a user's cell."""
    name = choose.choice(sorted(networks))
    torch.manual_seed(choose.randrange(10**6))
    H, T, B = choose.choice([1, 3, 8, 17]), choose.choice([1, 2, 5]), choose.choice([1, 2, 9])
    dtype = choose.choice([torch.float32, torch.float64])
    module = networks[name](3, H, num_layers=choose.choice([1, 2]), dtype=dtype)
    x = torch.randn(T, B, 3, dtype=dtype)
    calls: list[OperatorCall] = []
    with recording(calls):
        output, states = module(x, truncation=choose.choice([None, 1, 2]))
        sum(t.square().sum() for t in (output, *parts(states))).backward()
    return calls
