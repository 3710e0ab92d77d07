"""TorchRL's recurrent modules on a rollout with resets: rows are cut there, and padded.

As a loss calls them: a tensordict [B, T] with ``is_init``, in the recurrent mode, with the default
backend, which packs the pieces for ``torch.nn``'s layer.
"""

from __future__ import annotations

import importlib.metadata

from torch import Tensor

from ..common.rows import BACKWARD
from ..common.workload import Results, Workload

LABEL = "TorchRL"
INSTALL = "pip install 'fastbptt[bench-torchrl]'"

_STATES = {"gru": ("recurrent_state",), "lstm": ("recurrent_state_h", "recurrent_state_c")}
CELLS = tuple(_STATES)


def unavailable() -> str | None:
    """Why TorchRL cannot be measured here, or None."""
    try:
        import torchrl.modules  # noqa: F401
    except ImportError as error:
        return f"TorchRL cannot be imported ({error}): {INSTALL}"
    return None


def facts() -> dict[str, str]:
    """Its version."""
    return {"torchrl": importlib.metadata.version("torchrl")}


class RolloutStep:
    """A workload's rows as a tensordict; as elsewhere, the outputs die within the timed call."""

    def __init__(self, work: Workload) -> None:
        from torchrl.modules import GRUModule, LSTMModule

        make = {"gru": GRUModule, "lstm": LSTMModule}[work.row.cell]
        self.states = _STATES[work.row.cell]
        self.module = make(work.row.H, work.row.H, in_key="input", out_key="output")
        self.layer = getattr(self.module, work.row.cell)
        self.layer.load_state_dict(work.weights)
        self.backward = work.mode == BACKWARD
        # Rows are sequences here.
        self.input, self.grad_output, self.is_init = (
            each.transpose(0, 1).contiguous()
            for each in (work.input, work.grad_output, work.resets.unsqueeze(-1))
        )
        self.input.requires_grad_(self.backward)

    def clear(self) -> None:
        self.input.grad = None
        self.module.zero_grad(set_to_none=True)

    def run(self):
        """The tensordict with what the module has written."""
        from tensordict import TensorDict
        from torchrl.modules import set_recurrent_mode

        given = {"input": self.input, "is_init": self.is_init}
        with set_recurrent_mode(True):
            done = self.module(TensorDict(given, self.input.shape[:2]))
        if self.backward:
            done["output"].backward(self.grad_output)
        return done

    def results(self) -> Results:
        """As workload.ModuleStep.results."""
        self.clear()
        done = self.run()

        def last(state: str) -> Tensor:  # [layers, B, H] of [B, T, layers, H]
            return done["next", state][:, -1].transpose(0, 1).detach()

        found: Results = {"output": done["output"].transpose(0, 1).detach()}
        found |= {name: last(s) for name, s in zip(("h_n", "c_n"), self.states, strict=False)}
        if self.backward:
            found["dinput"] = self.input.grad.transpose(0, 1)
            found |= {f"d{name}": p.grad for name, p in self.layer.named_parameters()}
        return found
