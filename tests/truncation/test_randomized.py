"""Randomized truncation: what is drawn, and that its mean gradient is the whole one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import fastbptt
from common import Case, Results, assert_matches, parts, step, whole
from fastbptt import Chunked, Gated, Randomized

# Every test draws from its own seeded generator, so it finds today what it found yesterday. The
# bounds are 4 standard errors: with a right program and another seed, a mean of normal distribution
# is further off once in 16,000 times, so one of the about 2,000 numbers below once in 8 runs.
BOUND = 4.0

KINDS = {
    "independent": {"pi": 0.75},
    "mean length": {"mean_length": 4.0},
    "power law": {"mean_length": 4.0, "alpha": 5.0},
}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
every_scope = pytest.mark.parametrize("per_sequence", [False, True])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cut_probability(options: dict[str, float], since: int) -> float:
    """Of the gate that is ``since`` steps after the last cut (or after the beginning)."""
    if "pi" in options:
        return 1 - options["pi"]
    length, alpha = options["mean_length"], options.get("alpha")
    if alpha is None:
        return 1 / length
    return (alpha - 1) / ((alpha - 2) * length + since)


# The draw.


@every_kind
@every_scope
def test_gates_are_zero_or_the_inverse_probability(options, per_sequence):
    truncation = Randomized(**options, per_sequence=per_sequence, generator=seeded(0))
    assert truncation.last is None
    gates = truncation.draw(300, 5)
    assert isinstance(gates, Gated) and truncation.last is gates
    assert gates.kappa.shape == ((300, 5) if per_sequence else (300,))
    for column in gates.kappa.view(300, -1).T.tolist():
        assert column[0] == 1, "nothing is cut where a sequence begins"
        last_cut = 0
        for t in range(1, 300):
            if column[t] == 0:
                last_cut = t
            else:
                passes = 1 - cut_probability(options, t - last_cut)
                assert math.isclose(column[t], 1 / passes, rel_tol=1e-12)
    if per_sequence:
        assert not gates.kappa[:, 0].equal(gates.kappa[:, 1]), "each by itself"


@every_kind
def test_lengths_of_segments(options):
    """The mean length is the one asked for, and as many are longer than d as should be."""
    truncation = Randomized(**options, generator=seeded(1))
    cuts = torch.cat([torch.tensor([0]), (truncation.draw(200_000).kappa == 0).nonzero()[:, 0]])
    lengths = cuts.diff().double()
    asked_for = options.get("mean_length", 1 / (1 - options.get("pi", 0)))
    assert_mean(lengths, asked_for)
    longer = 1.0
    for d in range(1, 13):
        longer *= 1 - cut_probability(options, d)
        assert_mean((lengths > d).double(), longer)


@every_kind
def test_the_mean_of_every_product_of_gates_is_one(options):
    kappa = Randomized(**options, generator=seeded(2), per_sequence=True).draw(10, 200_000).kappa
    for begin in range(1, 10):
        products = kappa[begin:].cumprod(0)
        for product in products:
            assert_mean(product, 1.0)


@every_kind
def test_the_variance_of_a_gradient_grows_as_the_docs_say(options):
    """Of the gradient over a lag, in a net that itself neither shrinks nor stretches it.

    A product of gates is 0 or 1 / p, with the probability p of no cut: its second moment is 1 / p.
    """
    net = fastbptt.RNN(1, 1, nonlinearity="identity", bias=False, dtype=torch.float64)
    with torch.no_grad():
        for weight in net.parameters():
            weight.fill_(1)
    truncation = Randomized(**options, generator=seeded(9), per_sequence=True)
    for lag in (1, 4, 12):
        x = torch.zeros(lag + 1, 50_000, 1, dtype=torch.float64, requires_grad=True)
        output, _ = net(x, truncation=truncation)
        (gradient,) = torch.autograd.grad(output[-1].sum(), x)
        passes = math.prod(1 - cut_probability(options, d) for d in range(1, lag + 1))
        assert_mean(gradient[0, :, 0].square(), 1 / passes)
        length = options.get("mean_length", 1 / (1 - options.get("pi", 0)))
        of_docs = (1 - 1 / length) ** -lag
        if alpha := options.get("alpha"):
            begin = (alpha - 2) * length
            of_docs = math.prod((begin + d) / (begin + d - alpha + 1) for d in range(1, lag + 1))
        assert math.isclose(1 / passes, of_docs, rel_tol=1e-9)


def assert_mean(values: Tensor, expected: float) -> None:
    error = (values.mean() - expected).abs().item()
    assert error <= BOUND * values.std().item() / len(values) ** 0.5


def test_always_or_never():
    assert Randomized(1.0).draw(50).kappa.eq(1).all()
    assert Randomized(1, per_sequence=True).draw(50, 3).kappa.eq(1).all()
    kappa = Randomized(1e-9, generator=seeded(0)).draw(50).kappa
    assert kappa[0] == 1 and kappa[1:].eq(0).all()
    for options in KINDS.values():
        assert Randomized(**options).draw(1).kappa.tolist() == [1.0]


@every_kind
@every_scope
def test_the_draw_is_the_seed_s_alone(options, per_sequence, threads):
    draws = []
    for count in (threads, 1):
        torch.set_num_threads(count)  # the fixture sets it back
        generator = seeded(3)
        truncation = Randomized(**options, generator=generator, per_sequence=per_sequence)
        draws.append([truncation.draw(70, 9).kappa for _ in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))
    first, second, third = draws[0]
    assert not first.equal(second) and not second.equal(third), "each draw is another"

    # Without a generator it is torch's own, which one with a generator leaves alone.
    truncation = Randomized(**options, per_sequence=per_sequence)
    torch.manual_seed(5)
    once = truncation.draw(70, 9).kappa
    torch.manual_seed(5)
    Randomized(**options, generator=seeded(0)).draw(70, 9)
    assert truncation.draw(70, 9).kappa.equal(once)


def test_what_draw_takes():
    truncation = Randomized(0.5, per_sequence=True)
    with pytest.raises(ValueError, match="steps"):
        truncation.draw(0)
    with pytest.raises(TypeError, match="steps"):
        truncation.draw(2.5)
    assert truncation.draw(4).kappa.shape == (4, 1)
    assert truncation.draw(4, 0).kappa.shape == (4, 0)


# The call.


@every_kind
@every_scope
@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
def test_the_last_draw_again_gives_the_same_bits(cell, options, per_sequence, threads):
    truncation = Randomized(**options, generator=seeded(4), per_sequence=per_sequence)
    for lengths in (None, (9, 3, 5, 9)):
        case = Case(9, 4, 3, 6, 2, True, cell=cell, lengths=lengths)
        module = case.module(truncation=truncation)
        once = step(module, *case.data())
        gates = truncation.last
        for again in (gates, Gated(gates.kappa.clone())):
            module.truncation = again
            assert_matches(step(module, *case.data()), once, rtol=0)
        module.truncation = truncation
        other = step(module, *case.data())  # draws anew
        assert truncation.last is not gates and not truncation.last.kappa.equal(gates.kappa)
        assert not other["dinput"].equal(once["dinput"])


def test_a_draw_is_its_call_s():
    """Two calls before the backward passes, through one truncation: each keeps its own gates."""
    case = Case(9, 4, 3, 6)
    truncation = Randomized(0.5, generator=seeded(5))
    module, (x, hx) = case.module(truncation=truncation), case.data()
    calls, gates = [], []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        calls.append((leaf, module(leaf, hx)[0].sum()))
        gates.append(truncation.last)
    for (leaf, loss), its in zip(calls, gates, strict=True):
        (expected,) = torch.autograd.grad(module(leaf, hx, truncation=its)[0].sum(), leaf)
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], expected)
    assert not gates[0].kappa.equal(gates[1].kappa)


def test_outputs_do_not_depend_on_the_draw():
    case = Case(9, 4, 3, 6, 2, True, cell="lstm")
    module, truncation = case.module(), Randomized(0.5, generator=seeded(6))
    expected = module(*case.data())
    actual = module(*case.data(), truncation=truncation)
    flat = [(output, *parts(last)) for output, last in (expected, actual)]
    assert all(torch.equal(a, b) for a, b in zip(*flat, strict=True))


# The mean gradient. A draw is one sequence's, so draws may lie side by side on the batch axis: a
# batch of the same sequence gives the sum of the gradients of as many draws. Its mean is one
# sample of what follows; the standard error comes from the spread of the samples.

T = 12


def network(cell: str) -> tuple[torch.nn.RNNBase, Tensor, tuple[Tensor, ...]]:
    """One that remembers: gradients of the last steps are as large in the first ones."""
    case = Case(T, 1, 2, 3, 1, cell=cell, seed=1)
    module, (x, hx) = case.module(), case.data()
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name == "weight_hh_l0" and cell == "tanh":
                p.copy_(torch.linalg.qr(p)[0])
            elif name == "bias_ih_l0" and cell == "gru":
                p[3:6] += 2  # z, which keeps the state
            elif name == "bias_ih_l0" and cell == "lstm":
                p[3:6] += 2  # f, which keeps c
    return module, 0.3 * x, tuple(0.3 * state for state in parts(hx))


def mean_gradient(module, x: Tensor, states: tuple[Tensor, ...], truncation, draws=1) -> Results:
    """The mean over a batch of ``draws`` times the same sequence."""
    data = x.expand(T, draws, -1).clone().requires_grad_()
    initial = [state.expand(-1, draws, -1).clone().requires_grad_() for state in states]
    module.zero_grad()
    output, _ = module(data, whole(initial), truncation=truncation)
    weight = torch.arange(1.0, 1 + output.size(-1), dtype=output.dtype)
    ((output[-1] + output[T // 2]).square() * weight).sum().backward()
    grads = {"dinput": data.grad.mean(1)}
    grads |= {f"dhx {i}": state.grad.mean(1) for i, state in enumerate(initial)}
    return grads | {name: p.grad / draws for name, p in module.named_parameters()}


@pytest.mark.slow(2)
@every_kind
@pytest.mark.parametrize(
    "cell, calls, draws, per_sequence",
    [
        ("tanh", 256, 128, True),
        ("gru", 256, 128, True),
        ("lstm", 256, 128, True),
        ("tanh", 4000, 1, False),  # gates that a whole batch shares, a call for each draw
    ],
)
def test_unbiased(cell, calls, draws, per_sequence, options):
    """Each element's mean is within 4 standard errors of full backpropagation's; chunks' is not."""
    module, x, states = network(cell)
    truncation = Randomized(**options, generator=seeded(7), per_sequence=per_sequence)
    samples = [mean_gradient(module, x, states, truncation, draws) for _ in range(calls)]
    full = mean_gradient(module, x, states, None)
    chunked = mean_gradient(module, x, states, Chunked(4))  # as long as the mean segment
    for name, expected in full.items():
        of_all = torch.stack([sample[name] for sample in samples])
        mean, error = of_all.mean(0), of_all.std(0) / calls**0.5
        # The last step's own gradient is never gated: no spread, and the error is rounding.
        off = (mean - expected).abs() - 1e-9 * expected.abs().max()
        worst = (off / error.clamp(min=1e-30)).max().item()
        assert (off <= BOUND * error).all(), f"{name}: {worst:.2f} standard errors off"

        # Of a block, the distance from the truth against the expected distance of the mean.
        bias = ((chunked[name] - expected).norm() / error.norm()).item()
        assert bias > 3 * BOUND, f"{name}: chunks' bias is only {bias:.1f} standard errors"


@pytest.mark.slow(1)
@every_scope
def test_unbiased_through_a_stack_and_packed_sequences(per_sequence):
    """Two layers share the gates, so the mean is right there too; a sequence has its own column."""
    case = Case(6, 3, 2, 3, 2, cell="gru", lengths=(6, 3, 5))
    truncation = Randomized(0.7, generator=seeded(8), per_sequence=per_sequence)
    module = case.module(truncation=truncation)
    samples = [step(module, *case.data()) for _ in range(2000)]
    module.truncation = None
    for name, expected in step(module, *case.data()).items():
        of_all = torch.stack([sample[name] for sample in samples])
        error = of_all.std(0) / len(samples) ** 0.5
        off = (of_all.mean(0) - expected).abs() - 1e-9 * expected.abs().max()
        assert (off <= BOUND * error).all(), name


def test_by_enumeration():
    """Without chance: the gradients of all 2^5 patterns of gates, each times its probability."""
    case = Case(6, 2, 3, 4, 2, cell="lstm")
    module, pi = case.module(), 0.7
    mean: Results = {}
    for passes in itertools.product((False, True), repeat=case.T - 1):
        kappa = torch.tensor([1.0, *(1 / pi if it else 0.0 for it in passes)], dtype=torch.float64)
        module.truncation = Gated(kappa)
        probability = math.prod(pi if it else 1 - pi for it in passes)
        for name, value in step(module, *case.data()).items():
            mean[name] = mean.get(name, 0) + probability * value
    module.truncation = None
    assert_matches(mean, step(module, *case.data()))
