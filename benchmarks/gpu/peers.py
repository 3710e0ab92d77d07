"""Other packages' recurrent networks on a GPU, where they are installed, and the rows for them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..common.workload import ModuleStep, State, Workload
from .rows import GpuRow, T


def torchrl(work: Workload) -> ModuleStep:
    """TorchRL's module with its Triton kernels, which take resets: a row is many trajectories."""
    from tensordict import TensorDict
    from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode

    row, is_lstm = work.row, work.row.cell == "lstm"
    module = (LSTMModule if is_lstm else GRUModule)(
        row.H,
        row.H,
        in_key="input",
        out_key="output",
        recurrent_backend="triton" if work.input.is_cuda else "pad",
        recurrent_matmul_precision="tf32" if row.precision == "tf32" else "ieee",
    ).to(work.input)
    inner = getattr(module, row.cell)
    inner.load_state_dict(work.weights)
    suffixes = ("_h", "_c") if is_lstm else ("",)
    zeros = work.input.new_zeros(row.B, row.T, 1, row.H)
    fixed = {f"recurrent_state{suffix}": zeros for suffix in suffixes}
    is_init = torch.zeros(row.T, row.B, dtype=torch.bool, device=work.input.device)
    if work.resets is not None:
        is_init |= work.resets
    fixed["is_init"] = is_init.T.unsqueeze(-1).contiguous()

    def forward(input: Tensor) -> tuple[Tensor, State]:
        data = TensorDict({"input": input.transpose(0, 1), **fixed}, [row.B, row.T])
        with set_recurrent_mode(True):
            found = module(data)
        states = (found["next", f"recurrent_state{suffix}"][:, -1] for suffix in suffixes)
        states = tuple(state.transpose(0, 1) for state in states)
        return found["output"].transpose(0, 1), states if is_lstm else states[0]

    return ModuleStep(work, inner, forward)


def flashrnn(work: Workload) -> ModuleStep:
    """FlashRNN's fused kernels, one head; the input's product is torch's, as it is to its users."""
    from flashrnn import flashrnn as run

    row, gates = work.row, work.cell.gates
    module = work.load(work.cell.torch)
    biases = work.input.new_zeros(gates, 1, row.H)
    kind = "lstm" if row.cell == "lstm" else "elman"
    settings = {
        "function": kind,
        "backend": "cuda_fused" if work.input.is_cuda else "vanilla",
        "dtype": str(work.input.dtype).removeprefix("torch."),
    }

    def forward(input: Tensor) -> tuple[Tensor, State]:
        bias = module.bias_ih_l0 + module.bias_hh_l0
        gate_inputs = functional.linear(input.transpose(0, 1), module.weight_ih_l0, bias)
        recurrent = module.weight_hh_l0.view(gates, 1, row.H, row.H)
        states, last = run(
            gate_inputs.view(row.B, row.T, gates, 1, row.H), recurrent, biases, **settings
        )
        ends = tuple(end[:, 0].transpose(0, 1) for end in last)
        return states[0][:, :, 0].transpose(0, 1), ends if kind == "lstm" else ends[0]

    return ModuleStep(work, module, forward)


@dataclass(frozen=True)
class Other:
    """A package that computes the same, and the rows that it is made for."""

    package: str
    build: Callable[[Workload], ModuleStep]
    rows: tuple[GpuRow, ...]
    patience_s: float | None = None  # for a row, where it compiles for each

    def missing(self) -> str | None:
        """Why it cannot be measured."""
        if importlib.util.find_spec(self.package) is None:
            return "not installed"
        try:
            importlib.import_module(self.package)
        except Exception as error:  # it may try to compile, to find a driver, and more
            return f"cannot be imported: {type(error).__name__}: {str(error).splitlines()[:1]}"
        return None


OTHERS = {
    "TorchRL": Other(
        "torchrl",
        torchrl,
        tuple(
            GpuRow(cell, T, 16, H, resets=True, precision=precision)
            for precision in ("tf32", "fp32")
            for H in (128, 256)
            for cell in ("lstm", "gru")
        ),
    ),
    "FlashRNN": Other(
        "flashrnn",
        flashrnn,
        tuple(
            GpuRow(cell, T, 16, H, precision="bf16")
            for H in (512, 768, 1024)
            for cell in ("lstm", "rnn")
        ),
        patience_s=240.0,
    ),
}
