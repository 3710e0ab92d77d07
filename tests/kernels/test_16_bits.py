"""bfloat16 and float16 on the CPU: the error against torch's own, and autocast.

Products and sums are of float32; what is stored is rounded. The rectifier is not here: at its kink
a rounding error is another derivative, and with so few bits it comes near it everywhere.
"""

from __future__ import annotations

import dataclasses
import types
import warnings
from functools import partial

import pytest
import torch

import fastbptt
from calls import Call
from common import (
    SHAPES,
    Case,
    assert_as_exact,
    assert_matches,
    leaf,
    parts,
    referee,
    step,
    tensors_of,
    through_file,
    twin,
    whole,
)
from fastbptt import TBPTT, Sliding
from test_accuracy import check
from test_modes import LARGER, MODES, expected_of, peer_of, random_call

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = (torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_cell = pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])


@pytest.mark.slow(15)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_cell
@every_dtype
def test_error(dtype, cell, shape, isa_of_16_bits):
    case = Case(*shape, cell=cell, dtype=dtype)
    check(case)
    check(case, k=4)


@pytest.mark.parametrize("shape", [(7, 1, 3, 1), (6, 5, 9, 17), (40, 20, 12, 160)], ids=str)
@every_cell
@every_dtype
def test_error_for_any_number_of_threads(dtype, cell, shape, threads):
    check(Case(*shape, cell=cell, dtype=dtype))


@pytest.mark.parametrize("cell, proj", [("tanh", 0), ("gru", 0), ("lstm", 0), ("lstm", 23)])
@every_dtype
def test_error_of_stacks(dtype, cell, proj, isa_of_16_bits):
    case = partial(Case, 9, 5, 6, 40, cell=cell, proj=proj, dtype=dtype)
    check(case(layers=3, bidirectional=True))
    check(case(layers=2, bidirectional=True, lengths=(9, 2, 5, 5, 1)))
    check(case(layers=3, batch_first=True), k=4)


def check_call(call: Call) -> None:
    assert_as_exact(call.ours(), peer_of(call), expected_of(call))


@pytest.mark.parametrize("call", [c for c in LARGER if c.case.cell != "relu"], ids=str)
@every_dtype
def test_error_of_modes(dtype, call, isa_of_16_bits):
    check_call(call.in_dtype(dtype))


@pytest.mark.slow(1)
@pytest.mark.parametrize("mode", MODES)
@every_dtype
def test_error_of_random_calls(dtype, mode, isa_of_16_bits):
    """That of a few numbers is luck, so the mean is compared; and none is far off."""
    errors = []
    for call in (random_call(mode, seed).in_dtype(dtype) for seed in range(40)):
        if call.case.cell == "relu":
            continue
        truth = expected_of(call)
        actual, peer = call.ours(), peer_of(call)
        for name, exact in truth.items():
            ulp = torch.finfo(dtype).eps * exact.abs().max().item() if exact.numel() else 0
            if ulp > 0:
                both = (actual[name], peer[name])
                ours, theirs = ((t.double() - exact).abs().max().item() / ulp for t in both)
                assert ours <= 2 * theirs + 16, f"{call}: {name}: {ours:.2f} ulp, {theirs:.2f}"
                errors.append((ours, theirs))
    ours, theirs = torch.tensor(errors).mean(0).tolist()
    assert ours <= theirs, f"mean {ours:.3f} ulp, {theirs:.3f}"


@every_dtype
def test_windows_in_many_groups(dtype, workspace_limit_restored):
    """A sum over groups is not rounded from one to the next."""
    fastbptt.set_workspace_limit(1)
    for truncation in (TBPTT(1, 4), Sliding(3)):
        check_call(Call(Case(60, 3, 5, 17, 2, cell="gru", dtype=dtype), truncation))


@every_cell
@every_dtype
def test_same_bits_each_time(dtype, cell, isa_of_16_bits, threads):
    case = Case(11, 29, 9, 71, 2, True, cell=cell, dtype=dtype)
    module = case.module(truncation=4)
    first = step(module, *case.data())
    assert_matches(step(module, *case.data()), first, rtol=0)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@every_dtype
def test_gates_computed_again(dtype, cell, isa_of_16_bits):
    case = Case(9, 13, 6, 33, 2, cell=cell, dtype=dtype)
    module = case.module(recompute=True)
    double, call = referee(module)
    truth = step(double, *case.data(), call=call)
    assert_as_exact(step(module, *case.data()), step(twin(module), *case.data()), truth)


def every_number(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


@every_dtype
def test_every_number_passes_through(dtype, isa_of_16_bits):
    """h = 1 x + 0 h: NaN, infinities, zeros' signs aside, and denormal numbers."""
    x = every_number(dtype)
    one, zero = torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    expected = x.clone()
    if isa_of_16_bits.endswith("_bf16") and dtype == torch.bfloat16:  # products flush denormals
        expected[expected.abs() < torch.finfo(dtype).tiny] = 0
    for shape in [(1, x.numel(), 1), (x.numel(), 1, 1)]:  # all rows at once, and one alone
        resets = torch.ones(shape[:2], dtype=torch.bool)  # 0 times infinity would be NaN
        run = partial(fastbptt.rnn, nonlinearity="identity", resets=resets)
        got = run(x.view(shape), None, one, zero)[0].flatten()
        assert torch.equal(got.isnan(), x.isnan())
        assert torch.equal(got[~x.isnan()], expected[~x.isnan()])


@every_dtype
def test_rounds_to_nearest_even(dtype, isa_of_16_bits):
    """One product, exact in float32, is rounded as torch rounds it; many of these are ties."""
    x = every_number(dtype)
    x = x[x.abs().float().log2().abs() < 12]
    for factor in (1.5, 1.25, 1 + 2**-7, -1.75):
        weight, zero = torch.full((1, 1), factor, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
        got = fastbptt.rnn(x.view(1, -1, 1), None, weight, zero, nonlinearity="identity")[0]
        assert torch.equal(got.flatten(), (x.float() * factor).to(dtype))


@every_cell
@every_dtype
def test_no_warning_and_the_dtype_stays(dtype, cell):
    case = Case(6, 3, 4, 5, 2, cell=cell, dtype=dtype)
    module = through_file(case.module(truncation=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = step(module, *case.data())
    assert {t.dtype for t in results.values()} == {dtype}


@every_cell
def test_converted_models(cell):
    """A model that is cast before or after it is converted."""
    case = Case(6, 3, 4, 5, cell=cell, dtype=torch.bfloat16)
    ours = case.module(truncation=4)
    before = fastbptt.convert(torch.nn.Sequential(twin(ours)), truncation=4)[0]
    after = fastbptt.convert(torch.nn.Sequential(twin(ours).float()), truncation=4)[0].bfloat16()
    expected = step(ours, *case.data())
    for module in (before, after):
        assert_matches(step(module, *case.data()), expected, rtol=0)
    with pytest.warns(UserWarning, match="loses its truncation"):
        reverted = fastbptt.revert(torch.nn.Sequential(before))[0]
    assert type(reverted) is type(twin(ours)) and reverted.weight_hh_l0.dtype == torch.bfloat16


# Autocast.

AUTOCAST = {
    "plain": Case(),
    "no hx": Case(hx=False),
    "stacked": Case(layers=2, bidirectional=True),
    "no bias": Case(bias=False),
    "unbatched": Case(B=None),
    "one sequence": Case(B=1, batch_first=True),
    "packed": Case(lengths=(5, 2, 4)),
    "packed, no hx": Case(lengths=(5, 2, 4), hx=False),
}
AUTOCAST = {
    f"{cell}, {name}": dataclasses.replace(case, cell=cell, I=4, H=5, dtype=torch.float32)
    for cell in ("tanh", "gru", "lstm")
    for name, case in AUTOCAST.items()
} | {
    "lstm, projected": Case(cell="lstm", proj=2, dtype=torch.float32),
    "lstm, projected, packed": Case(
        cell="lstm", proj=2, lengths=(5, 2, 4, 1), B=4, dtype=torch.float32
    ),
}


@pytest.mark.parametrize("name", AUTOCAST)
@every_dtype
@pytest.mark.parametrize("given", ["float32", "16-bit input", "16-bit states"])
def test_autocast(given, dtype, name):
    """The dtypes of results and gradients are torch's, and the error at most twice torch's."""
    case = AUTOCAST[name]
    module = case.module()

    def run(module, call=None):
        x, hx = case.data()
        x, input = leaf(x, dtype if given == "16-bit input" else None)
        states = [leaf(s, dtype if given == "16-bit states" else None)[0] for s in parts(hx)]
        module.zero_grad()
        with torch.autocast("cpu", dtype, enabled=call is None):
            tensors = tensors_of((call or module)(input, whole(states)))
        torch.autograd.backward([t.float().sum() for t in tensors])
        results = dict(zip(("output", "h_n", "c_n"), tensors, strict=False))
        results |= {"dinput": x.grad, **{f"dstate {i}": s.grad for i, s in enumerate(states)}}
        return results | {"d" + n: p.grad for n, p in module.named_parameters()}

    actual = run(module)
    try:
        expected = run(twin(module))
    except RuntimeError:  # this processor has no oneDNN primitive for it: see below
        assert {actual[result].dtype for result in ("output", "h_n", "c_n")} == {dtype}
        with torch.backends.mkldnn.flags(enabled=False):
            expected = run(twin(module))
    else:
        for result, value in expected.items():
            assert actual[result].dtype == value.dtype, result
    double, call = referee(module)
    truth = run(double, lambda x, hx: call(widened(x), whole([s.double() for s in parts(hx)])))
    eps = torch.finfo(dtype).eps
    for result, exact in truth.items():
        ours, theirs = ((r[result].double() - exact).abs().max() for r in (actual, expected))
        assert ours <= 2 * theirs + 4 * eps * exact.abs().max(), result


@pytest.fixture
def without_onednn():
    """torch's LSTM runs without oneDNN, as on a processor that lacks its 16-bit primitives."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


@pytest.mark.parametrize("name", [name for name in AUTOCAST if name.startswith("lstm")])
@every_dtype
@pytest.mark.parametrize("given", ["float32", "16-bit input", "16-bit states"])
def test_autocast_without_onednn(without_onednn, given, dtype, name):
    test_autocast(given, dtype, name)


@pytest.mark.parametrize("proj", [0, 2])
@every_dtype
def test_autocast_where_torch_fails(monkeypatch, dtype, proj):
    """Where oneDNN has no primitive in autocast's dtype, ours has one and gives that dtype."""

    def no_primitive(*args):
        raise RuntimeError("could not create a primitive descriptor")

    monkeypatch.setattr(torch.nn.LSTM, "forward", no_primitive)
    support = {
        "_is_mkldnn_bf16_supported": lambda: False,
        "_is_mkldnn_fp16_supported": lambda: False,
    }
    monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace(**support))
    case = Case(cell="lstm", proj=proj, dtype=torch.float32)
    module, (x, hx) = case.module(), case.data()
    with torch.autocast("cpu", dtype):
        results = tensors_of(module(x, hx))
        of_16_bits = tensors_of(module(x.to(dtype), hx))
    wide = [torch.float32] * 3
    assert [t.dtype for t in results] == ([dtype, dtype, torch.float32] if proj else [dtype] * 3)
    assert [t.dtype for t in of_16_bits] == ([dtype, dtype, torch.float32] if proj else wide)
    double, call = referee(module)
    truth = tensors_of(call(x.double(), whole([s.double() for s in parts(hx)])))
    for result, exact in zip(results, truth, strict=True):
        assert (result - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()


def widened(x):
    if isinstance(x, torch.Tensor):
        return x.double()
    return torch.nn.utils.rnn.PackedSequence(x.data.double(), *x[1:])


def test_autocast_leaves_float64():
    case = Case(cell="gru")
    with torch.autocast("cpu", torch.bfloat16):
        inside = step(case.module(), *case.data())
    assert_matches(inside, step(case.module(), *case.data()), rtol=0)


def test_autocast_with_truncation_and_resets():
    case = Case(9, 3, 4, 5, 2, cell="lstm", dtype=torch.float32)
    module, resets = case.module(truncation=3), torch.arange(9) % 4 == 3
    with torch.autocast("cpu", torch.bfloat16):
        actual = step(module, *case.data(), call=partial(module, resets=resets))
    rounded = case.module(truncation=3).bfloat16()
    x, hx = case.data()
    x, hx = x.bfloat16(), whole([s.bfloat16() for s in parts(hx)])
    expected = step(rounded, x, hx, call=partial(rounded, resets=resets))
    for name, value in actual.items():
        assert value.dtype == (torch.float32 if name.startswith("d") else torch.bfloat16), name
    assert_matches({n: t.bfloat16() for n, t in actual.items()}, expected, rtol=0)


@pytest.mark.parametrize("cls", [fastbptt.RNN, fastbptt.GRU, fastbptt.LSTM])
def test_compiled(cls):
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = cls(3, 8, 2, truncation=2)
    x = torch.randn(6, 4, 3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")

    def gradients(call):
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output, _ = call(x)
        output.float().square().sum().backward()
        return {"": output.detach()} | {n: p.grad for n, p in module.named_parameters()}

    assert_matches(gradients(compiled), gradients(module), rtol=0)
    torch._dynamo.reset()
