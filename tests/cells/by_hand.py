"""What the tests of networks by hand share: gradients by name, comparison, packed sequences."""

from __future__ import annotations

import torch

from common import cotangent
from fastbptt import Gated, Randomized


def gradients(leaves, output, last, every, **options):
    """Outputs and gradients by name; a loss in the states, too."""
    results = [output, *last, *every]
    grads = [cotangent(t, i) for i, t in enumerate(results)]
    found = torch.autograd.grad(results, leaves.values(), grads, allow_unused=True, **options)
    given = {f"result {i}": t for i, t in enumerate(results)}
    return given, dict(zip(leaves, found, strict=True))


def assert_equal(got, want):
    for (a, b), rtol in zip(zip(got, want, strict=True), (1e-11, 1e-9), strict=True):
        assert a.keys() == b.keys()
        for name, value in b.items():
            if value is None or a[name] is None:
                zero = a[name] if value is None else value
                assert zero is None or not zero.any(), name
                continue
            torch.testing.assert_close(
                a[name], value, rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{n}: {m}"
            )


def of_sequence(truncation, n, b):
    """What sequence b, of n steps, has of a batch's truncation."""
    own = truncation.last if isinstance(truncation, Randomized) else truncation
    if isinstance(own, Gated):
        return Gated(own.kappa[:n] if own.kappa.dim() == 1 else own.kappa[:n, b : b + 1])
    return own


def joined(runs, T):
    """One result of sequences' own ones (output, last, every), padded to T steps."""

    def padded(x):
        return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, T - x.shape[-3]))

    outputs, finals, kept = zip(*runs, strict=True)
    return (
        torch.cat([padded(output) for output in outputs], 1),
        [torch.cat(of_all, 1) for of_all in zip(*finals, strict=True)],
        [torch.cat(list(map(padded, of_all)), 2) for of_all in zip(*kept, strict=True)],
    )
