"""The policy: encoder, recurrent core, and two heads, the actor and the critic."""

import torch
from torch import Tensor, nn

from shared_lib.layers import CELLS, State, map_state

KEEP_BIAS = 2.0  # of the gate that keeps the state: sigmoid(2) = 0.88 of it, a step


class StepLoop(nn.Module):
    """A layer of torch.nn whose state is reset in the middle of a sequence, as one has to today.

    Its calls take whole sequences, and have no argument for resets; so it is called for one step
    at a time.
    """

    def __init__(self, layer: nn.Module, chunk: int | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.chunk = chunk

    def forward(self, input: Tensor, state: State, *, resets: Tensor) -> tuple[Tensor, State]:
        """[T, B, I] to [T, B, H], and the state after the last step; `resets` is [T, B]."""
        keep = (~resets).to(input.dtype).unsqueeze(-1)
        outputs = []
        for t, (step, kept) in enumerate(zip(input.split(1), keep, strict=True)):
            if self.chunk and t % self.chunk == 0:
                state = map_state(Tensor.detach, state)
            output, state = self.layer(step, map_state(kept.mul, state))
            outputs.append(output)
        return torch.cat(outputs), state


def recurrent_core(
    backend: str, cell: str, inputs: int, hidden: int, chunk: int | None = None
) -> nn.Module:
    """The recurrent core of one backend; both backends draw the same weights from a seed.

    It is called with (input, state, resets=). Backpropagation is cut into chunks of so many steps.
    """
    torch_layer, our_layer = CELLS[cell]
    if backend == "fastbptt":
        return our_layer(inputs, hidden, truncation=chunk)
    return StepLoop(torch_layer(inputs, hidden), chunk)


class Policy(nn.Module):
    """Logits of the actions and a value, for every step of every environment."""

    def __init__(
        self,
        observations: int,
        actions: int,
        backend: str,
        cell: str,
        hidden: int,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.cell = cell
        self.hidden = hidden
        self.encoder = nn.Sequential(nn.Linear(observations, hidden), nn.ReLU())
        self.core = recurrent_core(backend, cell, hidden, hidden, chunk)
        self._remember(hidden)
        self.actor = nn.Linear(hidden, actions)
        self.critic = nn.Linear(hidden, 1)
        with torch.no_grad():
            self.actor.weight *= 0.01  # at the start, every action is about as likely

    def _remember(self, hidden: int) -> None:
        """Begin with gates that keep most of the state from one step to the next.

        They are an LSTM's forget gate and a GRU's update gate, and both are the second of their
        cell's blocks in the biases.
        """
        layer = getattr(self.core, "layer", self.core)
        with torch.no_grad():
            layer.bias_ih_l0[hidden : 2 * hidden] = KEEP_BIAS

    def initial_state(self, batch: int) -> State:
        """The state that an episode begins with."""
        zeros = self.actor.weight.new_zeros(1, batch, self.hidden)
        return (zeros, zeros) if self.cell == "lstm" else zeros

    def forward(
        self, observations: Tensor, state: State, resets: Tensor
    ) -> tuple[Tensor, Tensor, State]:
        """Run over [T, B, features], with the state set to zeros before the steps in `resets`.

        Returns:
            logits [T, B, actions], values [T, B], and the state after the last step.
        """
        features = self.encoder(observations.to(self.actor.weight.dtype))
        features, state = self.core(features, state, resets=resets)
        return self.actor(features), self.critic(features).squeeze(-1), state
