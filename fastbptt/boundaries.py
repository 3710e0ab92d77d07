"""What a call's truncation and resets come to, step by step, in the order of its input's rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastbptt.truncation import Gated, Randomized, Windowed, check_all

if TYPE_CHECKING:
    from fastbptt.call import Call

__all__ = ["Boundaries", "boundaries_of", "resets_from_dones"]


class Boundaries(NamedTuple):
    """The operators' arguments for it."""

    k1: int = 0  # windows, or 0 for none
    k2: int = 0
    last_only: bool = False
    resets: Tensor | None = None  # bool, like input without its features
    kappa: Tensor | None = None  # of input's dtype, likewise


def resets_from_dones(
    dones: Tensor, initial: Tensor | bool | None = None, *, batch_first: bool = False
) -> Tensor:
    """Turns a rollout's ``dones`` into the ``resets`` of a recurrent call.

    The two are one step apart. ``dones[t]`` says that the episode ended *after* step t, as
    environments report it; ``resets[t]`` says that the state *entering* step t is zeros:

        t         0      1      2      3
        dones     False  True   False  False     the step at t = 1 was an episode's last
        resets    ?      False  True   False     so the step at t = 2 begins the next one

    ``initial`` fills the place of the question mark: whether the first step of the rollout begins
    an episode, that is ``dones`` of the step before the rollout. If the state that a rollout
    begins with is passed as ``hx`` and already has zeros there, it may be left out.

    Args:
        dones: [T], [T, B], or [B, T] with ``batch_first``; bool, or numbers 0 and 1.
        initial: the first step's resets: a bool, or [B] like ``dones``; None is False.
        batch_first: whether ``dones`` is [B, T].

    Returns:
        resets: bool, of the shape of ``dones``.

    Raises:
        TypeError: ``dones`` is no tensor, ``initial`` neither a bool nor a tensor, or one complex.
        ValueError: a shape is not as above, or a value is neither 0 nor 1 (in compiled code the
            latter is a RuntimeError).
    """
    if not isinstance(dones, Tensor):
        raise TypeError(f"dones must be a tensor, got {type(dones).__name__}")
    if dones.dim() not in (1, 2):
        raise ValueError(f"dones must have 1 or 2 dimensions, got shape {tuple(dones.shape)}")
    dones = _as_bool("dones", dones)
    time = 1 if batch_first and dones.dim() == 2 else 0
    if dones.size(time) == 0:
        return dones
    first = torch.zeros_like(dones.select(time, 0))
    if isinstance(initial, Tensor):
        if initial.shape not in (first.shape, torch.Size()):
            raise ValueError(
                f"initial must have shape {tuple(first.shape)}, got {tuple(initial.shape)}"
            )
        first = _as_bool("initial", initial).to(first.device).expand_as(first)
    elif isinstance(initial, bool):
        first = torch.full_like(first, initial)
    elif initial is not None:
        raise TypeError(f"initial must be None, a bool or a tensor, got {type(initial).__name__}")
    before = dones.narrow(time, 0, dones.size(time) - 1)
    return torch.cat([first.unsqueeze(time), before], time)


def _as_bool(name: str, values: Tensor) -> Tensor:
    if values.dtype == torch.bool:
        return values
    if values.is_complex():
        raise TypeError(f"{name} must hold bools or the numbers 0 and 1, got {values.dtype}")
    flags = values != 0
    zero_or_one = values == flags.to(values.dtype)
    check_all(zero_or_one, f"{name} must hold 0 and 1 alone, got other values")
    return flags


def _check_shape(name: str, values: Tensor, fits: list[tuple[int | None, ...]]) -> None:
    shape = tuple(values.shape)
    for wanted in fits:  # None is a size that is not known
        if len(shape) == len(wanted) and all(
            b is None or a == b for a, b in zip(shape, wanted, strict=True)
        ):
            return
    raise ValueError(f"{name} must have shape {' or '.join(map(str, fits))}, got {shape}")


def batch_of(packed: PackedSequence) -> int | None:
    """How many sequences there are; None in a compiled program, whose sizes are not data."""
    return None if torch.compiler.is_compiling() else int(packed.batch_sizes[0])


def _packed_rows(table: Tensor, packed: PackedSequence) -> Tensor:
    """[T] or [T, B] in the caller's order of sequences, as rows like a packed input's, [N]."""
    data, sizes, order, _ = packed
    step = torch.arange(sizes.numel()).repeat_interleave(sizes, output_size=data.shape[0])
    if table.dim() == 1:
        return table[step.to(table.device)]
    before = sizes.cumsum(0) - sizes
    sequence = (torch.arange(data.shape[0]) - before[step]).to(table.device)
    return table[step.to(table.device), sequence if order is None else order[sequence]]


def boundaries_of(call: Call) -> Boundaries:
    """Checks a call's truncation and resets against its input and lays them out like its rows.

    Raises:
        TypeError: ``resets`` is no bool tensor.
        ValueError: a shape or device does not fit, or windows overlap (k1 < k2) and the network is
            bidirectional.
    """
    truncation, resets, input, packed = call.truncation, call.resets, call.input, call.packed
    batch_first = call.batch_first
    if packed is None:
        steps, batch = input.shape[:2]
        if batch_first:
            steps, batch = batch, steps
    else:
        steps, batch = packed.batch_sizes.numel(), batch_of(packed)

    def rows(table: Tensor) -> Tensor:
        """[T] or [T, B] in the order of the input's rows."""
        if packed is not None:
            return _packed_rows(table, packed)
        if table.dim() == 1:
            table = table.unsqueeze(1).expand(steps, batch)
        return table.t() if batch_first else table

    k1 = k2 = 0
    last_only = False
    kappa = None
    if isinstance(truncation, Windowed):
        k1, k2, last_only = truncation.k1, truncation.k2, truncation.last_only
        if k2 > k1 and call.net.bidirectional:
            raise ValueError(
                f"truncation={truncation} has windows that overlap (k1 < k2), which a bidirectional"
                " network cannot have: run again on a window, its backward direction would begin"
                " at the window's end, from another state than in the whole sequence"
            )
    elif isinstance(truncation, Gated | Randomized):
        if isinstance(truncation, Randomized):
            if batch is None and truncation.per_sequence:
                batch = int(packed.batch_sizes[0])  # how many to draw is data after all
            truncation = truncation.draw_for_call(steps, batch or 1)
        kappa = truncation.kappa
        _check_shape("kappa", kappa, [(steps,), (steps, batch)])
        kappa = rows(kappa.to(input.device, input.dtype))
    elif truncation is not None:
        raise TypeError(f"truncation must be one of fastbptt's, got {type(truncation).__name__}")
    if resets is not None:
        if not isinstance(resets, Tensor):
            raise TypeError(f"resets must be a bool tensor, got {type(resets).__name__}")
        if resets.dtype != torch.bool:
            raise TypeError(f"resets must have dtype torch.bool, got {resets.dtype}")
        wide = (batch, steps) if batch_first else (steps, batch)
        _check_shape("resets", resets, [(steps,)] if call.unbatched else [(steps,), wide])
        if resets.device != input.device:
            raise ValueError(
                f"resets must be on input's device {input.device}, got {resets.device}"
            )
        resets = rows(resets.t() if batch_first and resets.dim() == 2 else resets)
    return Boundaries(k1, k2, last_only, resets, kappa)
