"""Compiled cells against their programs run step by step by autograd."""

from __future__ import annotations

import warnings

import pytest
import torch

import fastbptt
from cells.programs import CASES, Builder, every_operation, extrema, gru, leaky
from fastbptt import _codegen, _compiled, cells
from fastbptt._compiled import Arguments
from fastbptt._program import Leaf

pytestmark = pytest.mark.usefixtures("compiler")


def compiled(program, recurrent=0, dtype=torch.float64):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = _compiled.layer(program, dtype, "cpu", recurrent)
    assert layer is not None
    return layer


@pytest.fixture(params=["CPU", "kernels"])
def either(request):
    """Layers of the CPU, and of a GPU's kernels, emulated."""
    if request.param == "kernels":
        request.getfixturevalue("kernels")


I = 6
NUMBER = torch.tensor(0.3, dtype=torch.float64)
NORMALIZED = ["layer norm gru", "layer norm lstm", "normalized"]


def arguments(name, T, B, H, dtype=torch.float64, seed=0):
    """x, w_ih, w_hh, b_ih, b_hh, then the initial states and the extras of a case."""
    program, _, kinds = CASES[name]
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, scale=1.0):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return x.to(dtype).requires_grad_()

    G = program.gates
    shapes = {"unit": (H,), "step": (T, B, 1), "unit and step": (T, B, H)}
    return Arguments(
        random(T, B, I),
        random(G * H, I, scale=0.4),
        random(G * H, H, scale=H**-0.5),
        random(G * H, scale=0.3),
        random(G * H, scale=0.1),
        [random(B, H) for _ in range(program.states)],
        [NUMBER if kind == "number" else random(*shapes[kind], scale=0.4) for kind in kinds],
    )


def step_by_step(program, recurrent, of, lengths=None, kappa=None):
    """Every state after every step, [T, B, H], and the last ones, by autograd.

    Zeros stand beyond the end of a sequence.
    """
    T, B, _ = of.x.shape
    pre = of.x @ of.w_ih.T + (0 if of.b_ih is None else of.b_ih)
    states = list(of.initial)
    collected = [[None] * T for _ in states]
    for t in range(T)[:: of.direction]:
        cut = t if of.direction > 0 else t + 1  # the boundary before this step
        if cut < T:
            if of.resets is not None:
                states = [h.masked_fill(of.resets[cut][:, None], 0) for h in states]
            if kappa is not None:
                factor = kappa[cut][:, None]
                states = [h.detach() + factor * (h - h.detach()) for h in states]
        rec = states[recurrent] @ of.w_hh.T + (0 if of.b_hh is None else of.b_hh)
        values = {}
        for g, (p, r) in enumerate(
            zip(pre[t].chunk(program.gates, -1), rec.chunk(program.gates, -1), strict=True)
        ):
            values[Leaf("pre", g)], values[Leaf("rec", g)] = p, r
        for k, h in enumerate(states):
            values[Leaf("state", k)] = h
        for name, extra in zip(program.extras, of.extras, strict=True):
            values[Leaf("extra", name)] = extra[t] if extra.dim() == 3 else extra
        after = program.evaluate(values)
        if lengths is not None:
            alive = (t < lengths)[:, None]
            states = [torch.where(alive, new, old) for new, old in zip(after, states, strict=True)]
            after = [torch.where(alive, new, 0.0) for new in after]
        else:
            states = after
        for k, h in enumerate(after):
            collected[k][t] = h
    return [torch.stack(rows) for rows in collected], states


class Recurrence(torch.autograd.Function):
    """A compiled recurrence as autograd's: states and last states of the arguments."""

    @staticmethod
    def forward(ctx, layer, of, kappa, *tensors):
        own = dict(zip(tensor_places(of), tensors, strict=True))
        of = of._replace(
            **{name: own[name] for name in of._fields[:5] if name in own},
            **{
                name: [own.get((name, i), x) for i, x in enumerate(getattr(of, name))]
                for name in ("initial", "extras")
            },
        )
        states, last, kept = layer.forward(of)
        ctx.own = layer, of, kappa, states, kept
        return *states, *last

    @staticmethod
    def backward(ctx, *grads):
        layer, of, kappa, states, kept = ctx.own
        count = len(states)
        found = layer.backward(of, states, kept, grads[:count], grads[count:], kappa)
        gradients = {name: getattr(found, name) for name in found._fields[:5]}
        gradients |= {("initial", i): d for i, d in enumerate(found.initial)}
        for i, (extra, d) in enumerate(zip(of.extras, found.extras, strict=True)):
            if extra.dim() > 0:
                gradients["extras", i] = d.sum_to_size(extra.shape)
        return None, None, None, *(gradients[place] for place in tensor_places(of))


def tensor_places(of):
    """The names of the arguments that are tensors, numbers aside."""
    return [
        *(name for name in of._fields[:5] if getattr(of, name) is not None),
        *(("initial", i) for i, h in enumerate(of.initial) if h is not None),
        *(("extras", i) for i, x in enumerate(of.extras) if x.dim() > 0),
    ]


def leaves_of(of):
    places = tensor_places(of)
    return [getattr(of, p) if isinstance(p, str) else getattr(of, p[0])[p[1]] for p in places]


def run(layer, of, kappa=None):
    if not layer.program.uses("rec"):
        of = of._replace(w_hh=None, b_hh=None)
    return Recurrence.apply(layer, of, kappa, *leaves_of(of))


def gradients(results, leaves, seed=1):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(h.shape, generator=generator, dtype=torch.float64) for h in results]
    loss = sum((h * w.to(h.dtype)).sum() for h, w in zip(results, weights, strict=True))
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def check(name, T, B, H, lengths=None, kappa=None, **options):
    program, recurrent, _ = CASES[name]
    of = arguments(name, T, B, H)._replace(**options)
    alive = torch.ones(T, B, dtype=torch.bool)
    if lengths is not None:
        alive = torch.arange(T)[:, None] < lengths
        if of.resets is not None:
            of = of._replace(resets=of.resets & alive)
        kappa = None if kappa is None else torch.where(alive, kappa, 1.0)
    expected, last = step_by_step(program, recurrent, of, lengths, kappa)
    given = of
    if lengths is not None:

        def rows(x):
            return x[alive] if isinstance(x, torch.Tensor) and x.dim() > 1 else x

        expected, kappa = [rows(h) for h in expected], rows(kappa)
        given = of._replace(
            x=rows(of.x),
            extras=[x[alive] if x.dim() == 3 else x for x in of.extras],
            resets=rows(of.resets),
            batch_sizes=alive.sum(1),
        )
    expected = [*expected, *last]
    results = run(compiled(program, recurrent), given, kappa)
    for h, right in zip(results, expected, strict=True):
        torch.testing.assert_close(h, right, rtol=1e-11, atol=1e-11)
    found = gradients(results, leaves_of(of))
    for d, right in zip(found, gradients(expected, leaves_of(of)), strict=True):
        torch.testing.assert_close(d, right, rtol=1e-9, atol=1e-9 * max(1.0, right.abs().max()))


@pytest.mark.slow(6)
@pytest.mark.parametrize("name", CASES)
def test_equals_its_program(name, either):
    check(name, T=7, B=3, H=13)


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1, 8), (4, 9, 33), (3, 40, 70)])
@pytest.mark.parametrize("name", ["gru", "three states", "normalized", "twice"])
def test_shapes(name, shape, either):
    check(name, *shape)


@pytest.mark.parametrize("name", ["lstm", "every operation"])
def test_each_instruction_set(name, isa):
    check(name, 9, 5, 21)


def test_many_gates_of_many_rows(either):
    check("many gates", 3, 150, 9)


@pytest.mark.slow(6)
@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("B", [1, 4])
@pytest.mark.parametrize("name", ["leaky by unit", "lstm", "three states", *NORMALIZED])
def test_resets_and_gates(name, B, direction, either):
    """With one sequence, what resets and closed gates cut apart is run side by side."""
    T = 30
    generator = torch.Generator().manual_seed(3)
    resets = torch.rand(T, B, generator=generator) < 0.2
    resets[0, 0] = True
    kappa = torch.rand(T, B, generator=generator, dtype=torch.float64) * 2
    windows = kappa.clone()
    windows[::5] = 0
    check(name, T, B, 11, kappa=kappa, resets=resets, direction=direction)
    check(name, T, B, 11, kappa=windows, resets=resets, direction=direction)
    check(name, T, B, 11, kappa=windows, direction=direction)
    check(name, T, B, 11, resets=resets, direction=direction)
    check(name, T, B, 11, direction=direction)


@pytest.mark.slow(10)
@pytest.mark.parametrize("name", ["leaky by unit", "gru", "three states", "masked", *NORMALIZED])
@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("bounded", [False, True], ids=["open", "bounded"])
def test_packed_in_several_blocks(name, direction, bounded, either):
    lengths = torch.tensor([40, 40, 33, 33, 12, 12, 12, 12, 3, 1])
    T, B, options = 40, len(lengths), {}
    if bounded:
        generator = torch.Generator().manual_seed(5)
        options["resets"] = torch.rand(T, B, generator=generator) < 0.1
        options["kappa"] = torch.randint(3, (T, B), generator=generator).double() / 2
    check(name, T, B, 19, lengths=lengths, direction=direction, **options)
    check(name, T, B, 19, direction=direction, **options)


def test_without_biases(either):
    check("gru", 5, 3, 9, b_ih=None, b_hh=None)


def test_only_wanted_gradients(either):
    program, _, _ = CASES["leaky by unit"]
    of = arguments("leaky by unit", 9, 3, 7)
    of = of._replace(
        **{name: getattr(of, name).detach() for name in of._fields[:5]},
        initial=[of.initial[0].detach()],
        extras=[of.extras[0].detach()],
    )
    layer = compiled(program)
    states, last, kept = layer.forward(of)
    assert layer.forward(of, keep=False)[2] == (None, None)
    grads = [torch.ones_like(states[0])], [torch.ones_like(last[0])]
    every = layer.backward(of, states, kept, *grads)
    flat = [*every[:5], *every.initial, *every.extras]
    for i in range(len(flat)):
        wants = [j == i for j in range(len(flat))]
        wanted = every._replace(
            **dict(zip(every._fields[:5], wants, strict=False)),
            initial=wants[5:6],
            extras=wants[6:],
        )
        found = layer.backward(of, states, kept, *grads, wanted=wanted)
        found = [*found[:5], *found.initial, *found.extras]
        assert [d is not None for d in found] == wants
        assert torch.equal(found[i], flat[i])


@pytest.mark.slow(3)
@pytest.mark.parametrize("name", ["leaky", "gru", "lstm", "every operation", *NORMALIZED])
def test_float32(name, either):
    """Its error is at most twice that of the program's own steps."""
    program, recurrent, _ = CASES[name]

    def all_of(dtype, results_of):
        of = arguments(name, 12, 5, 37, dtype)
        results = results_of(of)
        return [*results, *gradients(results, leaves_of(of))]

    def by_steps(of):
        states, last = step_by_step(program, recurrent, of)
        return [*states, *last]

    exact = all_of(torch.float64, by_steps)
    own = all_of(torch.float32, by_steps)
    layer = compiled(program, recurrent, torch.float32)
    found = all_of(torch.float32, lambda of: run(layer, of))
    for x, peer, right in zip(found, own, exact, strict=True):
        scale = right.abs().max()
        error, peers = ((y.double() - right).abs().max() for y in (x, peer))
        assert error <= 2 * peers + 1e-6 * scale


@pytest.mark.parametrize("name", ["leaky by unit", "masked", "normalized"])
def test_gradcheck(name, either):
    program, recurrent, _ = CASES[name]
    of = arguments(name, 4, 2, 3)
    layer = compiled(program, recurrent)
    assert torch.autograd.gradcheck(
        lambda *tensors: Recurrence.apply(layer, of, None, *tensors), leaves_of(of)
    )


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(20, 6, 130), (120, 1, 200)], ids=["lanes", "units"])
@pytest.mark.parametrize("name", ["gru", "three states", *NORMALIZED])
def test_threads_and_repeats(name, shape, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check(name, *shape)
        program, recurrent, _ = CASES[name]
        of = arguments(name, *shape)
        layer = compiled(program, recurrent)

        def once():
            results = run(layer, of)
            return [*results, *gradients(results, leaves_of(of))]

        first = once()
        for _ in range(3):
            assert all(map(torch.equal, first, once()))
    finally:
        torch.set_num_threads(before)


def test_extremes(either):
    """Infinity, NaN and numbers near overflow, as torch has them."""
    program, _, _ = CASES["every operation"]
    layer = compiled(program)
    values = torch.tensor(
        [
            0.0,
            -0.0,
            1e-300,
            1.0,
            -1.0,
            700.0,
            1500.0,
            -1500.0,
            float("inf"),
            float("-inf"),
            float("nan"),
        ],
        dtype=torch.float64,
    )
    H = len(values)
    zeros = torch.zeros(1, H, dtype=torch.float64)
    of = Arguments(zeros[:, :1, None].exp(), values[:, None], zeros.T @ zeros, None, None, [zeros])
    (states,), _, _ = layer.forward(of)
    torch.testing.assert_close(
        states, step_by_step(program, 0, of)[0][0], rtol=1e-12, atol=1e-12, equal_nan=True
    )


def test_ties(either):
    """Derivatives where two branches meet are torch's."""
    values = torch.tensor([-1.0, -0.5, -0.0, 0.0, 0.5, 1.0], dtype=torch.float64)
    H = len(values)
    of = Arguments(
        torch.ones(1, 1, 1, dtype=torch.float64),
        values[:, None].requires_grad_(),
        torch.zeros(H, H, dtype=torch.float64),
        None,
        None,
        [torch.zeros(1, H, dtype=torch.float64, requires_grad=True)],
    )
    for program in (every_operation(), extrema()):
        results = run(compiled(program), of)
        states, last = step_by_step(program, 0, of)
        leaves = [of.w_ih, *of.initial]
        for d, right in zip(
            gradients(results, leaves), gradients([*states, *last], leaves), strict=True
        ):
            torch.testing.assert_close(d, right, rtol=1e-12, atol=1e-12)


def test_poisoned_states_do_not_pass_a_reset(either):
    program, _, _ = CASES["lstm"]
    layer = compiled(program)
    of = arguments("lstm", 4, 2, 5)
    with torch.no_grad():
        of.x[1, 0] = float("nan")
    resets = torch.zeros(4, 2, dtype=torch.bool)
    resets[2] = True
    of = of._replace(resets=resets)
    with torch.no_grad():
        states, last, kept = layer.forward(of)
        assert all(h[2:].isfinite().all() and h[1, 0].isnan().any() for h in states)
        d_x = layer.backward(of, states, kept, [torch.ones_like(h) for h in states]).x
    assert d_x[2:].isfinite().all() and d_x[:, 1].isfinite().all()


@pytest.mark.parametrize("direction", [1, -1])
def test_infinite_gradients_do_not_pass_a_closed_gate(direction, either):
    program, _, _ = CASES["lstm"]
    layer = compiled(program)
    of = arguments("lstm", 5, 2, 5)._replace(direction=direction)
    kappa = torch.ones(5, 2, dtype=torch.float64)
    kappa[2] = 0
    after, before = (slice(2, 5), slice(0, 2))[::direction]
    with torch.no_grad():
        states, _, kept = layer.forward(of)
        grads = [torch.ones_like(h) for h in states]
        for d, value in zip(grads, (float("inf"), float("nan")), strict=True):
            d[after, 0] = value
        d_x = layer.backward(of, states, kept, grads, kappa=kappa).x
    assert d_x[before].isfinite().all() and d_x[:, 1].isfinite().all()
    assert not d_x[after, 0].isfinite().any()


def test_another_instruction_set_than_the_forward_passs():
    isas = [isa for isa in fastbptt._C.cpu_isas() if not isa.endswith("_bf16")]
    if len(isas) < 2:
        pytest.skip("there is one instruction set")
    before = fastbptt._C.cpu_isa()
    try:
        fastbptt._C.set_cpu_isa(isas[0])
        states, _ = run(compiled(leaky()), of := arguments("leaky", 3, 2, 5))
        fastbptt._C.set_cpu_isa(isas[1])
        with pytest.raises(RuntimeError, match=f"it was {isas[0]}.*and is {isas[1]} now"):
            torch.autograd.grad(states.sum(), of.x)
    finally:
        fastbptt._C.set_cpu_isa(before)


def test_wrong_shape_of_an_extra(either):
    of = arguments("leaky", 3, 2, 5)._replace(extras=[torch.zeros(4).double()])
    with pytest.raises(ValueError, match=r"alpha must be a number, \[5\].*got \[4\]"):
        compiled(leaky()).forward(of)


def test_other_dtypes_and_devices_have_none():
    assert not _compiled.available(leaky(), torch.bfloat16)
    assert not _compiled.available(leaky(), torch.float32, "meta")


def test_cells_with_too_many_gates_have_none():
    b = Builder(_compiled.MOST_GATES + 1, 1)
    program = b.program(b.gate(0))
    with pytest.warns(RuntimeWarning, match="has 129 gates, and kernels at most 128"):
        assert not _compiled.available(program, torch.float32)


def test_values_kept():
    """As few as the hand-written kernels, in the place of the gates where they fit there."""
    shapes = {name: _codegen.shape_of(case[0]) for name, case in CASES.items()}
    found = {name: (shape.kept, shape.fits_pre) for name, shape in shapes.items()}
    assert found["elman"] == (0, True)  # tanh is the state
    assert found["leaky"] == (1, True)
    assert found["gru"] == (4, False)  # r, z, n and W_hh's part of n
    assert found["lstm"] == (4, True)
    assert found["independent"] == (0, True)


def test_phases_of_normalized_cells():
    """Normalized values are kept where they cannot be made of a gate or state that is in memory."""
    found = _codegen.shape_of(CASES["layer norm gru"][0])
    assert (found.phases, found.kept, found.slots) == (2, 6, 6)  # W_hh's part, and r, z and n
    assert found.reads_pre and not found.fits_pre
    assert [norm[:3] for norm in found.norms] == [(1, 0, 3), (1, 3, 3)]
    found = _codegen.shape_of(CASES["layer norm lstm"][0])
    assert (found.phases, found.kept) == (3, 9)  # as well the tanh of c, but not c
    assert [norm[:3] for norm in found.norms] == [(1, 0, 4), (1, 4, 4), (2, 8, 1)]
    found = _codegen.shape_of(cells.dreamer_gru.program)
    assert (found.phases, found.kept, found.columns.first_recurrent) == (2, 6, 0)
    assert _codegen.shape_of(gru()).norms == () and _codegen.shape_of(gru()).phases == 1


def test_gates_whose_gradients_are_the_same_share_them():
    shapes = {name: _codegen.shape_of(case[0]) for name, case in CASES.items()}
    assert shapes["lstm"].columns == ([0, 1, 2, 3], [0, 1, 2, 3], 0)
    assert shapes["gru"].columns == ([2, 0, 1], [0, 1, 2], 1)


def test_source_depends_on_everything_it_should():
    sources = {
        _codegen.write_library(program, recurrent, dtype, isa)
        for program, recurrent in ((leaky(), 0), (gru(), 0))
        for dtype in (torch.float32, torch.float64)
        for isa in _codegen.INSTRUCTION_SETS
    }
    assert len(sources) == 2 * 2 * len(_codegen.INSTRUCTION_SETS)
