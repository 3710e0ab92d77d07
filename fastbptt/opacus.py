"""Per-sample gradients for Opacus: importing this lets it train fastbptt's modules privately.

    import fastbptt.opacus

    fastbptt.convert(model)
    model, optimizer, loader = PrivacyEngine().make_private(module=model, ...)

Opacus puts two hooks on a layer: one keeps its inputs, the other gets the gradient of its first
output. This is too little for a recurrent layer, whose loss may be one of its final states. So our
modules take these hooks themselves, and call the second with the gradients of each sequence, which
their own backward pass has computed from the gradients of all results.

Opacus is an optional dependency: ``pip install fastbptt[opacus]``.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks, register_grad_sampler
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from fastbptt import _transformed, nn
from fastbptt._derivatives import Network
from fastbptt._per_sample import by_sequence
from fastbptt._points import Net
from fastbptt.call import Call, has_kernel, needs_cells, run

__all__: list[str] = []


def _owner(hook: Any) -> GradSampleHooks | None:
    """The object of Opacus' whose method a hook is, or None for a hook of somebody else's."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    owner = getattr(hook, "__self__", None)
    return owner if isinstance(owner, GradSampleHooks) else None


class _Sampling:
    """How a module on which Opacus has put its hooks runs its calls.

    Attributes:
        after_forward, after_backward: the hooks, by their handles' ids; one each, or none any more.
        giving: the gradients that ``after_backward`` is being called with, or None.
    """

    def __init__(self) -> None:
        self.after_forward: OrderedDict[int, Callable] = OrderedDict()
        self.after_backward: OrderedDict[int, Callable] = OrderedDict()
        self.giving: dict[torch.nn.Parameter, tuple[int, ...]] | None = None

    def __call__(self, call: Call) -> tuple[Tensor | PackedSequence, tuple[Tensor, ...]]:
        if not self.after_forward or not torch.is_grad_enabled():
            return run(call)
        module, name = call.net, f"fastbptt.{type(call.net).__name__}"
        if call.unbatched:
            raise ValueError(f"{name}: Opacus needs a batch, but the input has none")
        if needs_cells(call):
            raise NotImplementedError(
                f"{name} has no per-sample gradients for Opacus with {call.options.names()}"
            )
        if not has_kernel(call.input):
            raise NotImplementedError(
                f"{name} has no per-sample gradients for {call.input.dtype} on "
                f"{call.input.device.type}, where there is no kernel"
            )
        sampled = _Sampled(call, self)
        make_net = functools.partial(_SampledNet, sampled=sampled)
        network = functools.partial(
            _transformed.network, function=_SampledNetwork, make_net=make_net
        )
        results = run(call, network)
        (hook,) = self.after_forward.values()
        # All that it asks of the inputs is how many sequences there are.
        rows = call.input.new_empty(sampled.num_sequences)
        before = len(getattr(module, "activations", ()))
        hook(module, [rows if _owner(hook).batch_first else rows[None]], None)
        sampled.is_captured = len(getattr(module, "activations", ())) > before
        return results

    def give(self, module: nn._Recurrent, samples: dict[torch.nn.Parameter, Tensor]) -> None:
        """Gives Opacus the gradients of parameters, [B, *shape]."""
        (hook,) = self.after_backward.values()
        # Together in one tensor, as if they were the gradient of an output.
        rows = torch.cat([sample.flatten(1) for sample in samples.values()], 1)
        self.giving = {parameter: parameter.shape for parameter in samples}
        try:
            hook(module, None, (rows if _owner(hook).batch_first else rows.T,))
        finally:
            self.giving = None


class _Sampled:
    """One call whose per-sample gradients Opacus wants.

    Attributes:
        module, sampling: whose.
        parameters: of the module, in the order of the operator's weights.
        num_sequences: B.
        order: which of the operator's sequences is sequence b of the batch, where they differ.
        is_captured: whether Opacus has taken note of the call.
    """

    def __init__(self, call: Call, sampling: _Sampling):
        self.module = call.net
        self.sampling = sampling
        self.parameters = self.module._weights()
        packed = call.packed
        if packed is None:
            self.num_sequences = call.input.shape[0 if call.batch_first else 1]
            self.order = None
        else:
            self.num_sequences = int(packed.batch_sizes[0])
            self.order = packed.unsorted_indices
        self.is_captured = False

    def is_wanted(self) -> bool:
        """Whether Opacus still listens: it computes some backward passes for the sums alone."""
        owner = [_owner(hook) for hook in self.sampling.after_backward.values()]
        return self.is_captured and bool(owner) and owner[0].hooks_enabled

    def give(self, gradients: Sequence[Tensor | None]) -> None:
        """Gives Opacus the gradients [B, *shape] of the weights, those that there are."""
        samples: dict[torch.nn.Parameter, Tensor] = {}
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is None:
                continue
            gradient = gradient.detach().to(parameter.dtype)
            if self.order is not None:
                gradient = gradient.index_select(0, self.order)
            known = samples.get(parameter)
            samples[parameter] = gradient if known is None else known + gradient
        if samples:
            self.sampling.give(self.module, samples)


@dataclass(frozen=True)
class _SampledNet(Net):
    """A network of a call whose per-sample gradients Opacus wants."""

    sampled: Any = None


class _SampledNetwork(Network):
    """Whose backward pass keeps the sums over the batch apart, and adds them up afterwards."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        sampled = ctx.net.sampled
        needs, _ = Network.split(ctx.net, ctx.needs_input_grad)
        if not sampled.is_wanted() or not any(needs[3:]):
            return Network.backward(ctx, *grads)
        gradients = by_sequence(Network.point(ctx), grads[:3], needs)
        sampled.give(gradients[3:])
        sums = (None if samples is None else samples.sum(0) for samples in gradients[3:])
        return Network.filled(ctx, [*gradients[:3], *sums])


@register_grad_sampler([nn.RNN, nn.GRU, nn.LSTM])
def _by_parameter(
    module: torch.nn.Module, activations: list[Tensor], backprops: Tensor
) -> dict[torch.nn.Parameter, Tensor]:
    """Opacus' grad sampler: takes apart what ``_Sampling.give`` has put together."""
    sampling = vars(module).get("_run_call")
    if not isinstance(sampling, _Sampling) or sampling.giving is None:
        raise RuntimeError(
            f"Opacus has wrapped this {type(module).__name__} as a module that is not fastbptt's: "
            "import fastbptt.opacus, and call fastbptt.convert, before GradSampleModule or "
            "PrivacyEngine.make_private"
        )
    sizes = [shape.numel() for shape in sampling.giving.values()]
    parts = backprops.split(sizes, 1)
    return {
        parameter: part.unflatten(1, shape)
        for (parameter, shape), part in zip(sampling.giving.items(), parts, strict=True)
    }


def _sampling_of(module: nn._Recurrent, owner: GradSampleHooks) -> _Sampling:
    """A module's, made if Opacus has put its first hook on it."""
    if owner.force_functorch:
        raise NotImplementedError(
            f"fastbptt.{type(module).__name__} has per-sample gradients of its own, but Opacus is "
            'told to compute them by functorch: use grad_sample_mode="hooks"'
        )
    if any(name not in module._parameters for name in module._flat_weights_names):
        raise NotImplementedError(
            f"fastbptt.{type(module).__name__}: Opacus cannot sample the gradients of "
            "parametrized weights; remove the parametrizations first"
        )
    register_grad_sampler(type(module))(_by_parameter)  # it may be a converted subclass
    return vars(module).setdefault("_run_call", _Sampling())


def _register(hooks: OrderedDict[int, Callable], hook: Callable) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle


def _register_forward_hook(self: nn._Recurrent, hook: Callable, **options: bool) -> RemovableHandle:
    """As torch.nn.Module's; but Opacus' hook is the module's own affair."""
    owner = _owner(hook)
    if owner is None:
        return torch.nn.Module.register_forward_hook(self, hook, **options)
    return _register(_sampling_of(self, owner).after_forward, hook)


def _register_full_backward_hook(
    self: nn._Recurrent, hook: Callable, prepend: bool = False
) -> RemovableHandle:
    """As torch.nn.Module's; but Opacus' hook is the module's own affair."""
    owner = _owner(hook)
    if owner is None:
        return torch.nn.Module.register_full_backward_hook(self, hook, prepend)
    return _register(_sampling_of(self, owner).after_backward, hook)


nn._Recurrent.register_forward_hook = _register_forward_hook  # type: ignore[method-assign]
nn._Recurrent.register_full_backward_hook = (  # type: ignore[method-assign]
    _register_full_backward_hook
)
