"""What a call may ask for beside truncation and resets, checked."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import is_tensor_like

from fastbptt import onnx
from fastbptt.truncation import _real

if TYPE_CHECKING:
    from fastbptt.call import Call


class Options(NamedTuple):
    """Of a call."""

    return_states: bool = False
    reset_to: Any = None  # as given; None: zeros
    clip_grad: float | None = None

    def names(self) -> str:
        """Those that are used, for a message."""
        used = [name for name, value in self._asdict().items() if value is not None]
        return " and ".join(name for name in used if name != "return_states" or self.return_states)


def as_clip_grad(value: object) -> float | None:
    """What a ``clip_grad`` argument stands for.

    Raises:
        TypeError: ``value`` is neither None nor a number.
        ValueError: it is not positive, or not finite.
    """
    if value is None:
        return None
    bound = _real("clip_grad", value)
    if not 0 < bound < math.inf:
        raise ValueError(f"clip_grad must be positive and finite, got {value!r}")
    return bound


def options_of(
    return_states: object, reset_to: object, clip_grad: float | None, resets: object
) -> Options | None:
    """A call's options, or None if there are none.

    Raises:
        TypeError: ``return_states`` is no bool.
        ValueError: ``reset_to`` is given and ``resets`` are not.
        NotImplementedError: the gradient is to be clipped, and ``torch.jit.trace`` or forward mode
            is at work.
    """
    if not isinstance(return_states, bool):
        raise TypeError(
            f"return_states must be a bool, got {return_states!r} of type "
            f"{type(return_states).__name__}"
        )
    if reset_to is not None and resets is None:
        raise ValueError("reset_to must go with resets, which say where, got none")
    if clip_grad is not None:
        if forward_ad._current_level >= 0:
            raise NotImplementedError(
                f"forward mode cannot have clip_grad={clip_grad}, which bounds what goes backward"
            )
        if not torch.is_grad_enabled() or onnx.is_exporting():
            clip_grad = None
        elif torch.jit.is_tracing():
            raise NotImplementedError(
                f"torch.jit.trace cannot have clip_grad={clip_grad}, which the programs that it "
                "saves could not hold: trace under torch.no_grad(), or with clip_grad=None"
            )
    if not return_states and reset_to is None and clip_grad is None:
        return None
    return Options(return_states, reset_to, clip_grad)


def reset_states(call: Call, widths: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What the states become at a reset: [T, B, L*D, ...] each, in the caller's order of sequences.

    Args:
        call: with checked input, whose options it has.
        widths: the features of each state.
        dtype: that it is given.

    Raises:
        TypeError: ``reset_to`` holds something else than a Tensor for each state.
        ValueError: one is not floating point, has another shape, or is on another device.
    """
    given, count = call.options.reset_to, len(widths)
    if given is None:
        return ()
    if count == 1:
        given = (given,)
    elif not isinstance(given, tuple | list) or len(given) != count:
        got = f"{len(given)} of them" if isinstance(given, tuple | list) else type(given).__name__
        raise TypeError(
            f"reset_to must be a tuple of {count} Tensors, one for each state of {call.cell}, "
            f"got {got}"
        )
    names = ("reset_to",) if count == 1 else tuple(f"reset_to[{i}]" for i in range(count))
    return tuple(
        _by_step(name, value, call, width).to(dtype)
        for name, value, width in zip(names, given, widths, strict=True)
    )


def _by_step(name: str, value: Any, call: Call, width: int) -> Tensor:
    if not isinstance(value, Tensor) and not is_tensor_like(value):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {value.dtype}")
    if value.device != call.input.device:
        raise ValueError(
            f"{name} must be on input's device {call.input.device}, got {value.device}"
        )
    steps, batch = sizes_of(call)
    layers = call.net.num_layers * (2 if call.net.bidirectional else 1)
    shape, per_step = tuple(value.shape), (layers, steps, batch, width)
    if call.unbatched:
        fits = [(layers, width), (layers, steps, width)]
        if shape in fits:
            value = value.unsqueeze(-2)
    else:
        swapped = (layers, batch, steps, width) if call.batch_first else per_step
        fits = list(dict.fromkeys([(layers, batch, width), (layers, 1, width), swapped]))
        if call.batch_first and len(shape) == 4:
            value = value.transpose(1, 2)
    if shape not in fits:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, fits))}, got {shape}")
    if value.dim() == 3:
        value = value.unsqueeze(1)
    return value.expand(per_step).movedim(0, 2)


def sizes_of(call: Call) -> tuple[int, int]:
    """T and B."""
    if call.packed is not None:
        return len(call.packed.batch_sizes), int(call.packed.batch_sizes[0])
    first, second = call.input.shape[:2]
    return (second, first) if call.net.batch_first else (first, second)
