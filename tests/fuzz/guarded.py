"""Tensors whose memory ends where a page does, with pages around it that nobody may touch."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_PAGE = mmap.PAGESIZE
_NOTHING = 0  # PROT_NONE


def _protect(begin: int, length: int, protection: int) -> None:
    if _libc.mprotect(begin, length, protection) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded(tensor: Tensor, at_end: bool = True, writable: bool = False) -> Tensor:
    """The same values and strides in memory of their own, which is freed with the tensor.

    A step beyond it, at the end of the memory or before its begin, ends the process; so does a
    write, unless it is writable.
    """
    if tensor.numel() == 0:
        return tensor
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    size = extent * tensor.element_size()
    pages = -(-size // _PAGE) * _PAGE
    memory = mmap.mmap(-1, pages + 2 * _PAGE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    offset = _PAGE + (pages - size if at_end else 0)
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=extent, offset=offset)
    result = flat.as_strided(tensor.shape, tensor.stride())
    flat.copy_(tensor.as_strided((extent,), (1,), tensor.storage_offset()))
    _protect(begin, _PAGE, _NOTHING)
    _protect(begin + _PAGE + pages, _PAGE, _NOTHING)
    if not writable:
        _protect(begin + _PAGE, pages, mmap.PROT_READ)
    return result
