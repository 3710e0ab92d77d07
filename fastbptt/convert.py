"""torch.nn's recurrent modules inside a model become fastbptt's, and back, in place."""

from __future__ import annotations

import copy
import functools
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
_SETTINGS = ("truncation", "recompute")

_QUANTIZED = ("torch.ao.", "torchao.")  # where such modules' classes live

# A subclass may redefine these: none takes part in a call.
_HARMLESS = frozenset(
    "__init__ __init_subclass__ __module__ __doc__ __dict__ __weakref__ __annotations__ "
    "__annotate__ __annotate_func__ __annotations_cache__ __constants__ "
    "__jit_unused_properties__ __repr__ __str__ call_super_init extra_repr flatten_parameters "
    "reset_parameters".split()
)


def convert(module: _M, *, truncation: Truncation | int | None = None) -> _M:
    """Makes every ``torch.nn.RNN``, ``GRU`` and ``LSTM`` of a model fastbptt's, in place.

    A module stays the object that it is and changes its class, as torch's own parametrizations
    do it. So all that refers to it or belongs to it stays: its Parameters (and the optimizer that
    has them), hooks, attributes, places in the model, train or eval mode, and the keys of the
    ``state_dict``. Parametrized modules stay parametrized. An instance of a subclass that leaves
    the computation to torch becomes one of both its class and fastbptt's (and stays, like every
    ``torch.nn.LSTM``, one that ``torch.compile`` leaves to eager execution).

    Left alone, and named in one warning with the reason:

    - a subclass, or an instance, that redefines ``forward`` or another part of the call;
    - scripted, traced and quantized modules;
    - a module with an attribute of its own under a name that fastbptt's modules use;
    - if ``truncation`` is given, fastbptt's own modules that have another setting. Without it
      they need no mention: converting twice is harmless.

    It finds registered modules, those that ``module.modules()`` lists; a cell such as
    ``torch.nn.LSTMCell`` is no concern of it. Convert before wrapping in something that changes
    the modules' classes itself, as ``fully_shard`` does. ``torch.jit.script`` compiles torch's
    modules instead, and says so.

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
                changes.append((child, _with_base(child, _ours(_plain_class(child)))))
        else:
            reason = _foreign(child)
        if reason is not None:
            remarks.append(f"{_describe(name, child)} {reason}")
    for child, cls in changes:
        child.__class__ = cls
        child.truncation = cut
        if isinstance(child, nn.RNN) and not hasattr(child, "nonlinearity"):
            # Saved by a torch that kept it in `mode` alone.
            child.nonlinearity = child.mode.removeprefix("RNN_").lower()
    _warn("fastbptt.convert left alone", remarks)
    return module


def revert(module: _M) -> _M:
    """Makes every ``fastbptt.RNN``, ``GRU`` and ``LSTM`` of a model torch's, in place.

    What ``convert`` preserves, this does too, whether or not the modules were converted. What
    torch's modules do not have is lost: ``recompute``, and ``truncation``, named in one warning,
    since from then on gradients are those of full backpropagation through time (the outputs stay
    the same). Instances of other subclasses of fastbptt's modules than ``convert`` makes are left
    alone and named in the warning.

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
        if child.truncation is not None:
            remarks.append(f"{_describe(name, child)} loses its truncation={child.truncation}")
        changes.append((child, _with_base(child, cls)))
    if refused:
        raise ValueError(f"torch.nn has no nonlinearity 'identity', that of {', '.join(refused)}")
    for child, cls in changes:
        child.__class__ = cls
        for name in _SETTINGS:
            vars(child).pop(name, None)
    _warn("fastbptt.revert", remarks)
    return module


def scriptable(module: nn._Recurrent) -> torch.nn.Module:
    """What ``torch.jit.script`` compiles in the place of a module: torch's, of the same Parameters.

    torch.jit puts it into the model that it is given, too.

    Raises:
        TypeError: the module is of a subclass that ``revert`` leaves alone.
        ValueError: it has ``nonlinearity="identity"``.
    """
    cls = _torchs(_plain_class(module))
    if cls is None:
        raise TypeError(
            f"torch.jit.script cannot compile {type(module).__name__}, a subclass of fastbptt's"
        )
    twin = copy.copy(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is said here
        revert(twin)
    lost = "" if module.truncation is None else f", without truncation={module.truncation}"
    warnings.warn(
        f"torch.jit.script compiles torch.nn.{_torch_base(cls).__name__} in the place of "
        f"fastbptt's{lost}, and puts it into the eager model as well: fastbptt.convert makes it "
        "fastbptt's again, and fastbptt.revert before scripting a copy avoids this",
        stacklevel=2,
    )
    return twin


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
    own |= {n for n in vars(module) if callable(getattr(base, n, None))}
    if own - _HARMLESS:
        return f"has its own {', '.join(sorted(own - _HARMLESS))}"
    taken = ({*dir(_OURS[base]), *_SETTINGS} - set(dir(base))).intersection(dir(module))
    if taken:
        return f"has something of its own under the name {', '.join(sorted(taken))}"
    return None


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
    """A subclass of ``cls``, itself one of torch.nn's, with our computation instead of torch's."""
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce,
        "_fastbptt_original": cls,
        # Code that makes another instance of a module's class does it as `cls` wants it; our
        # __init__, which stands in front, would call that of `cls` with RNNBase's arguments.
        "__init__": cls.__init__,
        "truncation": None,
    }
    return _make_class(cls.__name__, (_OURS[_torch_base(cls)], cls), namespace)


def _reduce(self: torch.nn.Module, protocol: int) -> tuple[Any, ...]:
    # The class stands in no namespace, so it is pickled as what it was made of.
    return _blank, (type(self)._fastbptt_original,), self.__getstate__()


def _blank(cls: type) -> torch.nn.Module:
    """An instance of a converted subclass without its state, for unpickling."""
    made = _ours_and(cls)
    return made.__new__(made)
