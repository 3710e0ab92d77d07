"""A call of a module with all that goes with it, run by the module and by the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

import fastbptt
from common import Case, Results, parts, referee, step, tensors_of, whole
from fastbptt import Gated, Randomized


@dataclass(frozen=True)
class Gates:
    """Gated, described: every value of kappa is one of those, zeros among them."""

    per_sequence: bool = False
    dtype: torch.dtype = torch.float64

    VALUES: ClassVar[Tensor] = torch.tensor([0.0, 1.0, 1.0, 0.25, 1.75, -0.5])

    def __call__(self, case: Case) -> Gated:
        # In a packed batch there are random gates beyond the sequences' ends too.
        shape = (case.T, case.B) if self.per_sequence and case.B is not None else (case.T,)
        generator = torch.Generator().manual_seed(case.seed + 2)
        return Gated(self.VALUES[torch.randint(6, shape, generator=generator)].to(self.dtype))


@dataclass(frozen=True)
class Draws:
    """Randomized, described: each one made of it draws the same."""

    options: tuple[tuple[str, float], ...]

    def __call__(self, case: Case) -> Randomized:
        generator = torch.Generator().manual_seed(case.seed + 3)
        return Randomized(**dict(self.options), generator=generator)


@dataclass(frozen=True)
class Call:
    """A call of a module, and what of it is differentiated."""

    case: Case
    truncation: object = None  # or Gates, or Draws
    resets: str = "none"  # given?, and which: see make_resets
    dropout: float = 0.0
    recompute: bool = False
    through: tuple[str, ...] = ("output", "h_n", "c_n")

    def __str__(self) -> str:  # the test's id
        extras = {"resets": self.resets != "none", "dropout": self.dropout > 0}
        extras = [name for name, there in extras.items() if there]
        return " ".join([self.case.cell, str(self.case), str(self.truncation), *extras])

    def in_dtype(self, dtype: torch.dtype) -> Call:
        return replace(self, case=replace(self.case, dtype=dtype))

    def make_truncation(self):
        made = isinstance(self.truncation, Gates | Draws)
        return self.truncation(self.case) if made else self.truncation

    def make_resets(self) -> Tensor | None:
        case = self.case
        if self.resets == "none":
            return None
        shape = (case.T,) if self.resets == "by step" or case.B is None else (case.T, case.B)
        density = {"never": 0.0, "always": 1.0}.get(self.resets, 0.3)
        generator = torch.Generator().manual_seed(case.seed + 4)
        resets = torch.rand(shape, generator=generator) < density
        is_turned = case.batch_first and case.lengths is None and resets.dim() == 2
        return resets.T if is_turned else resets

    def seed_dropout(self) -> None:
        if self.dropout > 0:  # seeding every device takes as long as a small pass
            torch.manual_seed(self.case.seed)

    def make_masks(self, device: str = "cpu") -> list[Tensor]:
        """The masks that the module draws: the seed's first numbers, one layer after another."""
        case = self.case
        width = (case.proj or case.H) * (2 if case.bidirectional else 1)
        rows = tensors_of((case.data()[0], None))[0].shape[:-1]
        keep = 1 - self.dropout
        gaps = range(case.layers - 1 if self.dropout > 0 else 0)
        time_first = case.batch_first and len(rows) == 2  # torch draws so in any layout
        rows = rows[::-1] if time_first else rows
        options = {"dtype": case.dtype, "device": device}
        masks = [torch.empty(*rows, width, **options).bernoulli_(keep).cpu() for _ in gaps]
        return [(mask.transpose(0, 1) if time_first else mask).div_(keep) for mask in masks]

    def module(self):
        options = {"recompute": True} if self.recompute else {}
        return self.case.module(dropout=self.dropout, **options)

    def run(self, function: Callable, module, device: str = "cpu") -> Results:
        x, hx = self.case.data()
        hx = whole([state.to(device) for state in parts(hx)])
        results = step(module, x.to(device), hx, call=function, through=self.through)
        return {name: result.cpu() for name, result in results.items()}

    def ours(self, device: str = "cpu") -> Results:
        module = self.module().to(device)

        def call(input, hx=None):
            truncation, resets = self.make_truncation(), self.make_resets()
            resets = None if resets is None else resets.to(device)
            self.seed_dropout()
            return module(input, hx, truncation=truncation, resets=resets)

        return self.run(call, module, device)

    def reference(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Results:
        """By the reference's loops, on the CPU; with the masks that the device's module draws."""
        module = referee(self.module())[0].to(dtype)

        def call(input, hx=None):
            self.seed_dropout()
            masks = [mask.to(dtype) for mask in self.make_masks(device)]
            return fastbptt.reference.run(
                module,
                input,
                hx,
                truncation=self.make_truncation(),
                resets=self.make_resets(),
                dropout_masks=masks,
            )

        results = self.run(call, module)
        # What no loss depends on has no gradient in plain autograd, where the kernels give zeros.
        names = [*("dhx", "dcx")[: len(parts(self.case.data()[1]))], "dinput"]
        leaves = dict(zip(names, [*parts(self.case.data()[1]), self.case.data()[0]], strict=True))
        leaves |= {"d" + name: p for name, p in module.named_parameters()}
        for name, leaf in leaves.items():
            results.setdefault(name, torch.zeros_like(getattr(leaf, "data", leaf), dtype=dtype))
        return results
