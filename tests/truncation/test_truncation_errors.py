"""Bad truncations and resets: the exception's type, and a message that names the argument."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from functools import partial

import numpy
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastbptt
from common import Case, assert_matches, step, tensors_of
from fastbptt import TBPTT, Chunked, Gated, Randomized, Sliding

NAN, INF = math.nan, math.inf

# The call, the exception, what the message must hold.
BAD_INTS = [
    (0, ValueError),
    (-3, ValueError),
    (2.0, TypeError),
    (True, TypeError),
    ("4", TypeError),
    (None, TypeError),
    ((4,), TypeError),
    (NAN, TypeError),
    (torch.tensor(2.5), TypeError),
]
BAD_KAPPAS = [
    ([1.0, 0.0], TypeError),
    (0.5, TypeError),
    (None, TypeError),
    (numpy.ones(4), TypeError),
    (torch.ones(4).bool(), TypeError),
    (torch.ones(4).long(), TypeError),
    (torch.ones(4).to(torch.complex64), TypeError),
    (torch.tensor(1.0), ValueError),
    (torch.ones(4, 2, 1), ValueError),
    (torch.ones(4, requires_grad=True), ValueError),
    (torch.tensor([1.0, NAN]), ValueError),
    (torch.tensor([[1.0, INF]]), ValueError),
    (torch.tensor([[1.0, -INF]], dtype=torch.float64), ValueError),
]
BAD_NUMBERS = {
    "pi": [(0, ValueError), (0.0, ValueError), (-0.5, ValueError), (1.5, ValueError)],
    "mean_length": [(1, ValueError), (1.0, ValueError), (-4.0, ValueError), (INF, ValueError)],
    "alpha": [(2, ValueError), (1.5, ValueError), (-3.0, ValueError), (INF, ValueError)],
}
NO_NUMBERS = [(NAN, ValueError), (True, TypeError), ("0.5", TypeError), ((0.5,), TypeError)]
BAD = {
    **{f"Chunked {v!r}": (partial(Chunked, v), e, "Chunked's k .*") for v, e in BAD_INTS},
    **{f"Sliding {v!r}": (partial(Sliding, v), e, "Sliding's tau .*") for v, e in BAD_INTS},
    **{f"TBPTT k1 {v!r}": (partial(TBPTT, v, 4), e, "TBPTT's k1 .*") for v, e in BAD_INTS},
    **{f"TBPTT k2 {v!r}": (partial(TBPTT, 2, v), e, "TBPTT's k2 .*") for v, e in BAD_INTS},
    "TBPTT k2 < k1": (partial(TBPTT, 3, 2), ValueError, "TBPTT's k2 .* 3, got 2"),
    **{
        f"TBPTT loss {v!r}": (partial(TBPTT, 2, 3, v), ValueError, "TBPTT's loss .*")
        for v in ("Last", "", None, 1, True, ["last"])
    },
    **{
        f"Gated {i}": (partial(Gated, v), e, "Gated's kappa must")
        for i, (v, e) in enumerate(BAD_KAPPAS)
    },
    "Randomized neither": (Randomized, ValueError, "pi and mean_length"),
    "Randomized both": (partial(Randomized, 0.5, 4.0), ValueError, "pi and mean_length"),
    **{
        f"Randomized {n} {v!r}": (
            partial(Randomized, **({"mean_length": 4.0} if n == "alpha" else {}), **{n: v}),
            error,
            f"Randomized's {n} must",
        )
        for n, values in BAD_NUMBERS.items()
        for v, error in values + NO_NUMBERS
    },
    "Randomized alpha with pi": (partial(Randomized, pi=0.5, alpha=3.0), ValueError, "alpha"),
    "Randomized alpha alone": (partial(Randomized, alpha=3.0), ValueError, "mean_length"),
    **{
        f"Randomized generator {v!r}": (
            partial(Randomized, 0.5, generator=v),
            TypeError,
            "Randomized's generator must",
        )
        for v in (3, "cpu", torch.Generator)
    },
    **{
        f"Randomized per_sequence {v!r}": (
            partial(Randomized, 0.5, per_sequence=v),
            TypeError,
            "Randomized's per_sequence must",
        )
        for v in (1, None, "yes")
    },
}


@pytest.mark.parametrize("make, error, message", BAD.values(), ids=BAD)
def test_classes(make, error, message):
    with pytest.raises(error, match=message) as caught:
        make()
    assert type(caught.value) is error


TRUNCATIONS = [
    Chunked(4),
    TBPTT(2, 3),
    TBPTT(2, 3, "last"),
    Sliding(3),
    Gated(torch.tensor([1.0, 0.5, 0.0])),
    Randomized(0.5),
    Randomized(mean_length=4, alpha=3, per_sequence=True),
]


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
def test_values(truncation):
    assert isinstance(truncation, fastbptt.truncation.Truncation)
    for field in dataclasses.fields(truncation):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(truncation, field.name, 5)
    for clone in (copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))):
        other = clone(truncation)
        assert type(other) is type(truncation) and repr(other) == repr(truncation)
        if isinstance(truncation, Gated):
            assert torch.equal(other.kappa, truncation.kappa)
        else:
            assert other == truncation and hash(other) == hash(truncation)
    assert all(truncation != other for other in TRUNCATIONS if other is not truncation)
    hash(truncation)
    module = fastbptt.GRU(2, 3, truncation=truncation)
    assert module.truncation is truncation and str(truncation) in repr(module)
    torch.manual_seed(0)
    output, _ = module(torch.randn(3, 2, 2))
    torch.manual_seed(0)
    again, _ = copy.deepcopy(module)(torch.randn(3, 2, 2))
    assert torch.equal(again, output)


def test_integers_and_numbers_of_other_kinds():
    assert Chunked(numpy.int64(3)) == Chunked(3) and type(Chunked(numpy.int64(3)).k) is int
    assert TBPTT(numpy.int32(2), torch.tensor(3)) == TBPTT(2, 3)
    assert Sliding(numpy.uint8(3)) == Sliding(3)
    assert Randomized(numpy.float64(0.5)) == Randomized(0.5)
    assert Randomized(1) == Randomized(1.0)


# At the call. T = 5, B = 2: no shape is right in two ways.
T, B = 5, 2
CLASSES = {cls.__name__: cls for cls in (fastbptt.RNN, fastbptt.GRU, fastbptt.LSTM)}
CELL_OF = {fastbptt.RNN: "tanh", fastbptt.GRU: "gru", fastbptt.LSTM: "lstm"}
every_class = pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
LAYOUTS = {
    "padded": Case(T, B, 3, 4, 2),
    "batch first": Case(T, B, 3, 4, 2, batch_first=True),
    "unbatched": Case(T, None, 3, 4, 2),
    "packed": Case(T, B, 3, 4, 2, lengths=(3, 5)),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
# Shapes that are wrong in every layout, and those that are in one.
WRONG_SHAPES = [(), (T - 1,), (T + 1,), (B,), (0,), (T, B + 1), (T - 1, B), (T, B, 1), (1, T, B)]
WRONG_IN = {
    "padded": [(B, T), (T, 1), (1, B)],
    "batch first": [(T, 1), (1, T)],
    "unbatched": [(T, B), (1, T)],
    "packed": [(B, T), (T, 1), (3 + 5,)],
}


class Completed(TorchDispatchMode):
    """Notes each forward pass of a layer that came to its end."""

    def __init__(self):
        super().__init__()
        self.passes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.passes += "rnn_fwd" in str(function)
        return result


def refuses(case: Case, cls: type, error, message: str, **options) -> None:
    """The call fails before a layer is run or a number drawn, and leaves a module that works."""
    case = dataclasses.replace(case, cell=CELL_OF[cls])
    module = case.module(dropout=0.5)
    x, hx = case.data()
    before = torch.get_rng_state()
    with pytest.raises(error, match=message), Completed() as completed:
        module(x, hx, **options)
    assert completed.passes == 0 and torch.equal(torch.get_rng_state(), before)
    module.eval()
    results = tensors_of(module(x, hx))
    expected = tensors_of(fastbptt.reference.run(module, x, hx))
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b)


@every_class
@every_layout
def test_shape_of_kappa(layout, cls):
    wrong = WRONG_SHAPES + WRONG_IN[layout]
    if layout == "batch first":
        wrong += [(B, T)]  # the gates' time comes first all the same
    for shape in wrong:
        if len(shape) in (1, 2):  # else there is no Gated
            refuses(LAYOUTS[layout], cls, ValueError, "kappa", truncation=Gated(torch.ones(shape)))


@every_class
@every_layout
def test_shape_of_resets(layout, cls):
    wrong = WRONG_SHAPES + WRONG_IN[layout]
    if layout == "batch first":
        wrong = [shape for shape in wrong if shape != (T, B)] + [(T, B)]
    for shape in wrong:
        resets = torch.zeros(shape, dtype=torch.bool)
        refuses(LAYOUTS[layout], cls, ValueError, "resets", resets=resets)


@every_class
@every_layout
def test_type_of_resets(layout, cls):
    resets = torch.zeros(T, dtype=torch.bool)
    dtypes = (torch.float32, torch.float64, torch.int64, torch.uint8)
    for bad in (*(resets.to(dtype) for dtype in dtypes), resets.tolist(), resets.numpy(), 0, True):
        refuses(LAYOUTS[layout], cls, TypeError, "resets", resets=bad)


@every_class
@every_layout
def test_device(layout, cls):
    resets = torch.zeros(T, dtype=torch.bool, device="meta")
    refuses(LAYOUTS[layout], cls, (ValueError, RuntimeError), "resets", resets=resets)


def test_kappa_on_another_device():
    # Whether it is finite cannot be seen there: that, or the call, refuses it.
    with pytest.raises((ValueError, RuntimeError)):
        fastbptt.RNN(3, 4)(torch.zeros(T, B, 3), truncation=Gated(torch.ones(T, device="meta")))


@every_class
@every_layout
def test_windows_that_overlap_in_both_directions(layout, cls):
    case = dataclasses.replace(LAYOUTS[layout], bidirectional=True)
    for truncation in (TBPTT(1, 2), TBPTT(2, 4, "last"), TBPTT(2, 100), Sliding(2)):
        refuses(case, cls, ValueError, "bidirectional", truncation=truncation)
        with pytest.raises(ValueError, match="bidirectional"):
            cls(3, 4, bidirectional=True, truncation=truncation)(torch.zeros(T, B, 3))
    case = dataclasses.replace(case, cell=CELL_OF[cls])
    module = case.module()
    for truncation in (TBPTT(2, 2, "last"), TBPTT(2, 2), Sliding(1)):
        actual = step(module, *case.data(), call=partial(module, truncation=truncation))
        call = partial(fastbptt.reference.run, module, truncation=truncation)
        assert_matches(actual, step(module, *case.data(), call=call))


# Where there is no kernel: torch computes instead, but knows nothing of these.
WANTED = {
    "chunks": ({"truncation": 2}, "truncation"),
    "windows": ({"truncation": TBPTT(2, 3)}, "truncation"),
    "sliding": ({"truncation": Sliding(2)}, "truncation"),
    "gates": ({"truncation": Gated(torch.ones(T))}, "truncation"),
    "random": ({"truncation": Randomized(0.5)}, "truncation"),
    "resets": ({"resets": torch.zeros(T, dtype=torch.bool)}, "resets"),
}
every_wish = pytest.mark.parametrize("options, word", WANTED.values(), ids=WANTED)


@every_wish
@every_class
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("few_kernels")
def test_no_kernel_for_the_dtype(dtype, cls, options, word):
    module = cls(3, 4, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(NotImplementedError, match=f"{word}.*{name}"):
        module(torch.zeros(T, B, 3, dtype=dtype), **options)


@every_wish
@every_class
@pytest.mark.usefixtures("few_kernels")
def test_no_kernel_under_autocast(cls, options, word):
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(NotImplementedError, match=f"{word}.*autocast"):
            cls(3, 4)(torch.zeros(T, B, 3), **options)


FUNCTIONS = {"rnn": 1, "gru": 3, "lstm": 4}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("namespace", [fastbptt, fastbptt.reference], ids=["kernels", "reference"])
def test_functions(namespace, name):
    def call(batch: int | None = B, dtype: torch.dtype = torch.float32, **options):
        shape = (T, 3) if batch is None else (T, batch, 3)
        gates = FUNCTIONS[name] * 4
        weights = torch.zeros(gates, 3, dtype=dtype), torch.zeros(gates, 4, dtype=dtype)
        return getattr(namespace, name)(torch.zeros(shape, dtype=dtype), None, *weights, **options)

    good = torch.zeros(T, dtype=torch.bool)
    call(resets=good, truncation=Gated(torch.ones(T)))
    call(batch=None, resets=good, truncation=Gated(torch.ones(T)))
    for shape in WRONG_SHAPES + WRONG_IN["padded"]:
        with pytest.raises(ValueError, match="resets"):
            call(resets=torch.zeros(shape, dtype=torch.bool))
        if len(shape) in (1, 2):
            with pytest.raises(ValueError, match="kappa"):
                call(truncation=Gated(torch.ones(shape)))
    for shape in WRONG_SHAPES + WRONG_IN["unbatched"]:
        with pytest.raises(ValueError, match="resets"):
            call(batch=None, resets=torch.zeros(shape, dtype=torch.bool))
    for bad in (good.float(), good.long(), good.to(torch.uint8)):
        with pytest.raises(TypeError, match="resets"):
            call(resets=bad)
    if namespace is fastbptt:
        with pytest.raises(TypeError, match="resets"):
            call(resets=good.tolist())
        with pytest.raises((ValueError, RuntimeError), match="resets"):
            call(resets=good.to("meta"))
        for options in ({"resets": good}, {"truncation": Sliding(2)}):
            with pytest.raises(NotImplementedError):
                call(dtype=torch.int64, **options)


def test_keywords_only():
    resets = torch.zeros(T, dtype=torch.bool)
    for cls in CLASSES.values():
        with pytest.raises(TypeError):
            cls(3, 4)(torch.zeros(T, B, 3), None, None, resets)


BAD_DONES = {
    "a list": (([True, False],), TypeError, "dones"),
    "none": ((None,), TypeError, "dones"),
    "a number": ((1,), TypeError, "dones"),
    "complex": ((torch.zeros(T, dtype=torch.complex64),), TypeError, "dones"),
    "no dimension": ((torch.tensor(True),), ValueError, "dones"),
    "three dimensions": ((torch.zeros(T, B, 1),), ValueError, "dones"),
    "initial [T, B]": ((torch.zeros(T, B), torch.zeros(T, B).bool()), ValueError, "initial"),
    "initial [B + 1]": ((torch.zeros(T, B), torch.zeros(B + 1).bool()), ValueError, "initial"),
    "initial [T]": ((torch.zeros(T), torch.zeros(T).bool()), ValueError, "initial"),
    "initial a word": ((torch.zeros(T, B), "yes"), TypeError, "initial"),
}


@pytest.mark.parametrize("arguments, error, word", BAD_DONES.values(), ids=BAD_DONES)
def test_resets_from_dones(arguments, error, word):
    with pytest.raises(error, match=word):
        fastbptt.resets_from_dones(*arguments)


@pytest.mark.parametrize("value, error", [(-1, ValueError), (1.5, TypeError), ("1", TypeError)])
def test_workspace_limit(value, error):
    before = fastbptt.get_workspace_limit()
    with pytest.raises(error):
        fastbptt.set_workspace_limit(value)
    assert fastbptt.get_workspace_limit() == before
