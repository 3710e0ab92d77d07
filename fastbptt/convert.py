"""torch.nn's recurrent modules inside a model become fastbptt's, and back, in place."""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from typing import Any, TypeVar

import torch
from torch.nn.utils import parametrize

from fastbptt import nn
from fastbptt.truncation import Truncation, as_truncation

__all__ = ["convert", "revert"]

_M = TypeVar("_M", bound=torch.nn.Module)

_OURS: dict[type, type[nn._Recurrent]] = {
    torch.nn.RNN: nn.RNN,
    torch.nn.GRU: nn.GRU,
    torch.nn.LSTM: nn.LSTM,
}
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()}

# What ours keep on the instance, beside what torch's modules do.
_SETTINGS = ("truncation", "recompute", "clip_grad")

_QUANTIZED = ("torch.ao.", "torchao.")  # where such modules' classes live

# What a forward that computes by itself refers to.
_BY_ITSELF = ("_VF", "_flat_weights", "_impl", "rnn_tanh", "rnn_relu", "gru", "lstm")


class _Plain:
    """Has in its namespace what a class statement puts there, in each version of Python its own."""

    number: int = 0

    def __init__(self) -> None:
        self.number = 1


# A subclass may redefine these: none takes part in a call.
_HARMLESS = frozenset(
    "__init_subclass__ __annotations__ __annotate__ __annotate_func__ __annotations_cache__ "
    "__conditional_annotations__ __constants__ __jit_unused_properties__ __repr__ __str__ "
    "call_super_init extra_repr flatten_parameters reset_parameters".split()
) | (vars(_Plain).keys() - {"number"})


def convert(module: _M, *, truncation: Truncation | int | None = None) -> _M:
    """Makes every ``torch.nn.RNN``, ``GRU`` and ``LSTM`` of a model fastbptt's, in place.

    A module stays the object that it is and changes its class, as torch's own parametrizations
    do it. So all that refers to it or belongs to it stays: its Parameters (and the optimizer that
    has them), hooks, attributes, places in the model, train or eval mode, and the keys of the
    ``state_dict``. Parametrized modules stay parametrized. It stays an instance of torch.nn's
    class, and of a subclass too if that leaves the computation to torch: fastbptt's class then
    stands between the two, where the subclass's ``super().forward(...)`` finds it.

    A module that is made anew, as loading does in many libraries, is torch's again, without its
    truncation: convert after every load.

    Left alone, and named in one warning with the reason:

    - a subclass whose ``forward`` computes by itself, or that redefines another part of the call,
      and an instance that redefines any;
    - one whose class cannot be replaced, as Python says it;
    - scripted, traced and quantized modules;
    - a module with an attribute of its own under a name that fastbptt's modules use;
    - if ``truncation`` is given, fastbptt's own modules that have another setting. Without it
      they need no mention: converting twice is harmless.

    It finds registered modules, those that ``module.modules()`` lists; a cell such as
    ``torch.nn.LSTMCell`` is no concern of it. Convert before wrapping in something that changes
    the modules' classes itself, as ``fully_shard`` does, and ``revert`` before exporting with
    something that knows torch's classes alone. ``torch.jit.script`` takes fastbptt's modules as
    parts of a model; the file that it saves is for processes that import fastbptt.

    Args:
        module: the model; itself converted if it is a recurrent module.
        truncation: the setting of the converted modules, as for ``fastbptt.RNN``.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is no Module.
        TypeError, ValueError: ``truncation`` is no truncation. Nothing has been changed then.
    """
    cut = as_truncation(truncation)
    changes, remarks = [], []
    for name, child in _modules(module):
        reason = None
        if isinstance(child, nn._Recurrent):
            if cut is not None and child.truncation != cut:
                reason = f"is fastbptt's already, with truncation={child.truncation}"
        elif isinstance(child, tuple(_OURS)):
            reason = _obstacle(child)
            if reason is None:
                cls, reason = _try_class(child)
            if reason is None:
                changes.append((child, cls))
        else:
            reason = _foreign(child)
        if reason is not None:
            remarks.append(f"{_describe(name, child)} {reason}")
    for child, cls in changes:
        child.__class__ = cls
        child.truncation = cut
        child._init_flat_weights()  # which ours make of the weights' names
        if isinstance(child, nn.RNN) and not hasattr(child, "nonlinearity"):
            # Saved by a torch that kept it in `mode` alone.
            child.nonlinearity = child.mode.removeprefix("RNN_").lower()
    _warn("fastbptt.convert left alone", remarks)
    return module


def revert(module: _M) -> _M:
    """Makes every ``fastbptt.RNN``, ``GRU`` and ``LSTM`` of a model torch's, in place.

    What ``convert`` preserves, this does too, whether or not the modules were converted. What
    torch's modules do not have is lost: ``recompute``, and ``truncation`` and ``clip_grad``, named
    in one warning, since from then on gradients are those of full backpropagation through time
    (the outputs stay the same). Instances of other subclasses of fastbptt's modules than
    ``convert`` makes are left alone and named in the warning.

    Args:
        module: the model; itself reverted if it is a recurrent module.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is no Module.
        ValueError: a module has ``nonlinearity="identity"``, which torch.nn does not have.
            Nothing has been changed then.
    """
    changes, remarks, refused = [], [], []
    for name, child in _modules(module):
        if not isinstance(child, nn._Recurrent):
            continue
        cls = _torchs(_plain_class(child))
        if cls is None:
            remarks.append(
                f"{_describe(name, child)} left alone: no class of torch's to go back to"
            )
            continue
        if getattr(child, "nonlinearity", None) == "identity":
            refused.append(_describe(name, child))
        for setting in ("truncation", "clip_grad"):
            value = getattr(child, setting)
            if value is not None:
                remarks.append(f"{_describe(name, child)} loses its {setting}={value}")
        changes.append((child, _with_base(child, cls)))
    if refused:
        raise ValueError(f"torch.nn has no nonlinearity 'identity', that of {', '.join(refused)}")
    for child, cls in changes:
        child.__class__ = cls
        for name in _SETTINGS:
            vars(child).pop(name, None)
        child._init_flat_weights()
    _warn("fastbptt.revert", remarks)
    return module


def torchs_class(module: torch.nn.Module) -> type | None:
    """The class that ``revert`` would give a module, or None if it would leave it as it is."""
    if not isinstance(module, nn._Recurrent) or getattr(module, "nonlinearity", "") == "identity":
        return None
    cls = _torchs(_plain_class(module))
    return None if cls is None else _with_base(module, cls)


def _modules(module: object) -> list[tuple[str, torch.nn.Module]]:
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {module!r:.80}")
    return list(module.named_modules())  # each once, wherever it is registered


def _describe(name: str, module: torch.nn.Module) -> str:
    return f"{name!r} ({_class_name(module)})" if name else f"the {_class_name(module)} itself"


def _class_name(module: torch.nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", type(module).__name__)
    return type(module).__name__


def _warn(what: str, remarks: list[str]) -> None:
    if remarks:
        warnings.warn(f"{what}: {'; '.join(remarks)}", stacklevel=3)


def _foreign(module: torch.nn.Module) -> str | None:
    """Why a recurrent module that is no instance of torch.nn's classes is left alone."""
    if _class_name(module) not in {cls.__name__ for cls in _OURS}:
        return None
    if isinstance(module, torch.jit.ScriptModule):
        return "is scripted"
    if type(module).__module__.startswith(_QUANTIZED):
        return "is quantized"
    return None


def _obstacle(module: torch.nn.Module) -> str | None:
    """Why an instance of torch.nn's classes cannot be converted, or None if it can."""
    cls = _plain_class(module)
    base = _torch_base(cls)
    between = [each for each in cls.__mro__ if each not in base.__mro__]
    if any(each.__module__.startswith(_QUANTIZED) for each in between):
        return "is quantized"
    own = {n for each in between for n in vars(each) if hasattr(base, n)}
    # On the instance only what replaces a method counts; the rest is data.
    if all(_asks_super(vars(each)["forward"]) for each in between if "forward" in vars(each)):
        own.discard("forward")
    own |= {n for n in vars(module) if callable(getattr(base, n, None))}
    if _has_other_weights(module):
        return "has other tensors in _flat_weights than under its weights' names"
    if own - _HARMLESS:
        return f"has its own {', '.join(sorted(own - _HARMLESS))}"
    torchs = {*dir(base), "_flat_weights", "__overloads__"}  # the last by torch.jit.script
    ours = {*dir(_OURS[base]), *_SETTINGS} - torchs
    taken = ours.intersection(dir(module))
    if taken:
        return f"has something of its own under the name {', '.join(sorted(taken))}"
    return None


def _has_other_weights(module: torch.nn.Module) -> bool:
    """Whether somebody has put tensors into the list by which torch's modules compute."""
    module._update_flat_weights()
    parameters = module._parameters
    pairs = zip(module._flat_weights_names, module._flat_weights, strict=True)
    return any(weight is not parameters.get(name, weight) for name, weight in pairs)


def _asks_super(forward: object) -> bool:
    """Whether a subclass's forward leaves the computation to its base's."""
    code = getattr(inspect.unwrap(forward), "__code__", None) if callable(forward) else None
    names = set() if code is None else set(code.co_names)
    return {"super", "forward"} <= names and names.isdisjoint(_BY_ITSELF)


def _try_class(module: torch.nn.Module) -> tuple[type, str | None]:
    """The class that converts a module, or why Python does not let it have one."""
    before = cls = type(module)
    try:
        cls = _with_base(module, _ours(_plain_class(module)))
        module.__class__ = cls
    except Exception as error:  # of a metaclass or __init_subclass__ too, which may raise anything
        return before, f"cannot change its class ({type(error).__name__}: {error})"
    module.__class__ = before
    return cls, None


def _plain_class(module: torch.nn.Module) -> type:
    """The class but for the one that a parametrization has put in front of it."""
    cls = parametrize.type_before_parametrizations(module)
    # Something else may have put a class of its own in front of that in turn.
    return cls if issubclass(cls, torch.nn.RNNBase) else type(module)


def _torch_base(cls: type) -> type:
    return next(base for base in cls.__mro__ if base in _OURS)


def _ours(cls: type) -> type:
    return _OURS[cls] if cls in _OURS else _ours_and(cls)


def _torchs(cls: type) -> type | None:
    return _TORCHS.get(cls) or vars(cls).get("_fastbptt_original")


def _with_base(module: torch.nn.Module, base: type) -> type:
    """``base``, or the module's parametrized class made anew on top of ``base``.

    Made anew for each module, since copies of a parametrized module share their class.
    """
    cls = type(module)
    if cls is _plain_class(module):
        return base
    namespace = {n: v for n, v in vars(cls).items() if n not in ("__dict__", "__weakref__")}
    return _make_class(cls.__name__, (base,), namespace)


def _make_class(name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> type:
    # As a class statement does it: with the bases' metaclass.
    return types.new_class(name, bases, exec_body=lambda body: body.update(namespace))


@functools.cache
def _ours_and(cls: type) -> type:
    """A subclass of ``cls``, itself one of torch.nn's, with our class between it and torch's."""
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce,
        "extra_repr": _extra_repr,
        "_fastbptt_original": cls,
    }
    return _make_class(cls.__name__, (cls, _OURS[_torch_base(cls)]), namespace)


def _extra_repr(self: nn._Recurrent) -> str:
    text = type(self)._fastbptt_original.extra_repr(self)
    settings = self._extra_settings()
    return text if text.endswith(settings) else text + settings


def _reduce(self: torch.nn.Module, protocol: int) -> tuple[Any, ...]:
    # The class stands in no namespace, so it is pickled as what it was made of.
    return _blank, (type(self)._fastbptt_original,), self.__getstate__()


def _blank(cls: type) -> torch.nn.Module:
    """An instance of a converted subclass without its state, for unpickling."""
    made = _ours_and(cls)
    return made.__new__(made)
