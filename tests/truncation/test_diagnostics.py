"""How far back gradients reach: against brute force, known decays, and what is left alone."""

import math
import sys
from dataclasses import replace

import matplotlib
import pytest
import torch

import fastbptt
from common import CELLS, Case, parts, python, twin, whole
from fastbptt.diagnostics import lag_norms, plot_lag_norms, suggest_truncation

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the line above has to come first)

KINDS = [*((cell, 0) for cell in CELLS), ("lstm", 3)]  # every cell, and a projection
every_kind = pytest.mark.parametrize("cell, proj", KINDS, ids=str)


def square(output):
    return (output - 2).square().sum()  # no unit's gradient is 0, a dead one's neither


def powers(a, count):
    return torch.tensor([a**k for k in range(count)], dtype=torch.float64)


def brute_force(case, loss_fn, max_lag, resets=None):
    """The definition: the network is run on from every state in turn, a leaf, step by step.

    resets: [T, B] or None.
    """
    module = case.module().requires_grad_(False)
    net = twin(module).requires_grad_(False) if case.cell != "identity" else module
    net.batch_first = False
    x, hx = case.data()
    if case.B is None:
        x, hx = x.unsqueeze(1), whole([state.unsqueeze(1) for state in parts(hx)])
    elif case.batch_first:
        x = x.transpose(0, 1)
    if hx is None:
        sizes = [case.proj or case.H, case.H][: 2 if case.cell == "lstm" else 1]
        hx = whole([x.new_zeros(case.layers, x.size(1), size) for size in sizes])

    def step(t, states):
        if resets is not None:
            states = [state * ~resets[t].unsqueeze(-1) for state in states]
        if net is module:
            output, states = fastbptt.reference.run(net, x[t : t + 1], whole(states))
        else:
            output, states = net(x[t : t + 1], whole(states))
        return output[0], parts(states)

    T, B = x.shape[:2]
    outputs, states_after, states = [], [], parts(hx)
    for t in range(T):
        output, states = step(t, states)
        outputs.append(output)
        states_after.append(states)
    output = torch.stack(outputs).requires_grad_()
    seen = output.squeeze(1) if case.B is None else output
    seen = seen.transpose(0, 1) if case.batch_first and case.B is not None else seen
    (grad,) = torch.autograd.grad(loss_fn(seen), output)

    norms = {0: [grad[t, b].norm() for t in range(T) for b in range(B) if grad[t, b].any()]}
    for s in range(T - 1):
        leaves = [state.clone().requires_grad_() for state in states_after[s]]
        states = leaves
        for k in range(1, min(max_lag, T - 1 - s) + 1):
            t = s + k
            output, states = step(t, states)
            grads = torch.autograd.grad((output * grad[t]).sum(), leaves, retain_graph=True)
            norms.setdefault(k, []).extend(
                torch.cat([g[:, b].flatten() for g in grads]).norm()
                for b in range(B)
                if grad[t, b].any()
            )
    return torch.stack([torch.stack(norms[k]).mean() for k in range(max_lag + 1)])


def check(case, max_lag, loss_fn=square, resets=None, time_first_resets=None):
    x, hx = case.data()
    actual = lag_norms(case.module(), x, loss_fn, max_lag, hx=hx, resets=resets)
    expected = brute_force(
        case, loss_fn, max_lag, resets if time_first_resets is None else time_first_resets
    )
    assert actual.shape == (max_lag + 1,) and actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    return actual


@pytest.mark.slow(1)
@pytest.mark.parametrize("layers", [1, 2])
@every_kind
def test_brute_force(cell, proj, layers):
    norms = check(Case(T=40, cell=cell, proj=proj, layers=layers, B=2), max_lag=20)
    assert (norms > 0).all()


LAYOUTS = [
    {"batch_first": True, "layers": 2},
    {"B": None},
    {"B": None, "batch_first": True},
    {"hx": False, "layers": 3},
    {"bias": False},
    {"B": 1, "I": 1, "H": 1},
    {"T": 1},
]


@pytest.mark.parametrize("change", LAYOUTS, ids=str)
@every_kind
def test_layouts(cell, proj, change):
    case = replace(Case(T=7, cell=cell, proj=min(proj, change.get("H", 4) - 1)), **change)
    check(case, max_lag=case.T - 1)


def draw_resets(T, B, seed=0):
    resets = torch.rand(T, B, generator=torch.Generator().manual_seed(seed)) < 0.2
    resets[0, 0] = resets[3] = True
    return resets


@pytest.mark.parametrize("layers", [1, 2])
@every_kind
def test_resets(cell, proj, layers):
    case = Case(T=12, cell=cell, proj=proj, layers=layers)
    resets = draw_resets(12, 3)
    norms = check(case, 11, resets=resets)
    assert (norms[9:] == 0).all(), "step 3 begins every sequence anew"
    check(replace(case, batch_first=True), 6, resets=resets.T, time_first_resets=resets)


def test_resets_for_all_sequences_alike():
    resets = draw_resets(12, 1)
    for case in (Case(T=12), Case(T=12, batch_first=True), Case(T=12, B=None)):
        both = resets.expand(12, case.B or 1)
        check(case, 6, resets=resets[:, 0], time_first_resets=both)


def test_square_resets_lie_as_the_input_does():
    case, resets = Case(T=4, B=4, batch_first=True), draw_resets(4, 4)
    check(case, 2, resets=resets.T, time_first_resets=resets)


@every_kind
def test_steps_without_a_loss_count_for_nothing(cell, proj):
    case = Case(T=12, cell=cell, proj=proj, layers=2)
    check(case, 11, loss_fn=lambda output: square(output[-1]))
    check(case, 8, loss_fn=lambda output: square(output[3:10]) + square(output[:8, 1]))


@every_kind
def test_the_losses_scale_scales_the_norms(cell, proj):
    case = Case(T=9, cell=cell, proj=proj)
    x, hx = case.data()
    once, twice = (
        lag_norms(case.module(), x, lambda output, a=a: a * square(output), 5, hx=hx)
        for a in (1, 2)
    )
    assert torch.equal(twice, 2 * once)


def orthogonal_network(a, H=16, dtype=torch.float64, layers=1):
    """h_t = x_t + a Q h_{t-1} with Q orthogonal: a gradient's norm changes by a with each step."""
    torch.manual_seed(0)
    module = fastbptt.RNN(H, H, layers, nonlinearity="identity", bias=False, dtype=dtype)
    with torch.no_grad():
        module.weight_hh_l0.copy_(a * torch.linalg.qr(torch.randn(H, H, dtype=dtype)).Q)
    return module


@pytest.mark.parametrize("a", [0.25, 0.9, 1.0, 1.25])
def test_known_decay(a):
    x = torch.randn(150, 2, 16, dtype=torch.float64)
    norms = lag_norms(orthogonal_network(a), x, torch.sum, 100)  # ||g_t|| = sqrt(16)
    torch.testing.assert_close(norms, 4 * powers(a, 101), rtol=1e-12, atol=0)


def test_known_decay_in_float32():
    x = torch.randn(80, 2, 16)
    norms = lag_norms(orthogonal_network(0.5, dtype=torch.float32), x, torch.sum, 60)
    torch.testing.assert_close(norms, 4 * powers(0.5, 61), rtol=1e-5, atol=0)


@pytest.mark.parametrize("a, last", [(1e-3, 0.0), (1e3, math.inf)])
def test_beyond_the_range_of_float32(a, last):
    x = torch.randn(40, 1, 16)
    # With outputs that overflow there would be no loss to speak of.
    norms = lag_norms(orthogonal_network(a, dtype=torch.float32), x * 0, torch.sum, 39)
    assert norms[-1] == last or (last > 0 and norms[-1].isnan())
    torch.testing.assert_close(norms[:10], 4 * powers(a, 10), rtol=1e-5, atol=0)


@every_kind
def test_float32(cell, proj):
    case = Case(T=30, cell=cell, proj=proj, layers=2)
    module, (x, hx) = case.module(), case.data()
    expected = lag_norms(module, x, square, 20, hx=hx)
    hx = whole([state.float() for state in parts(hx)])
    actual = lag_norms(module.float(), x.float(), square, 20, hx=hx)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)


@every_kind
def test_every_instruction_set_and_thread_count(cell, proj, isa, threads, poisoned):
    case = Case(T=9, B=2, cell=cell, proj=proj, layers=2, H=5)
    check(case, 4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@every_kind
def test_leaves_no_trace(cell, proj, mode):
    case = Case(T=8, cell=cell, proj=proj, layers=2)
    module = case.module(truncation=2)
    module.train()
    module.register_forward_hook(lambda *_: pytest.fail("the module was called"))
    x, hx = case.data()
    x.requires_grad_()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    expected = lag_norms(case.module(), x.detach(), square, 5, hx=hx)
    seed = torch.get_rng_state()
    with mode():
        head = torch.nn.Linear(case.proj or case.H, 2, dtype=torch.float64)
        torch.set_rng_state(seed)
        norms = lag_norms(module, x, square, 5, hx=hx)
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
        assert torch.equal(norms, expected), (
            "full backpropagation, whatever the module's truncation"
        )
        assert not norms.requires_grad
        if mode is torch.enable_grad:
            lag_norms(module, x, lambda output: square(head(output)), 5, hx=hx)
    assert torch.equal(torch.get_rng_state(), seed)
    assert module.training and module.truncation == fastbptt.Chunked(2)
    assert x.grad is None and all(p.grad is None for p in head.parameters())
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.requires_grad
        assert torch.equal(parameter.grad, torch.ones_like(parameter))


def test_dropout():
    module = fastbptt.GRU(3, 4, 2, dropout=0.5)
    x = torch.randn(8, 2, 3)
    with pytest.raises(ValueError, match="dropout 0 or be in eval mode, got dropout 0.5"):
        lag_norms(module, x, square, 4)
    expected = lag_norms(module.eval(), x, square, 4)
    module.dropout = 0.0
    assert torch.equal(lag_norms(module.train(), x, square, 4), expected)


def test_other_modules_parameters():
    """Parameters of a model that converts or parametrizes the module are the ones that count."""
    torch.manual_seed(0)
    x, ours = torch.randn(8, 2, 3), fastbptt.convert(torch.nn.LSTM(3, 4))
    expected = lag_norms(ours, x, square, 4)
    torch.nn.utils.parametrizations.weight_norm(ours, "weight_hh_l0")
    torch.testing.assert_close(lag_norms(ours, x, square, 4), expected)


@pytest.mark.slow
def test_bounded_memory():
    """At T = 5000, B = 4, H = 128, more lags need no more memory."""
    script = """
import resource, torch, fastbptt
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB
module, x = fastbptt.RNN(8, 128), torch.randn(5000, 4, 8)
run = lambda lags: fastbptt.diagnostics.lag_norms(module, x, torch.sum, lags)
start = peak()
run(3)
few = peak()
run(64)
print(few - start, peak() - few)
"""
    few, more = map(float, python(script).stdout.split())
    one = 5000 * 4 * 128 * 4 / 2**20  # MiB of one number for each unit, step and sequence
    assert few < 12 * one and more < 6 * one, (few, more, one)


class Unknown(torch.nn.Module):
    pass


BAD_CALLS = {
    "torch's module": ({"rnn": torch.nn.GRU(3, 4)}, TypeError, "torch.*GRU.*fastbptt.convert"),
    "no module": ({"rnn": None}, TypeError, "rnn must be a fastbptt.*NoneType"),
    "another module": ({"rnn": Unknown()}, TypeError, "rnn must be a fastbptt.*Unknown"),
    "bidirectional": ({"rnn": fastbptt.RNN(3, 4, bidirectional=True)}, ValueError, "direction"),
    "packed": (
        {"x": torch.nn.utils.rnn.pack_sequence([torch.zeros(5, 3)])},
        TypeError,
        "x must be a Tensor.*PackedSequence",
    ),
    "no input": ({"x": None}, TypeError, "x must be a Tensor.*NoneType"),
    "input of 1 dimension": ({"x": torch.zeros(3)}, ValueError, "x must have 2 or 3 dim.* 1"),
    "input's features": ({"x": torch.zeros(5, 2, 7)}, RuntimeError, "input_size.* 7"),
    "input's dtype": ({"x": torch.zeros(5, 2, 3).double()}, ValueError, "dtype"),
    "empty batch": ({"x": torch.zeros(5, 0, 3)}, ValueError, "gradient.*at no step"),
    "hx's dimensions": ({"hx": torch.zeros(1, 4)}, RuntimeError, "hx should also be 3-D.* 2-D"),
    "hx's shape": ({"hx": torch.zeros(1, 2, 5)}, RuntimeError, "(?i)hidden"),
    "hx's type": ({"hx": 3}, TypeError, "hx.*int"),
    "a pair of states": ({"hx": (torch.zeros(1, 2, 4),) * 2}, TypeError, "hx.*tuple"),
    "an LSTM's one state": (
        {"rnn": fastbptt.LSTM(3, 4), "hx": torch.zeros(1, 2, 4)},
        RuntimeError,
        "hx must be None or a pair",
    ),
    "negative lag": ({"max_lag": -1}, ValueError, "max_lag must be from 0 to T - 1 = 4, got -1"),
    "lag T": ({"max_lag": 5}, ValueError, "max_lag must be from 0 to T - 1 = 4, got 5"),
    "float lag": ({"max_lag": 2.0}, TypeError, "max_lag must be an int, got 2.0"),
    "bool lag": ({"max_lag": True}, TypeError, "max_lag must be an int, got True"),
    "loss of no tensor": ({"loss_fn": lambda output: 3.0}, TypeError, "loss_fn.*float"),
    "loss of more numbers": (
        {"loss_fn": lambda output: output},
        ValueError,
        r"one number.*\(5, 2, 4\)",
    ),
    "constant loss": ({"loss_fn": lambda output: torch.tensor(1.0)}, ValueError, "constant"),
    "detached loss": ({"loss_fn": lambda output: output.detach().sum()}, ValueError, "constant"),
    "other loss": (
        {"loss_fn": lambda output: torch.ones(1, requires_grad=True).sum()},
        ValueError,
        "constant",
    ),
    "zero loss": ({"loss_fn": lambda output: 0 * output.sum()}, ValueError, "at no step"),
    "loss too early": (
        {"loss_fn": lambda output: output[:3].sum()},
        ValueError,
        "max_lag = 3 on, got one at steps up to 2 only",
    ),
    "resets' type": ({"resets": [True]}, TypeError, "resets.*list"),
    "resets' dtype": ({"resets": torch.zeros(5, 2)}, TypeError, "resets.*float32"),
    "resets' shape": (
        {"resets": torch.zeros(2, 5, dtype=torch.bool)},
        ValueError,
        r"resets must have shape .* \(5, 2\), got \(2, 5\)",
    ),
    "resets' steps": (
        {"resets": torch.zeros(4, dtype=torch.bool)},
        ValueError,
        r"resets must have shape .* got \(4,\)",
    ),
}


@pytest.mark.usefixtures("few_kernels")
def test_no_kernel():
    rnn, x = fastbptt.RNN(3, 4).bfloat16(), torch.zeros(5, 2, 3).bfloat16()
    with pytest.raises(NotImplementedError, match="bfloat16"):
        lag_norms(rnn=rnn, x=x, loss_fn=square, max_lag=3)


@pytest.mark.parametrize("change, error, message", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(change, error, message):
    good = {"rnn": fastbptt.RNN(3, 4), "x": torch.randn(5, 2, 3), "loss_fn": square, "max_lag": 3}
    lag_norms(**good)
    with pytest.raises(error, match=message):
        lag_norms(**good | change)


# suggest_truncation.


def expected_truncation(a, m, tolerance):
    """For phi_k = a^k: E_K = a^K / (1 - a), S_{m+1} - E_{m+1} = (1 - 2 a^(m+1)) / (1 - a)."""
    return max(1, math.ceil(math.log(tolerance * (1 - 2 * a ** (m + 1))) / math.log(a)))


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("tolerance", [0.9, 0.45, 0.11, 1.1e-3, 1.1e-6, 3.0])
@pytest.mark.parametrize("a", [0.1, 0.5, 0.8, 0.9])
def test_geometric_norms(a, tolerance, scale):
    m = 150
    K = suggest_truncation(scale * powers(a, m + 1), tolerance)
    assert K == expected_truncation(a, m, tolerance)


def test_the_suggestion_is_the_least():
    phi = torch.tensor([8.0, 4.0, 2.0, 1.0])  # and 1 beyond, so that at K = 4 the bias is 1 / 14
    for bias, K in [(8 / 14, 1), (4 / 14, 2), (2 / 14, 3), (1 / 14, 4)]:
        assert suggest_truncation(phi, bias * (1 + 1e-9)) == K
        if K < 4:
            assert suggest_truncation(phi, bias * (1 - 1e-9)) == K + 1


def test_what_lies_beyond_the_lags_counts():
    assert suggest_truncation(torch.tensor([1.0, 0.0]), 1e-9) == 1
    phi = powers(0.9, 12)
    with pytest.raises(ValueError, match="not vanish enough within max_lag = 11.*about K = 22"):
        suggest_truncation(phi, 0.1)
    assert suggest_truncation(powers(0.9, 60), 0.1) == 22
    phi[-1] = 0  # cut there, so that all is measured: (0.9^9 + 0.9^10) / (10 - 10 * 0.9^11) > 0.1
    assert suggest_truncation(phi, 0.1) == 10


def test_only_the_last_half_is_fitted():
    phi = torch.cat([torch.tensor([1.0, 1.0, 5.0, 1.0]), powers(0.5, 40)])
    assert suggest_truncation(phi, 0.01) == suggest_truncation(
        torch.cat([phi, powers(0.5, 60)[40:]]), 0.01
    )


@pytest.mark.parametrize(
    "phi, message",
    [
        (powers(1.0, 5), "not vanish"),
        (powers(1.1, 31), "not vanish within max_lag = 30: .* factor of 1.1 with each lag from 15"),
        (torch.tensor([1.0, 1e-300, 1e300], dtype=torch.float64), "not vanish within"),
        (powers(0.999, 30), "not vanish enough.* inf, .*decay of 0.999"),
    ],
)
def test_gradients_that_do_not_vanish(phi, message):
    with pytest.raises(ValueError, match=message) as caught:
        suggest_truncation(phi, 0.1)
    assert "measure more lags" in str(caught.value) and "Randomized" in str(caught.value)


@pytest.mark.parametrize("a", [0.5, 0.9])
def test_from_a_network(a):
    x = torch.randn(200, 2, 16, dtype=torch.float64)
    norms = lag_norms(orthogonal_network(a), x, torch.sum, 100)
    assert suggest_truncation(norms, 0.1) == expected_truncation(a, 100, 0.1)


def test_what_sliding_keeps():
    """The lags below K, of exactly the measured norms: here the input's gradient shows them."""
    T, K, module = 20, 7, orthogonal_network(0.8)
    with torch.no_grad():
        module.weight_ih_l0.copy_(torch.eye(16))
    x = torch.randn(T, 2, 16, dtype=torch.float64, requires_grad=True)
    norms = lag_norms(module, x, lambda output: square(output[-1]), T - 1)
    square(module(x, truncation=fastbptt.Sliding(K))[0][-1]).backward()
    by_lag = x.grad.norm(dim=-1).mean(1).flip(0)
    torch.testing.assert_close(by_lag[:K], norms[:K])
    assert (by_lag[K:] == 0).all() and norms[K:].all()


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 0.01])
@every_kind
def test_the_bias_that_is_left(cell, proj, tolerance):
    case = Case(T=150, B=8, H=16, layers=2, cell=cell, proj=proj)
    module, (x, hx) = case.module(), case.data()
    K = suggest_truncation(lag_norms(module, x, square, 60, hx=hx), tolerance)

    def gradient(truncation):
        square(module(x, hx, truncation=truncation)[0]).backward()
        gradients = [parameter.grad.flatten() for parameter in module.parameters()]
        module.zero_grad()
        return torch.cat(gradients)

    exact = gradient(None)
    bias = (gradient(fastbptt.Sliding(K)) - exact).norm() / exact.norm()
    assert 0 < bias <= 1.5 * tolerance  # an estimate: the parameters see h and c differently


BAD_NORMS = {
    "list": ([1.0, 0.5], TypeError, "norms must be a Tensor, got list"),
    "two dimensions": (torch.ones(3, 2), ValueError, r"one dimension.*\(3, 2\)"),
    "one entry": (torch.ones(1), ValueError, r"at least 2 entries.*\(1,\)"),
    "NaN": (torch.tensor([1.0, math.nan]), ValueError, "finite"),
    "infinity": (torch.tensor([math.inf, 1.0]), ValueError, "finite"),
    "negative": (torch.tensor([1.0, -0.5]), ValueError, "not negative"),
    "zeros": (torch.zeros(4), ValueError, "not all be zero"),
    "zero in between": (torch.tensor([1.0, 0.0, 0.5]), ValueError, "zero"),
}
BAD_TOLERANCES = [
    (0.0, ValueError),
    (-0.1, ValueError),
    (math.inf, ValueError),
    (math.nan, ValueError),
    ("0.1", TypeError),
    (True, TypeError),
    (None, TypeError),
]


@pytest.mark.parametrize("norms, error, message", BAD_NORMS.values(), ids=BAD_NORMS)
def test_bad_norms(norms, error, message):
    with pytest.raises(error, match=message):
        suggest_truncation(norms, 0.1)
    with pytest.raises(error, match=message):
        plot_lag_norms(norms)


@pytest.mark.parametrize("tolerance, error", BAD_TOLERANCES, ids=str)
def test_bad_tolerances(tolerance, error):
    with pytest.raises(error, match=f"tolerance must .*got .*{tolerance}"):
        suggest_truncation(powers(0.5, 9), tolerance)
    if tolerance is not None:
        with pytest.raises(error, match="tolerance must"):
            plot_lag_norms(powers(0.5, 9), tolerance=tolerance)


# plot_lag_norms.


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def labels_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_plot():
    ax = plot_lag_norms(powers(0.8, 61), tolerance=0.1)
    upper, lower = ax.figure.axes
    assert upper is ax and upper.get_yscale() == lower.get_yscale() == "log"
    K = suggest_truncation(powers(0.8, 61), 0.1)
    measured, decay, mark = labels_of(ax)
    assert measured == "measured" and "0.8 a lag" in decay and f"K = {K}" in mark
    torch.testing.assert_close(torch.tensor(ax.lines[0].get_ydata()), powers(0.8, 61))
    bounds = lower.lines[0].get_ydata()
    assert bounds[K - 1] <= 0.1 < bounds[K - 2]
    ax.figure.canvas.draw()


def test_plot_into_given_axes():
    figure, axes = plt.subplots()
    assert plot_lag_norms(powers(0.8, 20), ax=axes) is axes
    assert figure.axes == [axes] and len(labels_of(axes)) == 2
    figure.canvas.draw()


@pytest.mark.parametrize("phi", [powers(1.1, 31), powers(0.999, 31)], ids=["growth", "slow"])
def test_plot_without_a_truncation_to_mark(phi):
    ax = plot_lag_norms(phi, tolerance=0.1)
    assert len(labels_of(ax)) == 2
    assert "no bound" in ax.figure.axes[1].texts[0].get_text()
    ax.figure.canvas.draw()


def test_plot_with_zeros():
    ax = plot_lag_norms(torch.tensor([1.0, 0.5, 0.0, 0.0]), tolerance=0.1)
    assert labels_of(ax)[0] == "measured" and "K = 2" in labels_of(ax)[1]
    ax.figure.canvas.draw()


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_lag_norms(powers(0.8, 20))


@pytest.mark.slow
def test_matplotlib_is_not_imported_with_the_package():
    python("import sys, fastbptt.diagnostics; assert 'matplotlib' not in sys.modules")


@pytest.mark.parametrize(
    ("batch_first", "size"), [(False, (5, 2)), (True, (2, 5)), (False, (5,)), (True, (5,))]
)
def test_the_loss_is_given_the_output_as_the_module_gives_it(batch_first, size):
    rnn, seen = fastbptt.GRU(3, 4, batch_first=batch_first), []

    def loss_fn(output):
        seen.append(output.shape)
        return output.square().sum()

    x = torch.randn(*size, 3)
    lag_norms(rnn, x, loss_fn, max_lag=2)
    assert seen and {*seen} == {rnn(x)[0].shape}
