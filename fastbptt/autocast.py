"""What ``torch.autocast`` makes of a call: the dtype it computes in, and those of its results."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastbptt import _C, ops

if TYPE_CHECKING:
    from fastbptt.call import Call

DEVICES = {"cpu", "cuda"}  # where the kernels compute in autocast's dtype


def enter(call: Call) -> Callable[..., tuple[Tensor, Tensor, Tensor]] | None:
    """Gives a call's tensors the dtype that autocast wants, as torch.nn does.

    Returns:
        What gives the results the dtypes that torch.nn's have there; None if they have them.
    """
    device = call.input.device.type
    if device not in DEVICES or not torch.is_autocast_enabled(device):
        return None
    dtype = torch.get_autocast_dtype(device)
    module = call.net
    wanted = result_dtypes(
        module.mode,
        call.input,
        (call.states or (call.input,))[-1].dtype,
        call.packed is not None,
        module.proj_size,
        dtype,
    )
    if ops.is_watched(call.input):
        call.weights = [cast(weight, dtype) for weight in call.weights]
    else:
        call.weights = _C.autocast_weights(call.weights, call.input)
    call.input = cast(call.input, dtype)
    if call.states is not None:
        call.states = tuple(cast(state, dtype) for state in call.states)
    if wanted is None:
        return None
    of_h, of_c = wanted
    return lambda output, h_n, c_n: (output.to(of_h), h_n.to(of_h), c_n.to(of_c))


# The functions from here on are TorchScript too: scripted modules call them.


def product_dtype(input: Tensor) -> torch.dtype | None:
    """The dtype of autocast on input's device, found by a product of nothing; None if it is off.

    For scripted modules. TorchScript has functions that ask for autocast, and crashes in them when
    it is on.
    """
    nothing = torch.empty((0, 0), dtype=torch.float32, device=input.device)
    dtype = torch.mm(nothing, nothing).dtype
    return None if dtype == torch.float32 else dtype


def result_dtypes(
    mode: str,
    input: Tensor,
    last_state: torch.dtype,
    packed: bool,
    proj_size: int,
    dtype: torch.dtype,
) -> tuple[torch.dtype, torch.dtype] | None:
    """The dtypes of h and c under autocast, as torch.nn's; None: those computed.

    On a CPU the products alone are autocast. What is added to a state afterwards has the wider
    dtype of the two, but for oneDNN's LSTM, which autocast gives all of its arguments. Where the
    processor cannot run oneDNN's in autocast's dtype, torch.nn.LSTM fails on float32; then results
    have autocast's dtype, as on other processors.

    Args:
        mode: the module's.
        input: as it was given.
        last_state: the dtype of h, or of an LSTM's c; input's, if no states were given.
        packed: whether input is the data of a PackedSequence.
        proj_size: the module's.
        dtype: autocast's.
    """
    if not input.is_cpu or input.dtype == torch.float64:
        return None
    widest = torch.promote_types(last_state, dtype)
    if mode == "GRU":
        return widest, widest
    if mode != "LSTM":
        return None
    if not packed and proj_size == 0 and _torch_asks_onednn(input):
        return None
    return (dtype if proj_size > 0 else widest), widest


def _torch_asks_onednn(input: Tensor) -> bool:
    """Whether torch hands an LSTM on a CPU to oneDNN; in 16 bits that depends on the processor."""
    if not torch.backends.mkldnn.enabled or input.numel() == 0:
        return False
    if input.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if input.dtype == torch.float16:
        return not torch.is_grad_enabled() and torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return True


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as autocast gives it to a function in its dtype."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)  # autocast leaves float64
