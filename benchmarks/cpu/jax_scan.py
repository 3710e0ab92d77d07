"""The same layers in JAX: ``lax.scan`` over the steps, compiled by XLA before it is timed.

JAX brings a pool of threads of its own. It is given as many as torch has, and its arrays are the
CPU's, even where JAX finds a GPU.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common.rows import BACKWARD
from ..common.workload import Results, Workload

if TYPE_CHECKING:
    import jax

LABEL = "JAX lax.scan"
INSTALL = "pip install 'fastbptt[bench-jax]'"


def unavailable() -> str | None:
    """Why JAX cannot be measured here, or None."""
    try:
        import jax
    except (ImportError, RuntimeError) as error:  # RuntimeError: jaxlib of another version
        return f"jax cannot be imported ({error}): {INSTALL}"
    try:
        # Both are read once, when JAX starts. NPROC is the size of its pool.
        os.environ["NPROC"] = str(torch.get_num_threads())
        jax.config.update("jax_platforms", "cpu")
        jax.devices("cpu")
    except RuntimeError as error:
        return f"jax has no CPU backend ({error})"
    return None


def facts() -> dict[str, str]:
    """JAX's version and its threads; to be asked once it has computed something."""
    threads = "a pool of its own"
    try:
        names = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
        count = sum("XLAEigen" in name for name in names)
        threads += f", {count} threads" if count else ""
    except OSError:
        pass
    return {"jax": importlib.metadata.version("jax"), "jax_threads": threads}


# Each cell in torch's formulas: x is the step's part of the input's product, biases included where
# the formula adds them; a state is a tuple that begins with h.


def _rnn(x: Any, state: tuple, w_hh: Any, b_hh: Any) -> tuple:
    import jax.numpy as jnp

    (h,) = state
    return (jnp.tanh(x + h @ w_hh.T),)


def _gru(x: Any, state: tuple, w_hh: Any, b_hh: Any) -> tuple:
    import jax
    import jax.numpy as jnp

    (h,) = state
    x_r, x_z, x_n = jnp.split(x, 3, axis=-1)
    h_r, h_z, h_n = jnp.split(h @ w_hh.T + b_hh, 3, axis=-1)
    r, z = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z)
    n = jnp.tanh(x_n + r * h_n)
    return ((1 - z) * n + z * h,)


def _lstm(x: Any, state: tuple, w_hh: Any, b_hh: Any) -> tuple:
    import jax
    import jax.numpy as jnp

    h, c = state
    i, f, g, o = jnp.split(x + h @ w_hh.T, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


_CELLS: dict[str, tuple[Callable[..., tuple], int, bool]] = {
    # step, states, whether b_hh can be added to the input's product of all steps at once
    "rnn": (_rnn, 1, True),
    "gru": (_gru, 1, False),
    "lstm": (_lstm, 2, True),
}


def _network(cell: str, chunk: int | None) -> Callable[..., tuple]:
    """``(weights, input) -> (output, final states)`` of a layer, as a JAX function."""
    import jax
    import jax.numpy as jnp

    cell_step, num_states, folds_bias = _CELLS[cell]

    def network(weights: dict[str, jax.Array], input: jax.Array) -> tuple:
        w_ih, w_hh, b_ih, b_hh = (
            weights[f"{name}_l0"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        bias = b_ih + b_hh if folds_bias else b_ih
        x = input @ w_ih.T + bias  # of all steps in one product, as every other contender does

        def step(state: tuple, x_t: jax.Array) -> tuple:
            state = cell_step(x_t, state, w_hh, b_hh)
            return state, state[0]

        def run_chunk(state: tuple, x_chunk: jax.Array) -> tuple:
            return jax.lax.scan(step, jax.lax.stop_gradient(state), x_chunk)

        T, B, H = x.shape[0], x.shape[1], w_hh.shape[1]
        state = (jnp.zeros((B, H)),) * num_states
        if chunk is None:
            state, output = jax.lax.scan(step, state, x)
            return output, state
        whole = T - T % chunk
        parts = x[:whole].reshape(-1, chunk, *x.shape[1:])
        state, output = jax.lax.scan(run_chunk, state, parts)
        output = output.reshape(whole, B, H)
        if whole < T:
            state, rest = run_chunk(state, x[whole:])
            output = jnp.concatenate([output, rest])
        return output, state

    return network


class ScanStep:
    """A workload's layer in JAX; as elsewhere, the outputs die within the timed call."""

    def __init__(self, work: Workload) -> None:
        import jax

        if reason := unavailable():
            raise ImportError(reason)
        self.backward = work.mode == BACKWARD
        cut = work.row.truncation
        network = _network(work.row.cell, None if cut is None else cut.k)

        def forward_backward(weights: dict, input: jax.Array, grad_output: jax.Array) -> tuple:
            output, pullback, state = jax.vjp(network, weights, input, has_aux=True)
            return output, state, *pullback(grad_output)

        self.arguments = [
            {name: _to_jax(weight) for name, weight in work.weights.items()},
            _to_jax(work.input),
        ]
        if self.backward:
            self.arguments.append(_to_jax(work.grad_output))
        self.call = jax.jit(forward_backward if self.backward else network)
        self.wait = jax.block_until_ready

    def clear(self) -> None:
        pass

    def run(self) -> tuple:
        return self.wait(self.call(*self.arguments))

    def results(self) -> Results:
        """As workload.ModuleStep.results."""
        output, state, *gradients = self.run()
        found = {"output": output, **dict(zip(("h_n", "c_n"), state, strict=False))}
        if self.backward:
            dweights, dinput = gradients
            found["dinput"] = dinput
            found |= {f"d{name}": gradient for name, gradient in dweights.items()}
        return {
            name: _to_torch(array).unsqueeze(0) if name in ("h_n", "c_n") else _to_torch(array)
            for name, array in found.items()
        }


def _to_jax(tensor: Tensor) -> jax.Array:
    import jax.numpy as jnp

    return jnp.from_dlpack(tensor.detach().contiguous())


def _to_torch(array: jax.Array) -> Tensor:
    return torch.from_dlpack(array)
