"""What stands between two steps of a loop: states pass as they are, their gradients do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_Context = torch.autograd.function.FunctionCtx


class Gate(torch.autograd.Function):
    """The state as it is; its derivative times kappa, and zero where kappa is, even of a NaN."""

    generate_vmap_rule = True

    @staticmethod
    def forward(state: Tensor, kappa: Tensor) -> Tensor:
        return state.clone()

    @staticmethod
    def setup_context(ctx: _Context, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        _, kappa = inputs
        ctx.save_for_backward(kappa)
        ctx.save_for_forward(kappa)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:
        (kappa,) = ctx.saved_tensors
        return (kappa * grad).masked_fill(kappa == 0, 0), None

    @staticmethod
    def jvp(ctx: _Context, state_t: Tensor, _: object) -> Tensor:
        (kappa,) = ctx.saved_tensors
        return (kappa * state_t).masked_fill(kappa == 0, 0)


class Clip(torch.autograd.Function):
    """The state as it is; its gradient clamped to [-bound, bound], each number by itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(state: Tensor, bound: float) -> Tensor:
        return state.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        _, ctx.bound = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Clamped.apply(grad, ctx.bound), None


class _Clamped(torch.autograd.Function):
    """A gradient clamped, which has none itself.

    What a second backward pass sends through the states would come to Clip again, and be clamped
    as if it were a gradient of the first: no derivative of anything.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, bound: float) -> Tensor:
        return grad.clamp(-bound, bound)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        raise NotImplementedError("clip_grad has no gradient of gradients")
