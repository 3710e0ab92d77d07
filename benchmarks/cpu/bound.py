"""How fast a row could be on this machine: the arithmetic, or reading the recurrent weights.

The *bound* of a row is the longer of two times. One is that of its multiplications at the
processor's peak, measured as fused multiply-adds in registers. The other is that of reading W_hh
from the cache in every step, which limits rows with few sequences: each value read is used once a
sequence. Both are measured in the same rounds as ours, and beside them what a library's matrix
product makes of the same multiplications: torch.mm at the row's own shapes, and a large product.
Where the peak cannot be measured, for lack of a compiler, the large product is in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastbptt.truncation import Truncation

from ..common.files import Record
from ..common.rows import FORWARD, Row
from ..common.timing import Quartiles, paired_ratios
from .peak import NoPeak, PeakStep

PEAK, CACHE = "fma", "cache"
SGEMM, LARGE = "sgemm", "large sgemm"


def product_rows(row: Row, mode: str) -> int:
    """Rows that the row's products with one gate's weights have together.

    Forward there are two products of T B rows, by W_ih and W_hh; backward four: dpre by both, and
    the gradients of both. Windows that overlap run steps of the recurrence more than once.
    """
    if mode == FORWARD:
        return 2 * row.T * row.B
    cut, steps = row.truncation, row.T
    if cut is not None:
        firsts = range(0, row.T, cut.k1)  # steps of the windows' first losses
        steps = sum(min(t + cut.k1, row.T) - max(0, t + cut.k1 - cut.k2) for t in firsts)
    return (5 * row.T + steps) * row.B


def sequential_steps(T: int, truncation: Truncation | None, resets: Tensor | None) -> int:
    """Steps of a pass that must follow each other: what is cut apart can run side by side."""
    steps = T if truncation is None else min(T, truncation.k2)
    if resets is not None:
        cuts = [[0, *(1 + r[1:].nonzero().flatten()).tolist(), T] for r in resets.unbind(1)]
        steps = min(steps, max(end - begin for cut in cuts for begin, end in pairwise(cut)))
    return steps


def weight_reads(row: Row, mode: str, resets: Tensor | None = None) -> int:
    """How often a row's passes read W_hh: once a step, however many sequences there are."""
    forward = sequential_steps(row.T, None, resets)
    return forward if mode == FORWARD else forward + sequential_steps(row.T, row.truncation, resets)


class MatmulStep:
    """The same multiplications as plain sgemm.

    Each gate multiplies. Into buffers that are there already, so that it is arithmetic and nothing
    else. No bound: on some CPUs torch.mm's library is slower than the kernels here.
    """

    def __init__(self, row: Row, mode: str, gates: int) -> None:
        inputs = torch.randn(row.T * row.B, row.H, generator=torch.Generator().manual_seed(0))
        self.weight = torch.randn(row.H, gates * row.H, generator=torch.Generator().manual_seed(1))
        product = torch.full((row.T * row.B, gates * row.H), 0.0)  # filled: its pages are there
        whole, rest = divmod(product_rows(row, mode), len(inputs))
        self.products = [(inputs, product)] * whole
        if rest:
            self.products.append((inputs[:rest], product[:rest]))

    def clear(self) -> None:
        pass

    def run(self) -> None:
        for inputs, product in self.products:
            torch.mm(inputs, self.weight, out=product)


class LargeMatmulStep:
    """A product large enough for sgemm's full speed."""

    SIZE = 1024
    flops = 2 * SIZE**3

    def __init__(self) -> None:
        shape = (self.SIZE, self.SIZE)
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = (torch.randn(shape, generator=generator) for _ in range(2))
        self.product = torch.full(shape, 0.0)

    def clear(self) -> None:
        pass

    def run(self) -> None:
        torch.mm(self.a, self.b, out=self.product)


class CacheStep:
    """Reads a buffer as large as a core's share of W_hh, again and again.

    So it lies in the cache where the core's share would. It is torch's sum over a tensor that
    repeats the buffer without a copy: one call, split over the threads, each of which reads the
    whole buffer in turn. A loop of vector loads in C reads at most 8% faster, from every cache.
    """

    BYTES = 512 * 2**20  # a call, so that waking the threads costs nothing to speak of

    def __init__(self, H: int, gates: int, threads: int) -> None:
        share = max(1, gates * H * H // threads)
        repeats = max(threads, self.BYTES // (4 * share))
        self.buffer = torch.ones(share).expand(repeats, share)
        self.bytes = 4 * share * repeats

    def clear(self) -> None:
        pass

    def run(self) -> Tensor:
        return self.buffer.sum()


def _rate(count: float, seconds: Sequence[float]) -> Record:
    """Quartiles of 1e9 a second."""
    return Quartiles.of([count / t for t in seconds]).rounded(1e-9)


class Bound:
    """A row's bound: what to time beside ours, and what to make of the times."""

    def __init__(self, row: Row, mode: str, gates: int, resets: Tensor | None = None) -> None:
        self.flops = 2 * product_rows(row, mode) * gates * row.H * row.H
        self.read = 4 * gates * row.H * row.H * weight_reads(row, mode, resets)
        threads = torch.get_num_threads()
        self.cache, large = CacheStep(row.H, gates, threads), LargeMatmulStep()
        self.steps = {SGEMM: MatmulStep(row, mode, gates), CACHE: self.cache, LARGE: large}
        try:
            self.peak_by, self.peak = PEAK, PeakStep(threads)
            self.steps[PEAK] = self.peak
        except NoPeak:
            self.peak_by, self.peak = LARGE, large

    def record(self, ours: Sequence[float], seconds: Mapping[str, Sequence[float]]) -> Record:
        """The bound and our share of it, from times paired in the same rounds.

        ``by`` says which of the two it is, ``peak_by`` whether the peak is that of multiply-adds
        (:data:`PEAK`) or, in its place, a large product's (:data:`LARGE`). ``share``: quartiles of
        the bound's time over ours; ``peak_share`` and ``cache_share``: of either's. ``peak_ms``,
        ``cache_ms`` and ``sgemm_ms``: how long the row's multiplications take at the peak, its
        reads, and its multiplications by torch.mm. ``peak_gflops``, ``large_gflops`` and
        ``gb_per_s``: the measured rates. ``large_share``: our rate over a large product's.
        """
        peak = [t * self.flops / self.peak.flops for t in seconds[self.peak_by]]
        cache = [t * self.read / self.cache.bytes for t in seconds[CACHE]]
        large = [t * self.flops / LargeMatmulStep.flops for t in seconds[LARGE]]
        by_cache = Quartiles.of(cache).median > Quartiles.of(peak).median
        return {
            "by": CACHE if by_cache else self.peak_by,
            "share": paired_ratios(cache if by_cache else peak, ours).rounded(),
            "peak_by": self.peak_by,
            "peak_share": paired_ratios(peak, ours).rounded(),
            "cache_share": paired_ratios(cache, ours).rounded(),
            "large_share": paired_ratios(large, ours).rounded(),
            "peak_ms": Quartiles.of(peak).rounded(1e3),
            "cache_ms": Quartiles.of(cache).rounded(1e3),
            "sgemm_ms": Quartiles.of(seconds[SGEMM]).rounded(1e3),
            "peak_gflops": _rate(self.peak.flops, seconds[self.peak_by]),
            "large_gflops": _rate(LargeMatmulStep.flops, seconds[LARGE]),
            "gb_per_s": _rate(self.cache.bytes, seconds[CACHE]),
        }
