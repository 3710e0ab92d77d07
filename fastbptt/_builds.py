"""Which build of the _C module is loaded: a wheel has one for each of some versions of torch.

Built from source it lies beside this file, for the torch that it was built with. To import this is
to find it. torch is imported here, before it: the module links to its libraries.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path


def _refuse_subinterpreters() -> None:
    """Before torch is imported, which would hang."""
    python = ctypes.pythonapi
    python.PyInterpreterState_Get.restype = ctypes.c_void_p
    number = python.PyInterpreterState_GetID
    number.argtypes, number.restype = [ctypes.c_void_p], ctypes.c_int64
    if number(python.PyInterpreterState_Get()) != 0:
        raise ImportError(
            "fastbptt must be imported in the main interpreter, but this is a subinterpreter, "
            "where torch does not run: use threads or processes"
        )


_refuse_subinterpreters()

import torch  # noqa: E402

#: What a wheel's builds share, and a folder ``torch-2.x`` with each; ``torch-2.x+cu13`` is one with
#: the CUDA kernels, for builds of that torch with that CUDA.
FOLDER = Path(__file__).parent / "_builds"


def versions() -> list[str]:
    """The versions of torch that the wheel has builds for, oldest first: none without a wheel."""
    names = [folder.name for folder in FOLDER.glob("torch-*")]
    found = [name.removeprefix("torch-") for name in names if "+" not in name]
    return sorted(found, key=lambda version: [int(number) for number in version.split(".")])


def _find(package_path: list[str]) -> None:
    there = versions()
    if not there:
        return
    version = ".".join(torch.__version__.split(".")[:2])
    if version not in there:
        raise ImportError(
            f"this wheel of fastbptt is for torch {', '.join(there)}, but torch is "
            f"{torch.__version__}: install one of these, a newer fastbptt, or build fastbptt from "
            "its sources with the torch that is there: pip install --no-build-isolation ."
        )
    folder = FOLDER / f"torch-{version}"
    cuda = (torch.version.cuda or "").split(".")[0]
    with_cuda = folder.with_name(f"{folder.name}+cu{cuda}")
    package_path.append(str(with_cuda if with_cuda.exists() else folder))


_find(sys.modules[__package__].__path__)
