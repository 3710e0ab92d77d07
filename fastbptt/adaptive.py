"""A truncation that is chosen during training, by how far gradients reach."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastbptt.diagnostics import _bias_bounds, _check_tolerance, _fit_decay, lag_norms
from fastbptt.nn import GRU, LSTM, RNN
from fastbptt.truncation import (
    TBPTT,
    Truncation,
    _as_int,
    _positive_int,
    _real,
    as_truncation,
)

__all__ = ["AdaptiveTruncation"]

_STATE = ("calls", "k", "bound", "norms")


def _overlapping(k: int) -> TBPTT:
    return TBPTT(k, 2 * k - 1)


class AdaptiveTruncation:
    """Keeps a module's truncation as short as a tolerated relative bias of its gradient allows.

    Aicher, Foti and Fox, "Adaptively truncating backpropagation through time to control gradient
    bias", UAI 2019: every now and then the norms of the gradients that reach k steps back are
    measured on a batch (:func:`fastbptt.diagnostics.lag_norms`), beyond the measured lags a
    geometric decay is fitted, and K is the least number of steps whose bound of the relative bias
    is at most the tolerance (:func:`fastbptt.diagnostics.suggest_truncation` has the formula).
    Where no K up to ``k_max`` is enough, as where gradients do not decay, K is ``k_max``.

        schedule = fastbptt.AdaptiveTruncation(0.5, k_min=2, k_max=60, every=100)
        for x, target in batches:
            schedule.step(rnn, x, lambda output: loss_of(output, target))
            loss_of(rnn(x)[0], target).backward()

    A net that has not learnt to remember has gradients that do not reach far, and with a K that
    follows them at once it may never learn to. With ``fall`` K begins at ``k_max``, and comes down
    to what is measured step by step: it costs more at first, and ends at a lower loss.

    One schedule serves one module. A measurement costs up to ``k_max`` backward passes of the
    batch that it is given, without the weights' gradients; a few of the batch's sequences will do.

    Args:
        tolerance: relative bias that one accepts, more than 0; 0.1 to 0.9 in the paper.
        k_min: the least K, at least 1.
        k_max: the largest K, at least ``k_min``; also the largest lag that is measured.
        every: calls of :meth:`step` from one measurement to the next, at least 1.
        rule: the truncation (an object, an int k for ``Chunked(k)``, or None) that stands for K.
            By default ``TBPTT(K, 2 * K - 1)``, in which every loss reaches at least K steps, as
            the bound takes it. ``Sliding`` does too; ``Chunked`` is cheaper, but its losses reach
            K steps at most, so that its bias may be above the tolerance.
        fall: the least factor, from 0 to below 1, by which a measurement takes K down: K becomes at
            least ``floor(fall * K)``, the first one at least ``floor(fall * k_max)``. 0 takes it
            down at once, as the paper has it.

    Attributes:
        calls: calls of :meth:`step` so far.
        k: K of now; None before the first measurement.
        bound: the bound of the relative bias at K, inf where there is none; None before the first
            measurement.
        norms: what the last measurement gave, float64 [lags + 1] on the CPU, or None.

    Raises:
        TypeError: ``tolerance`` or ``fall`` is no number, ``k_min``, ``k_max`` or ``every`` no int,
            or ``rule`` not callable.
        ValueError: one of the numbers is out of its range.
    """

    def __init__(
        self,
        tolerance: float,
        k_min: int = 1,
        k_max: int = 100,
        every: int = 100,
        *,
        rule: Callable[[int], Truncation | int | None] = _overlapping,
        fall: float = 0.0,
    ) -> None:
        self.tolerance = _check_tolerance(tolerance)
        self.k_min = _positive_int("k_min", k_min)
        self.k_max = _positive_int("k_max", k_max)
        if self.k_max < self.k_min:
            raise ValueError(f"k_max must be at least k_min = {self.k_min}, got {self.k_max}")
        self.every = _positive_int("every", every)
        if not callable(rule):
            raise TypeError(f"rule must be callable, got {rule!r} of type {type(rule).__name__}")
        self.rule = rule
        self.fall = _real("fall", fall)
        if not 0 <= self.fall < 1:
            raise ValueError(f"fall must be at least 0 and less than 1, got {self.fall}")
        self.calls = 0
        self.k: int | None = None
        self.bound: float | None = None
        self.norms: Tensor | None = None

    def __repr__(self) -> str:
        return (
            f"AdaptiveTruncation(tolerance={self.tolerance:g}, k_min={self.k_min}, "
            f"k_max={self.k_max}, every={self.every}, fall={self.fall:g}): k={self.k}"
        )

    def step(
        self,
        rnn: RNN | GRU | LSTM,
        x: Tensor,
        loss_fn: Callable[[Tensor], Tensor],
        *,
        hx: Tensor | tuple[Tensor, Tensor] | None = None,
        resets: Tensor | None = None,
    ) -> int:
        """Once for each batch, before the module's call: measures if it is time to, and sets K.

        The first call measures, and then each ``every``-th. Every call sets ``rnn.truncation``,
        so that a run that is resumed goes on with the K that was saved.

        Args:
            rnn: the module, in one direction. While it is measured its dropout is off.
            x, loss_fn, hx, resets: as for :func:`fastbptt.diagnostics.lag_norms`, of this batch or
                of a part of its sequences.

        Returns:
            K.

        Raises:
            TypeError, ValueError, NotImplementedError, RuntimeError: where ``lag_norms`` raises
                them. Then nothing has changed.
        """
        if self.k is None or self.calls % self.every == 0:
            k = self.measure(rnn, x, loss_fn, hx=hx, resets=resets)
        else:
            k = self.k
            self._set(rnn, k)
        self.calls += 1
        return k

    def measure(
        self,
        rnn: RNN | GRU | LSTM,
        x: Tensor,
        loss_fn: Callable[[Tensor], Tensor],
        *,
        hx: Tensor | tuple[Tensor, Tensor] | None = None,
        resets: Tensor | None = None,
    ) -> int:
        """Measures now, and sets K; the arguments, result and errors are those of :meth:`step`."""
        norms = self._norms(rnn, x, loss_fn, hx, resets)
        k, bound = self._choose(norms)
        self._set(rnn, k)
        self.norms, self.k, self.bound = norms, k, bound
        return k

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint needs beside the module's own: numbers, and a tensor or None."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Goes on from what :meth:`state_dict` gave; the next :meth:`step` sets K.

        The arguments stay those of this schedule; a saved K outside of ``k_min`` to ``k_max``
        becomes the nearer of the two.

        Raises:
            TypeError: ``state`` or one of its entries has another type.
            ValueError: it is not one of this class's, or has a number out of its range.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping, got {type(state).__name__}")
        if set(state) != set(_STATE):
            raise ValueError(
                f"state must have the entries {', '.join(_STATE)}, "
                f"got {', '.join(map(str, state)) or 'none'}"
            )
        calls, k, bound, norms = (state[name] for name in _STATE)
        count = _as_int(calls)
        if count is None:
            raise TypeError(f"state's calls must be an int, got {calls!r}")
        if count < 0:
            raise ValueError(f"state's calls must be at least 0, got {count}")
        if k is not None:
            k = min(max(_positive_int("state's k", k), self.k_min), self.k_max)
        if bound is not None and not isinstance(bound, float):
            raise TypeError(f"state's bound must be a float or None, got {bound!r}")
        if norms is not None and not isinstance(norms, Tensor):
            raise TypeError(f"state's norms must be a Tensor or None, got {type(norms).__name__}")
        self.calls, self.k, self.bound, self.norms = count, k, bound, norms

    def _norms(
        self,
        rnn: RNN | GRU | LSTM,
        x: Tensor,
        loss_fn: Callable[[Tensor], Tensor],
        hx: Tensor | tuple[Tensor, Tensor] | None,
        resets: Tensor | None,
    ) -> Tensor:
        """Up to the lag k_max, or as far as the batch reaches."""
        lags = self.k_max
        if isinstance(x, Tensor) and x.dim() in (2, 3) and isinstance(rnn, RNN | GRU | LSTM):
            steps = x.size(1 if rnn.batch_first and x.dim() == 3 else 0)
            if steps < 2:
                raise ValueError(f"x must have at least 2 steps to measure lags, got {steps}")
            lags = min(lags, steps - 1)
        training = getattr(rnn, "training", False)
        if training:
            rnn.eval()
        try:
            return lag_norms(rnn, x, loss_fn, lags, hx=hx, resets=resets).cpu()
        finally:
            if training:
                rnn.train()

    def _choose(self, norms: Tensor) -> tuple[int, float]:
        """K and the bound of the relative bias there."""
        if not bool(torch.isfinite(norms).all()):  # they grow beyond what the dtype holds
            return self.k_max, math.inf
        bounds = _bias_bounds(norms, _fit_decay(norms))
        enough = (bounds <= self.tolerance).nonzero()
        k = int(enough[0]) + 1 if len(enough) > 0 else self.k_max
        least = math.floor(self.fall * (self.k or self.k_max))
        k = min(max(k, self.k_min, least), self.k_max)
        return k, float(bounds[min(k, len(bounds)) - 1])

    def _set(self, rnn: RNN | GRU | LSTM, k: int) -> None:
        rnn.truncation = as_truncation(self.rule(k))
