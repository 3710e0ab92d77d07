"""The schedule that chooses a truncation: against decays that are known, saved, and misused."""

from __future__ import annotations

import io
import math

import pytest
import torch

import fastbptt
from fastbptt import TBPTT, AdaptiveTruncation, Sliding
from fastbptt.diagnostics import lag_norms, suggest_truncation

T = 160


def decaying(w: float) -> fastbptt.RNN:
    """h_t = w h_{t-1} + x_t: a gradient k steps back is w^k of what it was."""
    rnn = fastbptt.RNN(1, 1, nonlinearity="identity", bias=False, dtype=torch.float64)
    with torch.no_grad():
        rnn.weight_ih_l0.fill_(1.0)
        rnn.weight_hh_l0.fill_(w)
    return rnn


def inputs(steps: int = T, batch: int = 2) -> torch.Tensor:
    return torch.ones(steps, batch, 1, dtype=torch.float64)


def total(output: torch.Tensor) -> torch.Tensor:
    return output.sum()


def late(output: torch.Tensor) -> torch.Tensor:
    """Of steps whose gradients have all of the past that counts."""
    return output[T // 2 :].sum()


@pytest.mark.parametrize("w", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("tolerance", [0.9, 0.5, 0.1])
def test_bound_of_a_known_decay(w, tolerance):
    """E_K / (S - E) is w^K / (1 - 2 w^(m+1)), and the bias of a sum of one sign is w^K."""
    rnn, lags = decaying(w), 40
    schedule = AdaptiveTruncation(tolerance, k_max=lags, rule=Sliding)
    K = schedule.step(rnn, inputs(), total)
    bounds = {k: w**k / (1 - 2 * w ** (lags + 1)) for k in range(1, lags + 1)}
    assert K == min(k for k, bound in bounds.items() if bound <= tolerance)
    assert schedule.bound == pytest.approx(bounds[K], rel=1e-6)
    assert rnn.truncation == Sliding(K)

    def gradient(truncation):
        loss = late(rnn(inputs(), truncation=truncation)[0])
        return torch.autograd.grad(loss, rnn.weight_ih_l0)[0].item()

    bias = abs(gradient(rnn.truncation) / gradient(None) - 1)
    assert bias == pytest.approx(w**K, rel=1e-2) and bias <= tolerance


def test_it_is_the_suggestion_of_the_diagnostics():
    torch.manual_seed(0)
    lstm, x = fastbptt.LSTM(3, 8, num_layers=2, dropout=0.5), torch.randn(30, 4, 3)
    schedule = AdaptiveTruncation(0.3, k_max=20)
    K = schedule.measure(lstm, x, total)
    assert lstm.training
    norms = lag_norms(lstm.eval(), x, total, 20)
    torch.testing.assert_close(schedule.norms, norms)
    assert suggest_truncation(norms, 0.3) == K and 1 < K < 20
    assert lstm.truncation == TBPTT(K, 2 * K - 1)
    assert schedule.calls == 0


def test_it_measures_now_and_then():
    rnn = decaying(0.5)
    schedule = AdaptiveTruncation(0.1, k_max=30, every=3)
    found = []
    for call in range(7):
        if call == 1:
            with torch.no_grad():
                rnn.weight_hh_l0.fill_(0.8)
        found.append(schedule.step(rnn, inputs(), total))
    assert found == [4] * 3 + [11] * 4 and schedule.calls == 7


def test_it_comes_down_step_by_step():
    rnn = decaying(0.5)
    schedule = AdaptiveTruncation(0.1, k_min=3, k_max=30, every=1, fall=0.8)
    found = [schedule.step(rnn, inputs(), total) for _ in range(10)]
    assert found == [24, 19, 15, 12, 9, 7, 5, 4, 4, 4], "0.5^4 is the first below 0.1"
    assert schedule.bound == pytest.approx(0.5**4, rel=1e-6)
    with torch.no_grad():
        rnn.weight_hh_l0.fill_(0.8)
    assert schedule.step(rnn, inputs(), total) == 11, "up at once"
    resumed = AdaptiveTruncation(0.1, k_min=3, k_max=30, every=1, fall=0.8)
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.step(decaying(0.1), inputs(), total) == 8
    almost = AdaptiveTruncation(0.1, k_max=30, fall=0.999)
    assert [almost.measure(decaying(0.05), inputs(), total) for _ in range(40)][-2:] == [1, 1]
    whole = AdaptiveTruncation(0.1, k_max=7, fall=0.95)
    assert whole.measure(decaying(1.1), inputs(), total) == 7


def test_it_stays_within_its_limits():
    assert AdaptiveTruncation(0.5, k_min=7).step(decaying(0.1), inputs(), total) == 7
    short = AdaptiveTruncation(0.01, k_max=5)
    assert short.step(decaying(0.9), inputs(), total) == 5 and short.bound > 0.01
    assert short.step(decaying(0.1), inputs(), total) == 5  # until it measures again
    grows = AdaptiveTruncation(0.5, k_max=9)
    assert grows.step(decaying(1.1), inputs(), total) == 9 and grows.bound == math.inf
    overflows = AdaptiveTruncation(0.5, k_max=60)
    rnn = decaying(1e8)
    assert overflows.step(rnn, inputs() * 0, total) == 60 and overflows.bound == math.inf


def test_a_batch_shorter_than_k_max_and_other_layouts():
    rnn = decaying(0.5)
    expected = AdaptiveTruncation(0.2, k_max=9).step(rnn, inputs(10), total)
    schedule = AdaptiveTruncation(0.2, k_max=1000)
    assert schedule.step(rnn, inputs(10), total) == expected and len(schedule.norms) == 10
    assert schedule.measure(rnn, inputs(10)[:, 0], total) == expected
    rnn.batch_first = True
    assert schedule.measure(rnn, inputs(10).transpose(0, 1), total) == expected
    with pytest.raises(ValueError, match="x must have at least 2 steps to measure lags, got 1"):
        schedule.measure(rnn, inputs(1).transpose(0, 1), total)


def test_saved_and_resumed():
    def train(schedule, rnn, calls):
        return [schedule.step(rnn, inputs(), total) for _ in range(calls)]

    through, rnn = AdaptiveTruncation(0.1, k_max=30, every=4), decaying(0.7)
    train(through, rnn, 2)
    file = io.BytesIO()
    torch.save(through.state_dict(), file)
    file.seek(0)
    resumed, again = AdaptiveTruncation(0.1, k_max=30, every=4), decaying(0.7)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():  # what is measured next is another decay
        rnn.weight_hh_l0.fill_(0.4)
        again.weight_hh_l0.fill_(0.4)
    assert again.truncation is None
    assert train(resumed, again, 1) == [7] and again.truncation == TBPTT(7, 13)
    rest = train(through, rnn, 4)
    assert rest == [7, 7, 3, 3] and train(resumed, again, 3) == rest[1:]
    torch.testing.assert_close(resumed.norms, through.norms)
    assert resumed.bound == through.bound

    narrow = AdaptiveTruncation(0.1, k_max=5)
    narrow.load_state_dict({**through.state_dict(), "k": 7})
    assert narrow.k == 5
    fresh = AdaptiveTruncation(0.1)
    fresh.load_state_dict(AdaptiveTruncation(0.1).state_dict())
    assert fresh.step(decaying(0.5), inputs(), total) == 4


def test_nothing_changes_where_it_cannot_measure():
    rnn = decaying(0.5)
    schedule = AdaptiveTruncation(0.1)
    with pytest.raises(ValueError, match="loss_fn must return one number"):
        schedule.step(rnn, inputs(), lambda output: output)
    assert rnn.truncation is None and rnn.training
    assert schedule.calls == 0 and schedule.k is None
    with pytest.raises(TypeError, match="rnn must be a fastbptt.RNN, GRU or LSTM"):
        schedule.step(torch.nn.GRU(1, 1), inputs(), total)
    with pytest.raises(TypeError, match="truncation must be None, an int or a truncation"):
        AdaptiveTruncation(0.1, rule=str).step(rnn, inputs(), total)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tolerance": 0}, ValueError, "tolerance must be more than 0 and finite, got 0.0"),
        ({"tolerance": "0.5"}, TypeError, "tolerance must be a number, got '0.5' of type str"),
        ({"k_min": 0}, ValueError, "k_min must be at least 1, got 0"),
        ({"k_min": 1.5}, TypeError, "k_min must be an int, got 1.5 of type float"),
        ({"k_min": 9, "k_max": 8}, ValueError, "k_max must be at least k_min = 9, got 8"),
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"fall": 1}, ValueError, "fall must be at least 0 and less than 1, got 1.0"),
        ({"fall": -0.1}, ValueError, "fall must be at least 0 and less than 1, got -0.1"),
        ({"fall": math.nan}, ValueError, "fall must be at least 0 and less than 1, got nan"),
        ({"fall": "0.9"}, TypeError, "fall must be a number, got '0.9' of type str"),
        ({"rule": 5}, TypeError, "rule must be callable, got 5 of type int"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        AdaptiveTruncation(**{"tolerance": 0.5, **arguments})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"more": 1}, ValueError, "state must have the entries calls, k, bound, norms, got .*more"),
        ({"calls": "2"}, TypeError, "state's calls must be an int, got '2'"),
        ({"calls": -1}, ValueError, "state's calls must be at least 0, got -1"),
        ({"k": 0}, ValueError, "state's k must be at least 1, got 0"),
        ({"bound": "x"}, TypeError, "state's bound must be a float or None, got 'x'"),
        ({"norms": [1.0]}, TypeError, "state's norms must be a Tensor or None, got list"),
    ],
)
def test_bad_states(change, error, message):
    schedule = AdaptiveTruncation(0.5)
    with pytest.raises(error, match=message):
        schedule.load_state_dict({**schedule.state_dict(), **change})
    with pytest.raises(TypeError, match="state must be a mapping, got list"):
        schedule.load_state_dict([])
    assert schedule.state_dict() == AdaptiveTruncation(0.5).state_dict()
