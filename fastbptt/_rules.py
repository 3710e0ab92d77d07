"""The operations of a cell's program in C++, each with its derivative."""

from __future__ import annotations

import math

#: What an operation of the arguments {0}, {1} and {2} is.
FORWARD = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "Bits<V>::divide({0}, {1})",
    "neg": "-{0}",
    "square": "{0} * {0}",
    "reciprocal": "Bits<V>::divide(number<V>(1), {0})",
    "sqrt": "square_root({0})",
    "rsqrt": "Bits<V>::divide(number<V>(1), square_root({0}))",
    "pow": "power_of({0}, {1})",
    "exp": "exp_of({0})",
    "expm1": "expm1_of({0})",
    "log": "log_of({0})",
    "log1p": "log1p_of({0})",
    "tanh": "tanh({0})",
    "sigmoid": "sigmoid({0})",
    "erf": "erf_of({0})",
    "sin": "sine({0})",
    "cos": "cosine({0})",
    "abs": "Bits<V>::abs({0})",
    "sign": "select({0} > 0, number<V>(1), select({0} < 0, number<V>(-1), {0}))",
    "relu": "select({0} < 0, V{{}}, {0})",
    "clamp": "select({0} < {1}, {1}, select({0} > {2}, {2}, {0}))",
    "maximum": "maximum({0}, {1})",
    "minimum": "minimum({0}, {1})",
    "where": "select({0}, {1}, {2})",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "logical_and": "{0} & {1}",
    "logical_or": "{0} | {1}",
    "logical_not": "negated({0})",
}

#: By argument, the gradient's share of it: {g} is that of the value {y}. What is missing has none.
DERIVATIVE = {
    "add": ("{g}", "{g}"),
    "sub": ("{g}", "-{g}"),
    "mul": ("{g} * {1}", "{g} * {0}"),
    "div": ("Bits<V>::divide({g}, {1})", "-Bits<V>::divide({g} * {y}, {1})"),
    "neg": ("-{g}",),
    "square": ("{g} * ({0} + {0})",),
    "reciprocal": ("-{g} * {y} * {y}",),
    "sqrt": ("Bits<V>::divide({g}, {y} + {y})",),
    "rsqrt": ("number<V>(-0.5) * {g} * {y} * {y} * {y}",),
    "exp": ("{g} * {y}",),
    "expm1": ("{g} * ({y} + number<V>(1))",),
    "log": ("Bits<V>::divide({g}, {0})",),
    "log1p": ("Bits<V>::divide({g}, {0} + number<V>(1))",),
    "tanh": ("{g} * (number<V>(1) - {y} * {y})",),
    "sigmoid": ("{g} * {y} * (number<V>(1) - {y})",),
    "erf": (f"{{g}} * number<V>({(2 / math.sqrt(math.pi)).hex()}) * exp_of(-{{0}} * {{0}})",),
    "sin": ("{g} * cosine({0})",),
    "cos": ("-{g} * sine({0})",),
    "abs": ("select({0} < 0, -{g}, select({0} == 0, V{{}}, {g}))",),
    "relu": ("select({y} <= 0, V{{}}, {g})",),
    "clamp": ("select(({0} < {1}) | ({0} > {2}), V{{}}, {g})",),
    "maximum": (
        "select({0} < {1}, V{{}}, select({0} == {1}, {g} * number<V>(0.5), {g}))",
        "select({1} < {0}, V{{}}, select({0} == {1}, {g} * number<V>(0.5), {g}))",
    ),
    "minimum": (
        "select({1} < {0}, V{{}}, select({0} == {1}, {g} * number<V>(0.5), {g}))",
        "select({0} < {1}, V{{}}, select({0} == {1}, {g} * number<V>(0.5), {g}))",
    ),
    "where": (None, "select({0}, {g}, V{{}})", "select({0}, V{{}}, {g})"),
}

#: Kept for the derivative where that reads them; what else it reads is computed again.
DEAR = frozenset(
    "div reciprocal sqrt rsqrt pow exp expm1 log log1p tanh sigmoid erf sin cos".split()
)
COMPARISONS = frozenset("lt le gt ge eq ne logical_and logical_or logical_not".split())
#: Arguments that are true or false.
FLAG_ARGUMENTS = {
    "where": (0,),
    "logical_and": (0, 1),
    "logical_or": (0, 1),
    "logical_not": (0,),
}
#: Arguments that are constants of the formula.
CONSTANT_ARGUMENTS = {"pow": (1,)}
