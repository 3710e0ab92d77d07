"""What an installed wheel must do; run by tools/wheel_test.py in an environment that has it.

python tools/wheel_check.py 2.13     without a compiler, with that torch
python tools/wheel_check.py cell     with one: a user's cell compiles
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import warnings
from pathlib import Path

import torch

import fastbptt
from fastbptt import _compiler


def mapped(name: str) -> set[str]:
    """The libraries of this process with a word in their name."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[-1] for line in lines if "/" in line}
    return {path for path in paths if name in os.path.basename(path)}


def check_place(version: str) -> None:
    package = Path(fastbptt.__file__).parent
    assert Path(sys.prefix) in package.parents, package
    module = Path(fastbptt._C.__file__)
    cuda = (torch.version.cuda or "none").split(".")[0]
    with_cuda = f"torch-{version}+cu{cuda}"
    built = (package / "_builds" / with_cuda).exists()
    folder = with_cuda if built else f"torch-{version}"
    assert module == package / "_builds" / folder / "_C.abi3.so", module
    assert fastbptt._C.cuda_built() == built
    isas = ", ".join(fastbptt._C.cpu_isas())
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}: {module.name} of {folder}")
    print(f"instruction sets: {isas}; CUDA kernels: {'imported' if built else 'none'}")


def check_openmp() -> None:
    """Torch's runtime is the only one, and its threads run the kernels."""
    runtimes = mapped("omp")
    assert len(runtimes) == 1, runtimes
    (runtime,) = runtimes
    assert Path(torch.__file__).parent.parent in Path(runtime).parents, runtime
    torch.set_num_threads(2)
    assert ctypes.CDLL(runtime).omp_get_max_threads() == 2, runtime
    torch.tanh(torch.randn(1 << 20))  # by two threads
    before = len(os.listdir("/proc/self/task"))
    with torch.no_grad():
        fastbptt.LSTM(256, 256)(torch.randn(64, 32, 256))  # likewise
    after = len(os.listdir("/proc/self/task"))
    assert before == after, (before, after)
    print(f"OpenMP: {os.path.basename(runtime)} alone")


def check_training() -> None:
    torch.manual_seed(0)
    for name in ("RNN", "GRU", "LSTM"):
        net = getattr(fastbptt, name)(5, 16, 2, truncation=fastbptt.Chunked(4))
        theirs = getattr(torch.nn, name)(5, 16, 2)
        theirs.load_state_dict(net.state_dict())
        x = torch.randn(12, 3, 5)
        torch.testing.assert_close(net(x)[0], theirs(x)[0])
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = (net(x)[0] - 0.5).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0], losses
    print("training steps: the loss falls")


def check_compile() -> None:
    net = fastbptt.GRU(4, 8)
    x = torch.randn(6, 2, 4, requires_grad=True)
    expected = torch.autograd.grad(net(x)[0].sum(), x)
    for backend in ("eager", "aot_eager"):  # the default one needs a compiler
        compiled = torch.compile(net, fullgraph=True, backend=backend)
        assert torch.equal(compiled(x)[0], net(x)[0])
        assert torch.equal(torch.autograd.grad(compiled(x)[0].sum(), x)[0], expected[0])
    print("torch.compile: eager, aot_eager")


def run_cell() -> list[str]:
    """Runs a user's cell, in compiled form where there is a compiler; what it warned of."""

    @fastbptt.cell(gates=1, states=1)
    def leaky(pre, rec, state):
        (h,) = state
        return (h + 0.1 * (torch.tanh(pre[0] + rec[0]) - h),)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            net = fastbptt.Recurrent(leaky, 3, 4)
            output, _ = net(torch.randn(5, 2, 3))
            output.sum().backward()
            assert output.shape == (5, 2, 4) and net.weight_hh_l0.grad is not None
    return [str(warning.message) for warning in caught]


def main() -> None:
    (what,) = sys.argv[1:]
    if what == "cell":
        said = run_cell()
        assert not said, said
        assert "_include" in str(_compiler.headers())
        assert list(_compiler.cache_folder().glob("cell-*.so"))
        print("with a compiler: a user's cell compiles")
        return
    assert not any(map(shutil.which, _compiler.COMPILERS)), "there is a compiler"
    check_place(what)
    check_training()
    check_openmp()
    check_compile()
    said = run_cell()
    assert len(said) == 1 and "there is no C++ compiler" in said[0], said
    print("without a compiler: a user's cell runs step by step, with one warning")


if __name__ == "__main__":
    main()
