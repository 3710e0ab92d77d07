"""How far back gradients reach, and the truncation that follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastbptt.boundaries import boundaries_of
from fastbptt.call import Call, call_of_module, check_lstm_states, has_kernel
from fastbptt.lags import lag_sums, run_layers
from fastbptt.nn import GRU, LSTM, RNN
from fastbptt.truncation import _as_int, _real

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["lag_norms", "plot_lag_norms", "suggest_truncation"]


def lag_norms(
    rnn: RNN | GRU | LSTM,
    x: Tensor,
    loss_fn: Callable[[Tensor], Tensor],
    max_lag: int,
    *,
    hx: Tensor | tuple[Tensor, Tensor] | None = None,
    resets: Tensor | None = None,
) -> Tensor:
    """The mean norm of the gradient that reaches k steps back, for k = 0, ..., max_lag.

    Let g_t = d loss / d output_t be the gradient that the loss has in the output of step t
    directly, and L_t the loss of step t: a function of output_t with this gradient. Let S_s be the
    state that is carried from step s to step s + 1: h of every layer, and c of an LSTM's, as
    independent variables. Then

        phi_0 = mean ||g_t||
        phi_k = mean ||dL_t / dS_{t-k}||        k = 1, ..., max_lag

    with the Euclidean norm over everything that belongs to one sequence, and the mean over all
    sequences and all steps t >= k for which g_t is not zero (steps without a loss, such as
    padding, count for nothing). S is the state after a step, so t - k is at least 0, and ``hx``,
    the state before step 0, is not one of them. What a loss sends from layer to layer within a
    step is no part of dS; it is counted where it enters the carry, a step earlier. With
    TBPTT(1, K), alias Sliding(K), just the lags 0, ..., K - 1 are left in the gradient.

    These are the phi_k of Aicher, Foti and Fox, "Adaptively truncating backpropagation through
    time to control gradient bias", UAI 2019. There they come from one loss, by autograd; here from
    all losses at once: dL_t/dS_{t-k} for every t is one backward step away from dL_t/dS_{t-k+1},
    of a batch of T * B rows. So the time is that of ``max_lag`` backward passes of the module,
    without its weights' gradients. The memory does not depend on ``max_lag``: ten (RNN) to twenty
    (LSTM) numbers for each unit of a layer, step and sequence.

    Gradients below the dtype's smallest number are 0, those beyond its largest are inf or NaN;
    float64 has room for more lags than float32.

    Args:
        rnn: the module, in one direction, without active dropout (set to 0, or in eval mode). Its
            own truncation and ``clip_grad`` play no part. Nothing of it changes, its parameters'
            ``grad`` included.
        x: input [T, B, I], [B, T, I] with ``batch_first``, or [T, I]; not packed.
        loss_fn: the loss, one number, as a function of the output, which lies as ``x`` does. It
            should be a sum or mean over steps; of any other loss the g_t still count.
        max_lag: the largest lag, at most T - 1.
        hx: the initial state as for the module; zeros if None.
        resets: bool [T, B] ([B, T] with ``batch_first``), or [T] for all sequences alike: where
            the state entering a step is zeros. No gradient reaches back across it.

    Returns:
        The norms, [max_lag + 1], float64 on ``x``'s device.

    Raises:
        TypeError: ``rnn`` is no module of fastbptt's, ``x`` or the loss no Tensor, ``max_lag`` no
            int, or ``resets`` no bool tensor.
        ValueError: ``rnn`` is bidirectional or has active dropout, ``max_lag`` is out of its
            range, ``resets`` does not fit, or the loss is not one number, does not depend on the
            output, or has no gradient at any step from ``max_lag`` on.
        ValueError, RuntimeError: where the module's own call raises them.
        NotImplementedError: there is no kernel for the dtype or device.
    """
    _check_module(rnn)
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, padded and not packed, got {type(x).__name__}")
    with torch.inference_mode(False), torch.no_grad():
        call, states = _prepare(rnn, x, hx, resets)
        input = call.input
        B, T = input.shape[:2] if rnn.batch_first else input.shape[1::-1]
        lags = _check_max_lag(max_lag, T)
        is_reset = boundaries_of(call).resets
        if rnn.batch_first:
            input = input.transpose(0, 1)
            is_reset = None if is_reset is None else is_reset.t()
        layers = run_layers(rnn, input.contiguous(), states, is_reset)
        output = layers[-1].output.unflatten(1, (T, B))[0]
        grad = _loss_gradient(loss_fn, output, rnn.batch_first, call.unbatched)
        has_loss = (grad != 0).any(-1)  # NaN counts as one
        if not bool(has_loss[lags:].any()):
            last = has_loss.any(1).nonzero()
            where = f"at steps up to {int(last[-1])} only" if len(last) > 0 else "at no step"
            raise ValueError(
                f"the loss must have a gradient at a step from max_lag = {lags} on, got one {where}"
            )
        sums = lag_sums(layers, grad, lags, is_reset)
        counts = has_loss.sum(1).flip(0).cumsum(0).flip(0)  # at k: those at steps t >= k
        return sums / counts[: lags + 1]


def suggest_truncation(norms: Tensor, tolerance: float) -> int:
    """The least number of steps K at which truncation leaves the gradient nearly unbiased.

    Sliding(K), that is TBPTT(1, K), keeps the lags k < K of every loss, and TBPTT(k1, K + k1 - 1)
    at least those. By Theorem 1 of Aicher, Foti and Fox, "Adaptively truncating backpropagation
    through time to control gradient bias", UAI 2019, with the best of its denominators, the
    relative bias of the gradient g_K that is left is

        ||E g_K - g|| / ||g|| <= E_K / max_j (S_j - E_j),
        E_K = sum of phi_k, k >= K        what is cut off
        S_K = sum of phi_k, k < K         what is left

    and K is the least one for which the right-hand side is at most ``tolerance``. Beyond the last
    lag, m, the norms are taken to decay geometrically, phi_{m+i} = beta^i phi_m, with log beta the
    slope of the least-squares line through log phi_k over the last half of the lags (and phi_m at
    least this line's value there).

    It is an estimate, right within a factor of two or so: S_K stands in for the norm of g_K, as an
    option of the authors' code has it, so that the gradients of different lags are taken to add up
    rather than to cancel, and to reach the parameters with the same weight.

    Args:
        norms: phi_k for k = 0, ..., m, as from :func:`lag_norms`; a mean over several batches, if
            one alone is noisy.
        tolerance: the relative bias that one accepts, more than 0; 0.1 to 0.9 in the paper.

    Returns:
        K, from 1 to m + 1.

    Raises:
        TypeError: ``norms`` is no Tensor, or ``tolerance`` no number.
        ValueError: ``norms`` has not one dimension of at least 2 finite numbers that are not
            negative and not all zero; ``tolerance`` is not in (0, inf); or the gradient does not
            vanish, or not enough, within the measured lags.
    """
    phi = _check_norms(norms)
    tolerance = _check_tolerance(tolerance)
    decay = _fit_decay(phi)
    bounds = _bias_bounds(phi, decay)
    enough = (bounds <= tolerance).nonzero()
    if len(enough) > 0:
        return int(enough[0]) + 1
    remedy = (
        "measure more lags (lag_norms with a larger max_lag), or train without bias: full "
        "backpropagation (truncation=None) or fastbptt.Randomized"
    )
    m = len(phi) - 1
    if decay.beta >= 1:
        raise ValueError(
            f"the gradient does not vanish within max_lag = {m}: its norm changes by a factor of "
            f"{decay.beta:.4g} with each lag from {decay.first} on; {remedy}"
        )
    rest, total = _tail(phi, decay), float(phi.sum())
    needed = m + 1 + math.log(tolerance * (total + rest) / rest) / math.log(decay.beta)
    raise ValueError(
        f"the gradient does not vanish enough within max_lag = {m}: the bound of the relative "
        f"bias at K = {m + 1} is {float(bounds[-1]):.3g}, more than the tolerance "
        f"{tolerance:.3g}. With the decay of {decay.beta:.4g} a lag it would take about "
        f"K = {math.ceil(needed)}; {remedy}"
    )


def plot_lag_norms(
    norms: Tensor, *, tolerance: float | None = None, ax: Axes | None = None
) -> Axes:
    """Draws the norms over the lag, and how they decay.

    On a logarithmic scale: the norms, the fitted decay (see :func:`suggest_truncation`) and, given
    a tolerance, the truncation that it suggests. A new figure has a second panel below, with the
    bound of the relative bias over the truncation K.

    Args:
        norms: as from :func:`lag_norms`.
        tolerance: the relative bias that one accepts; nothing is marked if None, or where no
            truncation within the lags achieves it.
        ax: where to draw the norms; None makes a new figure, which needs matplotlib's pyplot.

    Returns:
        The Axes with the norms.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: ``norms`` or ``tolerance`` is not as :func:`suggest_truncation`
            takes it.
    """
    phi = _check_norms(norms)
    tolerance = None if tolerance is None else _check_tolerance(tolerance)
    decay = _fit_decay(phi)
    bounds = _bias_bounds(phi, decay)
    below = None
    if ax is None:
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ImportError("plot_lag_norms needs matplotlib: pip install matplotlib") from error
        _, (ax, below) = plt.subplots(
            2, sharex=True, height_ratios=(2, 1), figsize=(6.4, 5.6), layout="constrained"
        )
    lags = range(len(phi))
    positive = phi.where(phi > 0, math.nan)  # a logarithmic scale has no place for 0
    ax.plot(lags, positive, "o", markersize=3.5, color="C0", label="measured")
    if decay.beta > 0:
        fitted = range(decay.first, len(phi))
        line = [math.exp(decay.level + decay.slope * k) for k in fitted]
        trend = "decay" if decay.beta < 1 else "growth"
        ax.plot(fitted, line, "-", color="C1", label=f"{trend}, {decay.beta:.3g} a lag")
    ax.set_yscale("log")
    ax.set_ylabel("mean gradient norm")
    ax.set_xlabel("lag k (steps)")
    panels = [ax]
    if below is not None:
        panels.append(below)
        ax.set_xlabel("")
        below.set_xlabel("lag k, truncation K (steps)")
        below.set_ylabel("relative bias, bound")
        _draw_bounds(below, bounds, tolerance)
    enough = [] if tolerance is None else (bounds <= tolerance).nonzero()
    if len(enough) > 0:
        K = int(enough[0]) + 1
        for panel in panels:
            panel.axvline(
                K, color="C3", linewidth=1, zorder=1, label=f"K = {K}: lags cut off from here"
            )
    ax.legend()
    return ax


def _check_module(rnn: object) -> None:
    if not isinstance(rnn, RNN | GRU | LSTM):
        hint = ""
        if isinstance(rnn, torch.nn.RNNBase):
            hint = "; fastbptt.convert makes one of it"
        raise TypeError(
            "rnn must be a fastbptt.RNN, GRU or LSTM, "
            f"got {type(rnn).__module__}.{type(rnn).__qualname__}{hint}"
        )
    if rnn.bidirectional:
        raise ValueError(
            "rnn must have one direction, got bidirectional=True: each of its outputs depends on "
            "steps before and after it, so that a lag is not defined"
        )
    if rnn.dropout > 0 and rnn.training:
        raise ValueError(f"rnn must have dropout 0 or be in eval mode, got dropout {rnn.dropout}")


def _check_max_lag(max_lag: object, T: int) -> int:
    lags = _as_int(max_lag)
    if lags is None:
        raise TypeError(f"max_lag must be an int, got {max_lag!r} of type {type(max_lag).__name__}")
    if not 0 <= lags < T:
        raise ValueError(f"max_lag must be from 0 to T - 1 = {T - 1}, got {lags}")
    return lags


def _prepare(
    rnn: RNN | GRU | LSTM,
    x: Tensor,
    hx: Tensor | tuple[Tensor, Tensor] | None,
    resets: Tensor | None,
) -> tuple[Call, list[Tensor]]:
    """The call, and the states before it [num_layers, B, ...], both checked."""
    if x.dim() not in (2, 3):
        raise ValueError(f"x must have 2 or 3 dimensions, got {x.dim()}")
    is_lstm = isinstance(rnn, LSTM)
    if is_lstm:
        check_lstm_states(hx)
    elif hx is not None:
        hx = (hx,)
    call = call_of_module(rnn, x, hx, None, resets)
    if not has_kernel(call.input):
        raise NotImplementedError(f"lag_norms has no kernel for {x.dtype} on {x.device.type}")
    if call.states is not None:
        return call, list(call.states)
    sizes = [rnn.proj_size or rnn.hidden_size, rnn.hidden_size][: 1 + is_lstm]
    B = call.input.size(0 if rnn.batch_first else 1)
    return call, [call.input.new_zeros(rnn.num_layers, B, size) for size in sizes]


def _loss_gradient(
    loss_fn: Callable[[Tensor], Tensor], output: Tensor, batch_first: bool, unbatched: bool
) -> Tensor:
    """The loss's gradient in the output of the network, [T, B, R] both."""
    leaf = output.detach().requires_grad_()
    with torch.enable_grad():
        shown = leaf.squeeze(1) if unbatched else leaf.transpose(0, 1) if batch_first else leaf
        loss = loss_fn(shown)
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a Tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"loss_fn must return one number, got shape {tuple(loss.shape)}")
    grad = torch.autograd.grad(loss, leaf, allow_unused=True)[0] if loss.requires_grad else None
    if grad is None:
        raise ValueError("loss_fn must return a loss that depends on the output, got a constant")
    return grad


def _draw_bounds(ax: Axes, bounds: Tensor, tolerance: float | None) -> None:
    if not bool(torch.isfinite(bounds).all()):
        text = "no bound: the norms do not decay enough"
        ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes)
        ax.set_yticks([])
        return
    ax.plot(range(1, len(bounds) + 1), bounds.where(bounds > 0, math.nan), color="C0")
    if tolerance is not None:
        ax.axhline(tolerance, color="C3", linewidth=1, linestyle=":")
    ax.set_yscale("log")


class _Decay(NamedTuple):
    """The line log phi_k = level + slope k, fitted from the lag ``first`` on."""

    first: int
    level: float
    slope: float

    @property
    def beta(self) -> float:
        return math.exp(min(self.slope, 700))  # beyond it, exp is an error


def _check_norms(norms: object) -> Tensor:
    if not isinstance(norms, Tensor):
        raise TypeError(f"norms must be a Tensor, got {type(norms).__name__}")
    if norms.dim() != 1 or norms.numel() < 2:
        raise ValueError(
            f"norms must have one dimension and at least 2 entries, got shape {tuple(norms.shape)}"
        )
    phi = norms.detach().to("cpu", torch.float64)
    if not bool((torch.isfinite(phi) & (phi >= 0)).all()):
        raise ValueError("norms must be finite and not negative, got others among them")
    if not bool(phi.any()):
        raise ValueError("norms must not all be zero, got zeros only")
    if bool((phi[1:] > phi[:-1].where(phi[:-1] == 0, math.inf)).any()):
        raise ValueError("norms must stay zero from the first zero on, got one after a zero")
    return phi


def _check_tolerance(tolerance: object) -> float:
    value = _real("tolerance", tolerance)
    if not 0 < value < math.inf:
        raise ValueError(f"tolerance must be more than 0 and finite, got {value}")
    return value


def _fit_decay(phi: Tensor) -> _Decay:
    """Ordinary least squares over the last half of the lags, at least two."""
    first = min(len(phi) // 2, len(phi) - 2)
    if phi[-1] == 0:  # gone by then, and for ever: nothing to extrapolate
        return _Decay(first, -math.inf, -math.inf)
    lags, logs = torch.arange(first, len(phi), dtype=torch.float64), phi[first:].log()
    centred = lags - lags.mean()
    slope = float((centred * logs).sum() / (centred**2).sum())
    return _Decay(first, float(logs.mean()) - slope * float(lags.mean()), slope)


def _tail(phi: Tensor, decay: _Decay) -> float:
    """The sum of the norms beyond the measured lags."""
    if decay.beta >= 1:
        return math.inf
    last = max(float(phi[-1]), math.exp(decay.level + decay.slope * (len(phi) - 1)))
    return last * decay.beta / (1 - decay.beta)


def _bias_bounds(phi: Tensor, decay: _Decay) -> Tensor:
    """The bounds of the relative bias for K = 1, ..., m + 1; infinite where there is none."""
    tail = torch.tensor(_tail(phi, decay), dtype=torch.float64)
    cut_off = torch.cat([phi.flip(0).cumsum(0).flip(0)[1:], tail.new_zeros(1)]) + tail
    gradient = phi.sum() - tail  # S_j - E_j grows with j: it is the largest at the last
    return cut_off / gradient if gradient > 0 else torch.full_like(phi, math.inf)
