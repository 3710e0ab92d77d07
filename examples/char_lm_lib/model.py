"""The model: embedding, recurrent layer with truncated backpropagation, linear decoder."""

import torch
from torch import Tensor, nn

import fastbptt
from shared_lib.layers import CELLS, State, map_state

from .text import UNKNOWN, Vocabulary


def detach(state: State) -> State:
    """The same state without its past: no gradient flows back through it."""
    return map_state(Tensor.detach, state)


class DetachLoop(nn.Module):
    """Truncated BPTT by hand: the state is detached before every chunk of the input.

    It computes what ``truncation=Chunked(chunk)`` does for a layer of fastbptt, with the
    gradients reaching back at most `chunk` steps.
    """

    def __init__(self, layer: nn.Module, chunk: int) -> None:
        super().__init__()
        self.layer = layer
        self.chunk = chunk

    def forward(self, input: Tensor, state: State = None) -> tuple[Tensor, State]:
        """[T, B, I] to [T, B, H], and the state after the last step."""
        outputs = []
        for piece in input.split(self.chunk):
            output, state = self.layer(piece, detach(state))
            outputs.append(output)
        return torch.cat(outputs), state


def recurrent_layer(
    backend: str, cell: str, inputs: int, hidden: int, truncation: int | None
) -> nn.Module:
    """The recurrent layer of one backend; both backends draw the same weights from a seed."""
    torch_layer, our_layer = CELLS[cell]
    if backend == "fastbptt":
        chunked = fastbptt.Chunked(truncation) if truncation else None
        return our_layer(inputs, hidden, truncation=chunked)
    layer = torch_layer(inputs, hidden)
    return DetachLoop(layer, truncation) if truncation else layer


class CharLM(nn.Module):
    """Predicts each next character of a text from those before it."""

    def __init__(
        self,
        vocabulary_size: int,
        backend: str,
        cell: str,
        embedding: int,
        hidden: int,
        truncation: int | None,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding)
        self.recurrent = recurrent_layer(backend, cell, embedding, hidden, truncation)
        self.decoder = nn.Linear(hidden, vocabulary_size)

    def forward(self, codes: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Codes [T, B] to logits of the next character [T, B, V], and the state after them."""
        output, state = self.recurrent(self.embedding(codes), state)
        return self.decoder(output), state


@torch.no_grad()
def generate(
    model: CharLM,
    vocabulary: Vocabulary,
    prompt: str,
    length: int,
    temperature: float,
    seed: int,
) -> str:
    """Continue `prompt` by `length` characters, drawn from the model's softmax.

    A `temperature` below 1 favours the likely characters, one above 1 the unlikely.
    """
    generator = torch.Generator().manual_seed(seed)
    codes = vocabulary.encode(prompt).unsqueeze(1)
    state: State = None
    drawn: list[int] = []
    for _ in range(length):
        logits, state = model(codes, state)
        last = logits[-1, 0]
        last[UNKNOWN] = -torch.inf  # it stands for no character that could be written
        # Subtracting the largest logit first keeps a tiny temperature from overflowing.
        probabilities = ((last - last.max()) / temperature).softmax(0)
        codes = torch.multinomial(probabilities, 1, generator=generator).unsqueeze(1)
        drawn.append(int(codes))
    return prompt + vocabulary.decode(drawn)
