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
    result_dtypes = _result_dtypes(call, dtype) if device == "cpu" else None
    if ops.is_watched(call.input):
        call.weights = [_cast(weight, dtype) for weight in call.weights]
    else:
        call.weights = _C.autocast_weights(call.weights, call.input)
    call.input = _cast(call.input, dtype)
    if call.states is not None:
        call.states = tuple(_cast(state, dtype) for state in call.states)
    if result_dtypes is None:
        return None
    of_h, of_c = result_dtypes
    return lambda output, h_n, c_n: (output.to(of_h), h_n.to(of_h), c_n.to(of_c))


def _result_dtypes(call: Call, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype] | None:
    """The dtypes of h and c under autocast on a CPU, as torch.nn's; None: those computed.

    On a CPU the products alone are autocast. What is added to a state afterwards has the wider
    dtype of the two, but for oneDNN's LSTM, which autocast gives all of its arguments. Where the
    processor cannot run oneDNN's in autocast's dtype, torch.nn.LSTM fails on float32; then results
    have autocast's dtype, as on other processors.
    """
    module, input = call.net, call.input
    if input.dtype == torch.float64:
        return None
    last = (call.states or (input,))[-1].dtype  # of h, or of an LSTM's c
    if module.mode == "GRU":
        h = torch.promote_types(last, dtype)
        return h, h
    if module.mode != "LSTM":
        return None
    if call.packed is None and module.proj_size == 0 and _torch_asks_onednn(input):
        return None
    c = torch.promote_types(last, dtype)
    return (dtype if module.proj_size > 0 else c), c


def _torch_asks_onednn(input: Tensor) -> bool:
    """Whether torch hands an LSTM on a CPU to oneDNN; in 16 bits that depends on the processor."""
    if not torch._C._get_mkldnn_enabled() or input.numel() == 0:
        return False
    if input.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if input.dtype == torch.float16:
        return not torch.is_grad_enabled() and torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return True


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)  # autocast leaves float64
