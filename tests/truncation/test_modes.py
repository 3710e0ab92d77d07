"""Every truncation and resets, in every kind of network, against the reference."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable
from functools import partial
from random import Random

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastbptt
from calls import Call, Draws, Gates
from common import (
    CELLS,
    Case,
    assert_as_exact,
    assert_matches,
    cotangent,
    once,
    parts,
    tensors_of,
    whole,
)
from fastbptt import TBPTT, Chunked, Sliding

pytestmark = pytest.mark.usefixtures("poisoned")

BOOLS = (False, True)


@once
def expected_of(call: Call):
    """The reference's results."""
    return call.reference()


@once
def peer_of(call: Call):
    """Those that it has in the call's own dtype."""
    return call.reference(call.case.dtype)


# Each mode: a truncation by chance for a sequence of T steps.
def windows(rng: Random, T: int, **options) -> TBPTT:
    k1 = rng.randint(1, T + 1)
    return TBPTT(k1, rng.randint(k1, T + 2), **options)


def draws(rng: Random, **choices: tuple[float, ...]) -> Draws:
    chosen = {name: rng.choice(values) for name, values in choices.items()}
    return Draws((*chosen.items(), ("per_sequence", rng.choice(BOOLS))))


MODES: dict[str, Callable] = {
    "full": lambda rng, T: None,
    "chunked": lambda rng, T: Chunked(rng.randint(1, T + 1)),
    "windows": windows,
    "last": partial(windows, loss="last"),
    "chunks' last": lambda rng, T: TBPTT(k := rng.randint(1, T + 1), k, "last"),
    "sliding": lambda rng, T: Sliding(rng.randint(1, T + 1)),
    "gated": lambda rng, T: Gates(rng.choice(BOOLS), rng.choice((torch.float64, torch.float32))),
    "independent": lambda rng, T: draws(rng, pi=(0.3, 0.8, 1.0)),
    "mean length": lambda rng, T: draws(rng, mean_length=(1.5, 4.0)),
    "power law": lambda rng, T: draws(rng, mean_length=(1.5, 4.0), alpha=(2.5, 6.0)),
}


def random_call(mode: str, seed: int) -> Call:
    rng = Random(f"{mode} {seed}")
    layout = rng.choice(["padded", "padded", "unbatched", "packed", "sorted"])
    B = None if layout == "unbatched" else rng.randint(1, 5)
    T, lengths = rng.randint(1, 9), None
    if layout in ("packed", "sorted"):
        lengths = tuple(rng.randint(1, 9) for _ in range(B))
        lengths = tuple(sorted(lengths, reverse=True)) if layout == "sorted" else lengths
        T = max(lengths)
    truncation = MODES[mode](rng, T)
    overlap = isinstance(truncation, TBPTT | Sliding) and truncation.k1 < truncation.k2
    cell, layers = rng.choice(CELLS), rng.randint(1, 3)
    case = Case(
        T,
        B,
        rng.randint(1, 4),
        rng.randint(2, 5),
        layers,
        bidirectional=not overlap and rng.choice(BOOLS),
        batch_first=rng.choice(BOOLS),
        bias=rng.choice(BOOLS),
        cell=cell,
        proj=rng.choice((0, 1)) if cell == "lstm" else 0,
        hx=rng.choice(BOOLS),
        lengths=lengths,
        seed=seed,
    )
    outputs = ("output", "h_n", "c_n")[: 3 if cell == "lstm" else 2]
    subsets = [s for n in range(1, 4) for s in itertools.combinations(outputs, n)]
    return Call(
        case,
        truncation,
        resets=rng.choice(["none", "none", "some", "some", "by step", "never", "always"]),
        dropout=rng.choice([0.0, 0.3]) if layers > 1 else 0.0,
        recompute=cell in ("gru", "lstm") and rng.choice(BOOLS),
        through=rng.choice([outputs, *subsets]),
    )


SEEDS = range(2000 if os.environ.get("FASTBPTT_TEST_EXPLORE") == "1" else 60)


@pytest.mark.slow(80)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", MODES)
def test_random_calls(mode, seed):
    call = random_call(mode, seed)
    assert_matches(call.ours(), expected_of(call), rtol=1e-10)


# What the division of labour depends on: few rows and many, units that fill no vector, windows
# that overlap much and not at all, gates shared by the batch (segments may run side by side).
POWER_LAW = Draws((("mean_length", 4.0), ("alpha", 4.0), ("per_sequence", True)))
LARGER = [
    Call(Case(9, 13, 6, 33, 2), TBPTT(2, 5)),
    Call(Case(40, 13, 12, 96), TBPTT(8, 24)),
    Call(Case(33, 1, 8, 64, cell="identity"), Sliding(9)),
    Call(Case(12, 3, 2, 7, 3, cell="relu"), Sliding(4), "some"),
    Call(Case(9, 7, 8, 40, 2, cell="gru"), TBPTT(3, 7, "last"), "some", recompute=True),
    Call(Case(10, None, 4, 33, 2, cell="gru"), TBPTT(1, 6, "last"), dropout=0.3),
    Call(Case(64, 2, 5, 20, cell="gru"), Gates()),
    Call(Case(12, 16, 4, 33, 2, True, cell="gru"), POWER_LAW, "some"),
    Call(Case(11, 5, 5, 24, 2, cell="lstm", proj=9, lengths=(4, 11, 7, 7, 1)), TBPTT(2, 6), "some"),
    Call(Case(8, 1, 3, 64, 3, True, cell="lstm"), Gates(per_sequence=True), "some"),
    Call(Case(20, 29, 3, 20, cell="lstm", batch_first=True), Chunked(6), "some", recompute=True),
    Call(Case(64, 3, 5, 17, 2, cell="lstm"), Gates(), dropout=0.3),
    Call(Case(9, 6, 5, 37, 2, True, lengths=(9, 9, 3, 5, 1, 9)), TBPTT(4, 4, "last"), "by step"),
    Call(Case(14, 6, 5, 37, 2, True, batch_first=True), Gates(), "some"),
]
every_larger_call = pytest.mark.parametrize("call", LARGER, ids=str)


@every_larger_call
def test_larger_calls(call, isa, threads):
    assert_matches(call.ours(), expected_of(call), rtol=1e-10)


@pytest.fixture(params=[1, 5000, 100_000], ids="bytes={}".format)
def workspace_limit(request, workspace_limit_restored):
    fastbptt.set_workspace_limit(request.param)
    assert fastbptt.get_workspace_limit() == request.param
    return request.param


@every_larger_call
def test_little_workspace(call, workspace_limit):
    """Windows that do not fit at once are run some after others: the sums are the same."""
    assert_matches(call.ours(), expected_of(call), rtol=1e-10)


@pytest.mark.parametrize("call", [c for c in LARGER if c.case.cell != "relu"], ids=str)
def test_float32_error(call, isa):
    # Not the rectifier: a rounding error at its kink is another derivative.
    call = call.in_dtype(torch.float32)
    assert_as_exact(call.ours(), peer_of(call), expected_of(call))


# As many lanes as rows, and fewer: however a pass is cut, a sum over all rows is as exact.
LONG_SUMS = [Chunked(1), Chunked(4), TBPTT(2, 4), Sliding(3), Draws((("pi", 0.3),))]


@pytest.mark.slow(5)
@pytest.mark.parametrize("cell", ["tanh", "lstm"])
@pytest.mark.parametrize("truncation", LONG_SUMS, ids=str)
def test_float32_error_of_long_sums(truncation, cell):
    of_seeds = []
    for seed in range(3):  # the largest error of a few units is less by luck than that of many
        case = Case(48, 40, 3, 21, cell=cell, hx=False, dtype=torch.float32, seed=seed)
        call = Call(case, truncation)
        of_seeds.append((call.ours(), call.reference(torch.float32), call.reference()))
    stacked = (
        {name: torch.stack([results[name] for results in of_all]) for name in of_all[0]}
        for of_all in zip(*of_seeds, strict=True)
    )
    assert_as_exact(*stacked)


@every_larger_call
def test_same_bits_each_time(call, threads):
    once = call.ours()
    assert_matches(call.ours(), once, rtol=0)
    # Nor do the outputs depend on how the backward pass is cut.
    whole_way = dataclasses.replace(call, truncation=None).ours()
    outputs = [name for name in once if not name.startswith("d")]
    assert_matches({n: whole_way[n] for n in outputs}, {n: once[n] for n in outputs}, rtol=0)


@pytest.mark.parametrize("cell", CELLS)
def test_windows_as_long_as_the_sequence(cell):
    for T, lengths in [(1, None), (7, None), (7, (3, 7, 5))]:
        case = Case(T, 3, 2, 4, 2, cell=cell, lengths=lengths)
        for resets in ("none", "some"):
            full = Call(case, None, resets).ours()
            for k in (T, T + 1, 2**31, 2**62):
                for truncation in (TBPTT(1, k), TBPTT(min(T, 3), k + 3), TBPTT(k, k), Sliding(k)):
                    call = Call(case, truncation, resets)
                    # A window of k2 steps ends with the last loss in it.
                    if T + (truncation.k1 - T % truncation.k1) % truncation.k1 <= truncation.k2:
                        assert_matches(call.ours(), full)


@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
@pytest.mark.parametrize(
    "truncation",
    [TBPTT(2, 3), TBPTT(2, 3, "last"), Sliding(2), TBPTT(2, 2, "last"), Gates(True), POWER_LAW],
    ids=str,
)
def test_gradients_only_where_asked_for(truncation, cell):
    case = Case(5, 3, 2, 4, 2, cell=cell, proj=3 * (cell == "lstm"))
    call = Call(case, truncation, "some")
    full, module = call.ours(), call.module()
    x, hx = case.data()
    states = dict(zip(("dhx", "dcx"), parts(hx), strict=False))
    names = ["d" + name for name, _ in module.named_parameters()]
    for some in [{"dinput"}, {"dhx"}, set(states), *({name} for name in names), {*names, "dinput"}]:
        module.zero_grad()
        leaves = {"dinput": x.clone(), **{name: state.clone() for name, state in states.items()}}
        initial = whole([leaves[name] for name in states])
        leaves |= {"d" + name: p for name, p in module.named_parameters()}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in some)
        made = {"truncation": call.make_truncation(), "resets": call.make_resets()}
        outputs = tensors_of(module(leaves["dinput"], initial, **made))
        torch.autograd.backward(outputs, [cotangent(t, i) for i, t in enumerate(outputs)])
        got = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        assert_matches(got, {name: full[name] for name in some})


@pytest.mark.parametrize("cell", CELLS)
def test_functional(cell):
    """The functions of one layer against the reference's, with and without a batch."""
    truncations = [None, Chunked(2), TBPTT(2, 3), TBPTT(2, 3, "last"), Sliding(3), Gates(True)]
    for B, hx, truncation in itertools.product((None, 3), (False, True), truncations):
        case = Case(7, B, 2, 4, hx=hx, cell=cell, proj=3 * (cell == "lstm"))
        for resets in ("none", "some", "by step"):
            call = Call(case, truncation, resets)
            module = call.module()
            by_hand = (
                call.run(layer_of(namespace, call, module), module)
                for namespace in (fastbptt, fastbptt.reference)
            )
            assert_matches(*by_hand, rtol=1e-10)


def layer_of(namespace, call: Call, module) -> Callable:
    """The namespace's function with the module's weights, called as the module is."""
    weights = {name.removesuffix("_l0"): p for name, p in module.named_parameters()}
    if call.case.cell in ("gru", "lstm"):
        function = getattr(namespace, call.case.cell)
    else:
        function = partial(namespace.rnn, nonlinearity=call.case.cell)

    def layer(x, hx=None):
        options = {"truncation": call.make_truncation(), "resets": call.make_resets()}
        output, last = function(x, whole([state[0] for state in parts(hx)]), **weights, **options)
        return output, whole([state[None] for state in parts(last)])

    return layer


@pytest.mark.parametrize("lengths", [None, (2, 6, 4)], ids=["padded", "packed"])
def test_gates_and_resets_that_are_views(lengths):
    """Transposed, expanded, strided: what they hold counts, not how it lies in memory."""
    case = Case(6, 3, 2, 4, 2, True, cell="lstm", lengths=lengths)
    module, (x, hx) = case.module(), case.data()
    per_sequence = Call(case, Gates(True), "some")
    by_step = Call(case, Gates(), "by step")
    for call in (per_sequence, by_step):
        kappa, resets = call.make_truncation().kappa, call.make_resets()

        def run(gates, resets):
            return module(x, hx, truncation=fastbptt.Gated(gates), resets=resets)

        expected = call.run(lambda *_, k=kappa, r=resets: run(k, r), module)
        wide = [t if t.dim() == 2 else t[:, None].expand(6, 3) for t in (kappa, resets)]
        for view in (
            lambda t: t.T.contiguous().T,
            lambda t: t.repeat_interleave(2, 0)[::2],
            lambda t: t.float() if t.is_floating_point() else t,
        ):
            views = [view(t) for t in wide]
            assert_matches(call.run(lambda *_, v=views: run(*v), module), expected, rtol=0)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize(
    "truncation", [TBPTT(2, 4), TBPTT(2, 4, "last"), Sliding(3), TBPTT(3, 3, "last")], ids=str
)
def test_nan_stays_in_its_window(truncation, value, cell, isa):
    """A loss's gradient of NaN or infinity reaches its window's first step, and none before it."""
    for lengths, H in itertools.product((None, (9, 4, 9)), (5, 33)):
        case = Case(9, 3, 2, H, 2, cell=cell, lengths=lengths)
        module, (x, hx) = case.module(truncation=truncation), case.data()

        def gradient_of(bad_steps, value, x=x, hx=hx, lengths=lengths, module=module):
            padded = pad_packed_sequence(x)[0] if lengths else x
            padded = padded.clone().requires_grad_()
            packed = pack_padded_sequence(padded, lengths, enforce_sorted=False) if lengths else 0
            output, _ = module(packed if lengths else padded, hx)
            output = pad_packed_sequence(output)[0] if lengths else output
            on_output = torch.ones_like(output)
            on_output[bad_steps, 0] = value
            output.backward(on_output)
            return padded.grad

        first = 8 // truncation.k1 * truncation.k1  # of the last window's losses
        begin = first - (truncation.k2 - truncation.k1)
        clean, bad = gradient_of([8], 0.0), gradient_of([8], value)
        assert not bad[8, 0].isfinite().all()
        bad[begin:, 0] = clean[begin:, 0]
        assert_matches({"dinput": bad}, {"dinput": clean})
        if truncation.last_only:  # the other steps' gradients are not looked at
            others = [t for t in range(9) if (t + 1) % truncation.k1 > 0 and t < 8]
            assert_matches({"": gradient_of(others, value)}, {"": gradient_of(others, 1.0)}, rtol=0)
