"""The text: reading it, coding its characters, and cutting it into training segments."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

from shared_lib.command_line import BadInput

UNKNOWN = 0  # the code of every character that the training text does not have


@dataclass(frozen=True)
class Vocabulary:
    """The characters of the training text; the i-th of them has the code i + 1."""

    characters: str

    @classmethod
    def of(cls, text: str) -> "Vocabulary":
        """The vocabulary of `text`, in the order of the code points."""
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        """The number of codes, that of unknown characters included."""
        return len(self.characters) + 1

    def encode(self, text: str) -> Tensor:
        """The codes of `text`: int64, [len(text)]."""
        codes = {character: code for code, character in enumerate(self.characters, start=1)}
        return torch.tensor([codes.get(c, UNKNOWN) for c in text], dtype=torch.int64)

    def decode(self, codes: Iterable[int]) -> str:
        """The text that has these codes; none of them may be `UNKNOWN`."""
        return "".join(self.characters[code - 1] for code in codes)


@dataclass(frozen=True)
class Corpus:
    """A text, coded and split: the first nine tenths train, the last tenth is held out."""

    vocabulary: Vocabulary
    train: Tensor  # int64, [characters]
    held_out: Tensor  # int64, [characters]
    opening: str  # the first characters: the default prompt
    fingerprint: str  # SHA-256 of the text

    @classmethod
    def of(cls, text: str) -> "Corpus":
        """Split `text`, and take the vocabulary from the training part alone."""
        split = len(text) - len(text) // 10
        vocabulary = Vocabulary.of(text[:split])
        return cls(
            vocabulary=vocabulary,
            train=vocabulary.encode(text[:split]),
            held_out=vocabulary.encode(text[split:]),
            opening=text[: min(split, 20)],
            fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        )


def read_text(path: Path | None) -> str:
    """The contents of `path`; without one, the help topics that every CPython carries."""
    if path is None:
        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(
            f"argument --text: must be a readable file, but was {path} ({error.strerror})"
        ) from error
    except UnicodeDecodeError as error:
        raise BadInput(
            f"argument --text: must be UTF-8 text, but {path} is not "
            f"(byte {error.object[error.start]:#04x} at position {error.start})"
        ) from error


def check_length(corpus: Corpus, batch: int, steps: int, path: Path | None) -> None:
    """Refuse a text that is too short for one training segment or for the held-out streams."""
    least_train, least_held_out = (batch + 1) * steps, batch + 1
    if len(corpus.train) < least_train or len(corpus.held_out) < least_held_out:
        raise BadInput(
            f"argument --text: must hold at least {least_train} characters to train on and "
            f"{least_held_out} held out, for --batch {batch} and --steps {steps}, but "
            f"{path or 'the default text'} was {len(corpus.train)} and {len(corpus.held_out)} long"
        )


def streams(codes: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Cut a text into `batch` streams that are read side by side.

    Returns the inputs and the targets, which are one character ahead: [length, batch] each.
    """
    length = (len(codes) - 1) // batch
    inputs, targets = codes[: batch * length], codes[1 : batch * length + 1]
    return inputs.view(batch, length).T, targets.view(batch, length).T


@dataclass(frozen=True)
class Segments:
    """How a training text is cut into segments of `steps` characters in `batch` rows.

    sequential  The text is cut into `batch` streams; row b of a segment continues row b of the
                segment before, so that the recurrent state can be carried along.
    random      The text is cut into subsequences, which are dealt out in a random order.

    Both begin at a random offset below `steps`, so that every epoch cuts at other places.
    """

    train: Tensor
    batch: int
    steps: int
    sampling: str

    def __len__(self) -> int:
        """The number of segments in an epoch; the same for every offset."""
        return (len(self.train) - self.steps) // (self.batch * self.steps)

    def draw(self, generator: torch.Generator) -> tuple[int, Tensor | None]:
        """Draw what is random in an epoch: the offset and the order of the subsequences."""
        offset = int(torch.randint(self.steps, (), generator=generator))
        if self.sampling == "sequential":
            return offset, None
        subsequences = (len(self.train) - self.steps) // self.steps
        return offset, torch.randperm(subsequences, generator=generator)

    def cut(self, offset: int, order: Tensor | None) -> tuple[Tensor, Tensor]:
        """Cut one epoch; returns inputs and targets, [segments, steps, batch] each."""
        usable = len(self.train) - self.steps
        inputs = self.train[offset : offset + usable]
        targets = self.train[offset + 1 : offset + 1 + usable]
        return self._arrange(inputs, order), self._arrange(targets, order)

    def _arrange(self, codes: Tensor, order: Tensor | None) -> Tensor:
        count = len(self)
        if order is None:
            length = len(codes) // self.batch
            rows = codes[: self.batch * length].view(self.batch, length)[:, : count * self.steps]
            return rows.unflatten(1, (count, self.steps)).permute(1, 2, 0)
        subsequences = codes[: len(order) * self.steps].view(-1, self.steps)[order]
        return subsequences[: count * self.batch].unflatten(0, (count, self.batch)).mT


def unigram_perplexity(corpus: Corpus) -> float:
    """Held-out perplexity of the model that knows only how frequent each character is.

    It is fitted on the training part; adding one to each count keeps unseen characters possible.
    """
    counts = torch.bincount(corpus.train, minlength=len(corpus.vocabulary)).double() + 1
    log_probabilities = (counts / counts.sum()).log()
    return (-log_probabilities[corpus.held_out].mean()).exp().item()
