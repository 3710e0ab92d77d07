"""Where the backward pass is cut. Outputs never depend on any of this."""

from __future__ import annotations

import math
import numbers
import operator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["TBPTT", "Chunked", "Gated", "Randomized", "Sliding", "Truncation", "as_truncation"]


_CALLS_KEPT = 1024  # of a Randomized with a generator, to be run again in a backward pass


def _as_int(value: object) -> int | None:
    """``value`` as an int if it is one in Python's sense (an int, a NumPy integer; not a bool)."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _positive_int(name: str, value: object) -> int:
    number = _as_int(value)
    if number is None:
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def _real(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    return float(value)


def check_all(holds: Tensor, message: str) -> None:
    """Raises ValueError unless every element is true.

    A compiled program cannot choose by values: there it is a RuntimeError, when the program runs.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(holds.all(), message)
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(holds):  # of all that vmap maps over
        holds = torch._C._functorch.get_unwrapped(holds)
    if not bool(holds.all()):
        raise ValueError(message)


class Truncation:
    """What every way to cut a backward pass is an instance of."""


class Windowed(Truncation):
    """A truncation by windows: stretches of the sequence, each run from a detached state.

    Window j holds the losses of steps k1 j, ..., k1 (j + 1) - 1 (``last_only``: of the last of
    them) and begins k2 - k1 steps before the first of these.
    """

    k1: int
    k2: int
    last_only: bool


@dataclass(frozen=True)
class Chunked(Windowed):
    """Regular truncation: the state is detached every ``k`` steps.

    The gradient does not cross the boundaries t = k, 2k, 3k, ...; the last chunk may be short. It
    is what a loop over segments of ``k`` steps computes that calls ``detach()`` on the state
    between them, but the chunks' backward passes run side by side as one larger batch. Both
    directions of a bidirectional network are cut at the same places, and so is every sequence of
    a packed batch, each counting from its own first step.

    Args:
        k: steps in a chunk, at least 1. With k >= T it is full backpropagation through time.

    Raises:
        TypeError: ``k`` is not an int.
        ValueError: ``k`` is less than 1.
    """

    k: int
    last_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", _positive_int("Chunked's k", self.k))

    @property
    def k1(self) -> int:  # type: ignore[override]
        """Steps from one window to the next."""
        return self.k

    k2 = k1


@dataclass(frozen=True)
class TBPTT(Windowed):
    """TBPTT(k1, k2): every ``k1`` steps, gradients that reach ``k2`` steps back.

    Window j holds the losses of steps [j k1, min((j + 1) k1, T)). It begins k2 - k1 steps before
    its first loss (at step 0 if that is earlier), from a detached state, and every loss in it
    reaches back to that place and no further: the gradient is what one gets by running the whole
    network again on each window, from the detached states of all its layers. Williams and Peng,
    "An efficient gradient-based algorithm for on-line training of recurrent network
    trajectories", 1990.

    Args:
        k1: steps from one window to the next, at least 1.
        k2: steps in a window, at least ``k1``. With k1 = k2 it is ``Chunked(k1)``.
        loss: "window": the losses of all ``k1`` steps count. "last": only that of a window's last
            step, as in the algorithm's first form; the output's gradient at other steps has no
            effect.

    Raises:
        TypeError: ``k1`` or ``k2`` is not an int.
        ValueError: ``k1`` is less than 1, ``k2`` less than ``k1``, or ``loss`` neither word.
    """

    k1: int
    k2: int
    loss: str = "window"

    def __post_init__(self) -> None:
        object.__setattr__(self, "k1", _positive_int("TBPTT's k1", self.k1))
        object.__setattr__(self, "k2", _positive_int("TBPTT's k2", self.k2))
        if self.k2 < self.k1:
            raise ValueError(f"TBPTT's k2 must be at least k1 = {self.k1}, got {self.k2}")
        if self.loss not in ("window", "last"):
            raise ValueError(f"TBPTT's loss must be 'window' or 'last', got {self.loss!r}")

    def __repr__(self) -> str:
        loss = "" if self.loss == "window" else f", loss={self.loss!r}"
        return f"TBPTT(k1={self.k1}, k2={self.k2}{loss})"

    @property
    def last_only(self) -> bool:  # type: ignore[override]
        """Whether only the loss of a window's last step counts."""
        return self.loss == "last"


@dataclass(frozen=True)
class Sliding(Windowed):
    """Sliding truncation: the loss of every step reaches ``tau`` steps back.

    The sum over products of step Jacobians with its first ``tau`` terms, for every step alike:
    step t's loss runs through the steps t, t - 1, ..., t - tau + 1. The same as TBPTT(1, tau).

    Args:
        tau: steps that a loss runs through, at least 1. With tau >= T it is full
            backpropagation through time.

    Raises:
        TypeError: ``tau`` is not an int.
        ValueError: ``tau`` is less than 1.
    """

    tau: int
    k1: ClassVar[int] = 1
    last_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "tau", _positive_int("Sliding's tau", self.tau))

    @property
    def k2(self) -> int:  # type: ignore[override]
        """Steps in a window."""
        return self.tau


@dataclass(frozen=True, eq=False)
class Gated(Truncation):
    """Gates of one's own on the gradient's way back from each step to the one before.

        lambda_t = g_t + kappa_{t+1} J_{t+1}^T lambda_{t+1}

    with g_t the loss's own gradient in the state of step t and J_t = dh_t / dh_{t-1}. kappa_t
    stands between the steps t - 1 and t, kappa_0 between ``hx`` and step 0; 1 lets the gradient
    through and 0 cuts it. The gate is the same for every layer and, in an LSTM, for h and c; the
    two directions of a bidirectional network share the gate between two steps (the backward
    direction's own initial state has none).

    Args:
        kappa: [T] for all sequences alike, or [T, B]; floating point, finite. Time comes first
            also with ``batch_first``. A packed batch takes it in the caller's order of sequences;
            what lies beyond a sequence's end is not used.

    Raises:
        TypeError: ``kappa`` is no floating-point tensor.
        ValueError: ``kappa`` has another number of dimensions, requires a gradient (it gets
            none), or holds NaN or infinity (RuntimeError where it is made in compiled code).
    """

    kappa: Tensor

    def __post_init__(self) -> None:
        kappa = self.kappa
        if not isinstance(kappa, Tensor) or not kappa.is_floating_point():
            got = kappa.dtype if isinstance(kappa, Tensor) else type(kappa).__name__
            raise TypeError(f"Gated's kappa must be a floating-point tensor, got {got}")
        if kappa.dim() not in (1, 2):
            raise ValueError(
                f"Gated's kappa must have shape [T] or [T, B], got {tuple(kappa.shape)}"
            )
        if kappa.requires_grad:
            raise ValueError("Gated's kappa must not require a gradient, since it gets none")
        check_all(torch.isfinite(kappa), "Gated's kappa must be finite, got NaN or infinity in it")

    def __repr__(self) -> str:
        return f"Gated(kappa=<{'x'.join(map(str, self.kappa.shape))} {self.kappa.dtype}>)"


@dataclass(frozen=True)
class Randomized(Truncation):
    """Randomized truncation: cut at random places, and unbiased.

    Between two steps the gradient is cut with probability c and otherwise multiplied by
    1 / (1 - c), so that the expectation of every product of gates is 1 and the mean gradient is
    that of full backpropagation through time. Give one of

    - ``pi``: independent gates, 1 / pi with probability pi and else 0;
    - ``mean_length``: c = 1 / mean_length, segments of that mean length; with ``alpha`` as well,
      the power law of Tallec and Ollivier, "Unbiasing Truncated Backpropagation Through Time",
      2017: c = (alpha - 1) / ((alpha - 2) mean_length + d) at d steps after the last cut, by
      which long segments are rare but not exponentially rare, and the gates stay small.

    Every call draws anew. ``draw`` does the same outside a call, and ``last`` is what the most
    recent draw gave, to read back or to use again.

    Where ``torch.utils.checkpoint`` runs a call again in a backward pass, the gates are those of
    the first time and ``last`` stays. It sets torch's default generator back for that
    (``preserve_rng_state``, its default); a generator of one's own is set back here, for each of
    the last 1024 calls without recorded gradients or with hooks on saved tensors, as checkpoint's
    are. Such a call is told by a number that it takes from the default generator. A call that is
    not found draws anew: outputs and the mean gradient are the same.

    Args:
        pi: probability that the gradient passes, in (0, 1].
        mean_length: mean length of a segment in steps, more than 1.
        alpha: exponent of the power law, more than 2.
        generator: where the draws come from; None is torch's default generator. torch.compile
            takes no other without a graph break.
        per_sequence: draw for each sequence of a batch by itself, rather than once for all.

    Raises:
        TypeError: an argument of another type.
        ValueError: a number out of its range, not exactly one of ``pi`` and ``mean_length``, or
            ``alpha`` without ``mean_length``.
    """

    pi: float | None = None
    mean_length: float | None = None
    alpha: float | None = None
    generator: torch.Generator | None = field(default=None, repr=False)
    per_sequence: bool = False
    # One place, so that a compiled program need not look at how many there are.
    _last: list[Gated | None] = field(
        default_factory=lambda: [None], init=False, repr=False, compare=False
    )
    # The generator's states before calls that may be run again, by the number that tells a call.
    _states: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if (self.pi is None) == (self.mean_length is None):
            raise ValueError(
                "Randomized must have one of pi and mean_length, "
                f"got pi={self.pi} and mean_length={self.mean_length}"
            )
        if self.pi is not None and not 0 < _real("Randomized's pi", self.pi) <= 1:
            raise ValueError(f"Randomized's pi must be in (0, 1], got {self.pi}")
        if self.mean_length is not None:
            length = _real("Randomized's mean_length", self.mean_length)
            if not 1 < length < math.inf:
                raise ValueError(f"Randomized's mean_length must be more than 1, got {length}")
        if self.alpha is not None:
            if self.mean_length is None:
                raise ValueError("Randomized's alpha goes with mean_length, got pi")
            if not 2 < _real("Randomized's alpha", self.alpha) < math.inf:
                raise ValueError(f"Randomized's alpha must be more than 2, got {self.alpha}")
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(
                "Randomized's generator must be a torch.Generator, "
                f"got {type(self.generator).__name__}"
            )
        if not isinstance(self.per_sequence, bool):
            raise TypeError(f"Randomized's per_sequence must be a bool, got {self.per_sequence!r}")

    def __repr__(self) -> str:
        names = ("pi", "mean_length", "alpha")
        words = [f"{n}={getattr(self, n)}" for n in names if getattr(self, n) is not None]
        return f"Randomized({', '.join(words + ['per_sequence=True'] * self.per_sequence)})"

    @property
    def last(self) -> Gated | None:
        """The gates of the most recent draw, or None before the first.

        A compiled call sets it to the tensor that the program drew.
        """
        return self._last[0]

    def draw(self, steps: int, batch: int = 1) -> Gated:
        """Draws the gates of one call.

        Args:
            steps: T, at least 1.
            batch: B; its size only matters with ``per_sequence``.

        Returns:
            Gates of shape [T], or [T, B] with ``per_sequence``; float64, on the CPU unless the
            generator is elsewhere. The first is 1: where a sequence begins nothing is cut.
        """
        return self._new(_positive_int("steps", steps), batch)

    def _new(self, steps: int, batch: int) -> Gated:
        gates = self._last[0] = self._gates(steps, batch)
        return gates

    def draw_for_call(self, steps: int, batch: int) -> Gated:
        """As ``draw``; but where a backward pass runs a call again, the gates that it had."""
        if torch.compiler.is_compiling():
            return self._new(steps, batch)  # steps may be a symbol
        runs_again = torch._C._current_graph_task_id() != -1
        generator = self.generator
        if generator is None:
            return self._gates(steps, batch) if runs_again else self.draw(steps, batch)
        may_run_again = (
            not torch.is_grad_enabled()
            or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        )
        if runs_again or may_run_again:
            call = int(torch.randint(2**62, (), device="cpu"))
            if runs_again and call in self._states:
                now = generator.get_state()
                generator.set_state(self._states[call])
                try:
                    return self._gates(steps, batch)
                finally:
                    generator.set_state(now)
            self._states.pop(call, None)  # to be the newest
            self._states[call] = generator.get_state()
            while len(self._states) > _CALLS_KEPT:
                del self._states[next(iter(self._states))]
        return self.draw(steps, batch)

    def _gates(self, steps: int, batch: int) -> Gated:
        columns = batch if self.per_sequence else 1
        device = self.generator.device if self.generator is not None else torch.device("cpu")
        options = {"dtype": torch.float64, "device": device}
        # c and the probability that a segment is longer than d, for d = 1 .. T.
        after = torch.arange(1, steps + 1, **options)
        if self.pi is not None:
            cut = torch.full_like(after, 1 - self.pi)
        elif self.alpha is None:
            cut = torch.full_like(after, 1 / self.mean_length)
        else:
            cut = (self.alpha - 1) / ((self.alpha - 2) * self.mean_length + after)
        survival = torch.cumprod(1 - cut, 0)
        # Lengths of segments by inversion, a segment a step at most: -S is ascending in d.
        # A trace takes symbols for sizes where no generator is named.
        source = {} if self.generator is None else {"generator": self.generator}
        uniform = torch.rand(steps, columns, **source, **options)
        lengths = torch.searchsorted(-survival, -uniform.contiguous(), right=False) + 1
        begins = torch.cumsum(lengths, 0)
        is_cut = torch.zeros(steps + 1, columns, dtype=torch.bool, device=device)
        is_cut.scatter_(0, begins.clamp(max=steps), 1)  # torch.jit's tracer knows no True here
        is_cut = is_cut[:steps]
        # Steps since the last cut, where the sequence's own beginning counts as one.
        place = torch.arange(steps, device=device).unsqueeze(1)
        before = torch.cummax(place * is_cut, 0).values.roll(1, 0)
        before[0] = 0
        since = (place - before).clamp(min=1)
        kappa = torch.where(is_cut, 0.0, 1 / (1 - cut[since - 1]))
        kappa[0] = 1
        return Gated(kappa if self.per_sequence else kappa[:, 0])


def as_truncation(value: Truncation | int | None) -> Truncation | None:
    """What a ``truncation`` argument stands for: an int ``k`` is short for ``Chunked(k)``.

    Raises:
        TypeError: ``value`` is neither None, an int nor a truncation.
        ValueError: ``value`` is an int less than 1.
    """
    if value is None or isinstance(value, Truncation):
        return value
    if _as_int(value) is None:
        raise TypeError(
            "truncation must be None, an int or a truncation such as fastbptt.Chunked, "
            f"got {value!r} of type {type(value).__name__}"
        )
    return Chunked(_positive_int("truncation", value))
