"""What a cell's function may be: torch's elementwise functions, and an error for all else."""

from __future__ import annotations

import functools
import inspect
import math
import random
import re
import sys

import numpy
import pytest
import torch
import torch.nn.functional as F

import fastbptt
from fastbptt import _elementwise
from fastbptt._program import Ref
from fastbptt._trace import trace

LINE = re.compile(re.escape(__file__) + r":(\d+)")

# One function of x and y for each name of the table; "at 0" where x and y meet the kinks.
FUNCTIONS = {
    "+": lambda x, y: x + y + 2 + (1.5 + x),
    "-": lambda x, y: x - y - 2 - (1.5 - x),
    "*": lambda x, y: x * y * 2 * (1.5 * x),
    "/": lambda x, y: x / y / 2 + 1.5 / x,
    "**": lambda x, y: x**2 + y**3 + x**7 + 2.5**y + x**-2 + x**1 + x**0,
    "roots": lambda x, y: x.abs() ** 0.5 + abs(y) ** 1.3 + abs(y) ** -0.5 + torch.pow(x, 4.0),
    "signs": lambda x, y: -x + +y + torch.neg(x) + abs(y) + x.abs() + torch.negative(x),
    "named": lambda x, y: torch.add(x, y, alpha=2) + torch.sub(x, y, alpha=3) + x.mul(y) + x.div(y),
    "reversed": lambda x, y: torch.rsub(x, 2) + torch.true_divide(x, y) + torch.multiply(2, y),
    "exp": lambda x, y: x.exp() + torch.expm1(y) + torch.exp2(x),
    "log": lambda x, y: (
        x.abs().log() + torch.log1p(y.abs()) + (x.abs() + 1).log2() + y.abs().log10()
    ),
    "sqrt": lambda x, y: x.abs().sqrt() + torch.rsqrt(y.abs()) + x.reciprocal() + y.square(),
    "tanh": lambda x, y: torch.tanh(x) + y.tanh() + F.tanh(x),
    "sigmoid": lambda x, y: torch.sigmoid(x) + y.sigmoid() + torch.special.expit(x),
    "sin": lambda x, y: torch.sin(x) + y.cos(),
    "erf": lambda x, y: torch.erf(x) + torch.special.erf(y),
    "extrema": lambda x, y: torch.maximum(x, y) + torch.minimum(x, y) * 2 + torch.max(x, y) * y,
    "where": lambda x, y: torch.where(x > y, x, y * 3) + x.where(y < 1, 2 * y),
    "comparisons": lambda x, y: (
        torch.where(x >= y, x, 0.5) + torch.where(x <= 0, y, x) + torch.where(x != y, x, -y)
    ),
    "logic": lambda x, y: torch.where(
        (x > 0) & (y > 0) | ~(x < y) | torch.logical_not(x <= 1), x, torch.where(x == y, 1, y)
    ),
    "truth": lambda x, y: (x > 0) * y + (x > y).double() - (y < x).type_as(x) / 2,
    "fill": lambda x, y: x.masked_fill(x > y, 2.0) + torch.zeros_like(x) + torch.full_like(y, 0.5),
    "ones": lambda x, y: torch.ones_like(x) * y + torch.sigmoid(torch.zeros_like(x)) * x,
    "lerp": lambda x, y: torch.lerp(x, y, 0.25) + torch.addcmul(x, x, y, value=2),
    "addcdiv": lambda x, y: torch.addcdiv(x, x, y, value=2) + torch.lerp(x, y, torch.sigmoid(x)),
    "relu": lambda x, y: torch.relu(x) + F.relu(y) + x.relu(),
    "relu6": lambda x, y: F.relu6(5 * x) + F.hardtanh(y) + F.hardtanh(x, -0.5, 0.25),
    "sign": lambda x, y: torch.sign(x) * y + y.sgn(),
    "leaky": lambda x, y: F.leaky_relu(x) + F.leaky_relu(y, 0.2),
    "elu": lambda x, y: F.elu(x) + F.elu(y, 0.5) + F.selu(x) + F.celu(y, 1.5),
    "clamp": lambda x, y: x.clamp(-0.5, 0.5) + torch.clip(y, max=0.25) + torch.clamp(x, min=0),
    "softplus": lambda x, y: F.softplus(x) + F.softplus(y, beta=3.0, threshold=2.0),
    "softsign": lambda x, y: F.softsign(x) + F.logsigmoid(y) + F.tanhshrink(x),
    "silu": lambda x, y: F.silu(x) + F.mish(y),
    "gelu": lambda x, y: F.gelu(x) + F.gelu(y, approximate="tanh"),
    "constants": lambda x, y: x * torch.tensor(0.5) + numpy.float32(0.5) * y + math.pi,
}


OPERATIONS = set(
    "add sub mul div neg sqrt exp log expm1 log1p tanh sigmoid erf sin cos abs maximum minimum "
    "where lt le eq".split()
)


@pytest.mark.parametrize("scale", [1.0, 50.0])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_derivatives_are_torchs(name, scale):
    function = FUNCTIONS[name]
    program = trace(lambda pre, rec, state: (function(pre[0], rec[0]),), 1, 1, ())
    assert {op.name for op in program.ops} <= OPERATIONS
    generator = torch.Generator().manual_seed(0)
    x = (scale * torch.randn(200, generator=generator, dtype=torch.float64)).requires_grad_()
    y = torch.randn(200, generator=generator, dtype=torch.float64).requires_grad_()
    got = program.evaluate({("pre", 0): x, ("rec", 0): y, ("state", 0): x.detach()})[0]
    compare(got, function(x, y), (x, y))


AT_KINKS = [
    "relu",
    "relu6",
    "sign",
    "leaky",
    "elu",
    "clamp",
    "softplus",
    "extrema",
    "where",
]
AT_KINKS += ["signs", "softsign", "silu", "gelu", "comparisons", "logic", "truth"]


@pytest.mark.parametrize("name", AT_KINKS)
def test_where_the_pieces_meet(name):
    function = FUNCTIONS[name]
    program = trace(lambda pre, rec, state: (function(pre[0], rec[0]),), 1, 1, ())
    values = torch.tensor([0.0, -0.0, 0.25, -0.5, 0.5, 1.0, -1.0, 1.2, 0.75, -0.75, 20.0, 2 / 3])
    x = values.double().repeat(2).requires_grad_()
    y = torch.cat([values, values.flip(0)]).double().requires_grad_()
    got = program.evaluate({("pre", 0): x, ("rec", 0): y, ("state", 0): x.detach()})[0]
    compare(got, function(x, y), (x, y))


def test_hardsigmoid():
    """By its formula: torch's derivative has 1 / 6 as a float32 has it."""
    program = trace(lambda pre, rec, state: (F.hardsigmoid(pre[0]),), 1, 1, ())
    x = torch.linspace(-5, 5, 21, dtype=torch.float64).requires_grad_()
    got = program.evaluate({("pre", 0): x, ("rec", 0): x, ("state", 0): x})[0]
    compare(got, F.relu6(x + 3) / 6, (x,))
    torch.testing.assert_close(got, F.hardsigmoid(x), rtol=1e-13, atol=1e-13)


def test_a_nan_goes_through():
    nan = torch.tensor([float("nan")], dtype=torch.float64)
    for name in ["relu", "relu6", "leaky", "elu", "clamp", "softplus", "extrema", "silu"]:
        function = FUNCTIONS[name]
        program = trace(lambda pre, rec, state, f=function: (f(pre[0], rec[0]),), 1, 1, ())
        values = {("pre", 0): nan, ("rec", 0): nan, ("state", 0): nan}
        assert program.evaluate(values)[0].isnan() and function(nan, nan).isnan(), name


def compare(got, expected, leaves):
    def gradients(result):
        return torch.autograd.grad(result.sum(), leaves, allow_unused=True, materialize_grads=True)

    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    for a, b in zip(gradients(got), gradients(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_every_function_of_the_table_is_tried():
    text = inspect.getsource(sys.modules[__name__])
    operators = {
        "radd",
        "rmul",
        "rtruediv",
        "rpow",
        "truediv",
        "and",
        "or",
        "rand",
        "ror",
        "invert",
    }
    aliases = {"rdiv", "subtract", "divide", "absolute", "float_power", "special_exp2", "float"}
    aliases |= {"special_erf", "special_expit", "log_sigmoid", "bitwise_and", "bitwise_or"}
    aliases |= {"bitwise_not", "less", "less_equal", "greater", "greater_equal", "not_equal"}
    aliases |= {"lt", "le", "gt", "ge", "eq", "ne", "logical_and", "logical_or", "min", "clip"}
    for name in _elementwise.FUNCTIONS.keys() - operators - aliases:
        assert re.search(rf"[.]{name}\(", text), name


def test_a_program_is_short():
    """What is computed twice stands once, and what nothing needs is left out."""

    def function(pre, rec, state, a, b):
        unused = torch.exp(pre[0]) + b
        assert unused is not None
        return torch.tanh(pre[0] + rec[0]) * a + torch.tanh(pre[0] + rec[0]), state[0]

    program = trace(function, 1, 2, ("a", "b"))
    assert [leaf for leaf in program.leaves] == [
        ("pre", 0),
        ("rec", 0),
        ("state", 0),
        ("state", 1),
        ("extra", "a"),
        ("extra", "b"),
    ]
    assert [op.name for op in program.ops] == ["add", "tanh", "mul", "add"]
    assert program.results == (Ref(9), Ref(2))
    assert hash(program) == hash(trace(function, 1, 2, ("a", "b")))
    assert str(program).endswith("v8 = mul(v7, v4)\nv9 = add(v8, v7)\nreturn v9, v2")


def test_constant_states():
    program = trace(lambda pre, rec, state: (0.5, torch.tensor(2.0), pre[0] * 0 + 1), 1, 3, ())
    assert program.results[:2] == (0.5, 2.0)


def sum_of(x):
    return x.sum()


BAD = {  # name: (what the function does with pre[0] and rec[0], what the error says)
    "sum": (lambda x, y: x + torch.sum(y), "elementwise, got sum"),
    "method": (sum_of, "elementwise, got a value's sum"),
    "matmul": (lambda x, y: x @ y, "elementwise, got matmul"),
    "matmul by name": (lambda x, y: torch.matmul(x, y), "elementwise, got matmul"),
    "matmul with a tensor": (lambda x, y: torch.ones(3, 3) @ x, "elementwise, got matmul"),
    "linear": (lambda x, y: F.linear(x, y), "elementwise, got linear"),
    "view": (lambda x, y: x.view(-1), "elementwise, got a value's view"),
    "shape": (lambda x, y: x * x.shape[0], "elementwise, got a value's shape"),
    "transpose": (lambda x, y: x.T, "elementwise, got a value's T"),
    "cat": (lambda x, y: torch.cat([x, y]), "elementwise, got cat"),
    "index": (lambda x, y: x[..., 0], "elementwise, got indexing"),
    "loop": (lambda x, y: sum(x), "elementwise, got a loop over a value"),
    "len": (lambda x, y: x * len(y), "elementwise, got len"),
    "softmax": (lambda x, y: torch.softmax(x, -1), "elementwise, got softmax"),
    "layer norm": (lambda x, y: F.layer_norm(x, (4,)), "elementwise, got layer_norm"),
    "cumsum": (lambda x, y: x.cumsum(0), "elementwise, got a value's cumsum"),
    "max of a dimension": (lambda x, y: torch.max(x, 1), "got max with a number, which is a dim"),
    "max of all": (lambda x, y: torch.max(x), "got max with other arguments"),
    "floor": (lambda x, y: torch.floor(x), "got floor, which is not in the list"),
    "atan": (lambda x, y: x + torch.atan2(x, y), "got atan2, which is not in the list"),
    "remainder": (lambda x, y: x % 2, "got mod, which is not in the list"),
    "floor division": (lambda x, y: x // 2, "got floordiv, which is not in the list"),
    "rounding": (lambda x, y: torch.div(x, y, rounding_mode="floor"), "div with rounding_mode="),
    "power of two values": (lambda x, y: x**y, "pow with an exponent that is no constant"),
    "detach": (lambda x, y: x.detach(), "got a value's detach, which is not in the list"),
    "dtype": (lambda x, y: x.to(torch.float32), "got a value's to, which is not in the list"),
    "float": (lambda x, y: x.float(), "float with another dtype than the states'"),
    "in place": (lambda x, y: x.tanh_(), "tanh_, which changes a value in place"),
    "in place by name": (lambda x, y: torch.relu_(x), "relu_, which changes a value in place"),
    "in place by option": (lambda x, y: F.relu(x, inplace=True), "relu with inplace=True"),
    "a tensor": (lambda x, y: x * torch.ones(3), r"mul with a tensor of shape \(3,\)"),
    "a parameter": (lambda x, y: x * torch.nn.Parameter(torch.ones(())), "requires a gradient"),
    "if": (lambda x, y: x if x > 0 else y, "must not choose by data"),
    "and": (lambda x, y: x and y, "must not choose by data"),
    "max of Python": (lambda x, y: max(x, y), "must not choose by data"),
    "math": (lambda x, y: math.tanh(x), "must not choose by data"),
    "range": (lambda x, y: sum(range(y)), "must not choose by data"),
    "rand_like": (lambda x, y: x + torch.rand_like(x), "must not be random.* got rand_like"),
    "rand": (lambda x, y: x + torch.rand(()), "must not be random.* got rand"),
    "bernoulli": (lambda x, y: torch.bernoulli(x), "must not be random.* got bernoulli"),
    "method's draw": (lambda x, y: x.bernoulli(), "must not be random.* got bernoulli"),
    "dropout": (lambda x, y: F.dropout(x, 0.5), "must not be random.* got dropout"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_error_names_the_operation_and_the_line(name):
    what, message = BAD[name]
    arguments = 1 if what is sum_of else 2

    def function(pre, rec, state):
        return (what(*(pre[0], rec[0])[:arguments]),)

    with pytest.raises(TypeError, match=message) as caught:
        fastbptt.cell(gates=1, states=1)(function)
    line = int(LINE.search(str(caught.value)).group(1))
    first = what.__code__.co_firstlineno
    assert line in (first, first + 1)


def iadd(pre, rec, state):
    (h,) = state
    h += pre[0] + rec[0]
    return (h,)


def test_an_operator_in_place():
    with pytest.raises(TypeError, match=r"\+=, which changes a tensor in place"):
        fastbptt.cell(gates=1, states=1)(iadd)


def test_numpy():
    with pytest.raises(TypeError, match="ufunc"):
        trace(lambda pre, rec, state: (numpy.tanh(pre[0]),), 1, 1, ())
    with pytest.raises(TypeError, match="NumPy"):
        trace(lambda pre, rec, state: (pre[0] + numpy.asarray(pre[0]),), 1, 1, ())


def test_a_draw_that_is_not_torchs():
    with pytest.raises(TypeError, match="must do the same in each call"):
        trace(lambda pre, rec, state: (pre[0] * random.random(),), 1, 1, ())


def test_a_trace_draws_nothing():
    before = torch.get_rng_state()
    with pytest.raises(TypeError, match="random"):
        trace(lambda pre, rec, state: (pre[0] * torch.randn(()),), 1, 1, ())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_value_of_another_call():
    kept = []

    def function(pre, rec, state):
        kept.append(pre[0])
        return (kept[0] + rec[0],)

    with pytest.raises(TypeError, match="a value that another call of it had"):
        trace(function, 1, 1, ())


def returns(what):
    def function(pre, rec, state):
        return what(pre[0])

    return function


@pytest.mark.parametrize(
    "what, states, error, message",
    [
        (
            lambda x: (x, x),
            1,
            ValueError,
            r"must return 1 new states \(states=1\), got 2 from func",
        ),
        (lambda x: (x,), 2, ValueError, r"must return 2 new states \(states=2\), got 1 from func"),
        (lambda x: (), 1, ValueError, "must return 1 new states"),
        (lambda x: x, 1, TypeError, "must return its new states as a tuple of 1, got Value"),
        (lambda x: None, 1, TypeError, "must return its new states as a tuple of 1, got NoneType"),
        (lambda x: (x, None), 2, TypeError, "new state 1 must be a value that .* got None"),
        (lambda x: ("h",), 1, TypeError, "new state 0 must be a value that .* got 'h'"),
        (lambda x: (torch.ones(3),), 1, TypeError, r"got a tensor of shape \(3,\) from func"),
    ],
)
def test_what_it_returns(what, states, error, message):
    with pytest.raises(error, match=message) as caught:
        fastbptt.cell(gates=1, states=states)(returns(what))
    assert LINE.search(str(caught.value))


def good(pre, rec, state):
    return (pre[0],)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"gates": 0, "states": 1}, ValueError, "gates must be at least 1, got 0"),
        ({"gates": 1, "states": 0}, ValueError, "states must be at least 1, got 0"),
        ({"gates": 1.0, "states": 1}, TypeError, "gates must be an int, got 1.0"),
        ({"gates": 1, "states": True}, TypeError, "states must be an int, got True"),
        ({"gates": 1, "states": 1, "recurrent": 1}, ValueError, "recurrent must be a state's numb"),
        ({"gates": 1, "states": 1, "output": -1}, ValueError, "output must be .* 0 to 0, got -1"),
        ({"gates": 1, "states": 1, "output": "h"}, TypeError, "output must be an int, got 'h'"),
    ],
)
def test_numbers(options, error, message):
    with pytest.raises(error, match=message):
        fastbptt.cell(**options)(good)


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda pre, rec: (pre[0],), "must take pre, rec and state by position"),
        (lambda *values: (values[0][0],), "must take pre, rec and state by position"),
        (lambda pre, rec, state, *more: (pre[0],), r"by name, got \*more"),
        (lambda pre, rec, state, **more: (pre[0],), r"by name, got \*\*more"),
        (lambda pre, rec, state, a, /: (pre[0],), "by name, got a"),
        (lambda pre, rec, state, dropout: (pre[0],), "got 'dropout' twice"),
        (lambda pre, rec, state, hx: (pre[0],), "got 'hx' twice"),
        (lambda pre, rec, state, weight_hh: (pre[0],), "got 'weight_hh' twice"),
        (lambda pre, rec, state, a="b": (pre[0],), "default of a must be a number, got 'b'"),
        (torch.tanh, "must be made of a function, got builtin"),
        (functools.partial(good), "must be made of a function, got partial"),
    ],
)
def test_arguments(function, message):
    with pytest.raises(TypeError, match=message):
        fastbptt.cell(gates=1, states=1)(function)
