"""Training by truncated backpropagation through time, and what surrounds it."""

import argparse
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from shared_lib.command_line import BadInput
from shared_lib.interruption import StopSignal
from shared_lib.layers import State, map_state
from shared_lib.progress import progress
from shared_lib.timing import LayerTimer

from . import checkpoint
from .model import CharLM, detach
from .parallel import Team
from .text import Corpus, Segments, streams


def perplexity(mean_loss: float) -> float:
    """exp of the mean loss in nats; infinite where exp would overflow."""
    return math.exp(mean_loss) if mean_loss < 700 else math.inf


@torch.no_grad()
def held_out_perplexity(
    model: nn.Module, codes: Tensor, batch: int, steps: int, team: Team
) -> float:
    """Read a text as `batch` streams from beginning to end, with the state carried along."""
    inputs, targets = (team.share(part, dim=1) for part in streams(codes, batch))
    loss, state = 0.0, None
    for segment, following in zip(inputs.split(steps), targets.split(steps), strict=True):
        logits, state = model(segment, state)
        loss += cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="sum").item()
    loss, count = team.sum(loss, inputs.numel())
    return perplexity(loss / count)


@dataclass
class Progress:
    """How far a run has come, and what it has measured on the way."""

    epoch: int = 0
    segment: int = 0  # of this epoch, the next to train on
    offset: int = 0  # what was drawn for this epoch: see Segments
    order: Tensor | None = None
    losses: list[float] = field(default_factory=list)  # one a step: mean over time and batch
    held_out: list[list[float]] = field(default_factory=list)  # [step, perplexity] pairs
    forward_seconds: float = 0.0  # in the recurrent layer, as are the next
    backward_seconds: float = 0.0
    seconds: float = 0.0  # in all

    @property
    def step(self) -> int:
        """The number of optimizer steps taken."""
        return len(self.losses)


class Trainer:
    """One model of one backend, and all that training it needs and changes."""

    def __init__(self, args: argparse.Namespace, backend: str, corpus: Corpus) -> None:
        self.args = args
        self.backend = backend
        self.corpus = corpus
        self.path = args.out / f"checkpoint-{backend}.pt"
        self.segments = Segments(corpus.train, args.batch, args.steps, args.sampling)
        # The one seed decides on the weights and on the epochs, in this order for each backend.
        torch.manual_seed(args.seed)
        self.generator = torch.Generator().manual_seed(args.seed)
        self.model = CharLM(
            vocabulary_size=len(corpus.vocabulary),
            backend=backend,
            cell=args.cell,
            embedding=args.embedding,
            hidden=args.hidden,
            truncation=args.truncation,
        )
        self.timer = LayerTimer(self.model.recurrent)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=args.lr)
        self.state: State = None  # what the recurrent layer carries to the next segment
        self.rng_state = torch.get_rng_state()  # as of the last save
        self.progress = Progress()

    @property
    def speed(self) -> float:
        """Characters trained on per second of the whole run."""
        characters = self.progress.step * self.args.batch * self.args.steps
        return characters / self.progress.seconds

    def join(self, team: Team) -> None:
        """Prepare to train together with the other processes, from the same weights."""
        self.team = team
        self.training_model = team.wrap(self.model)
        self.state = map_state(lambda whole: team.share(whole, dim=1), self.state)

    def leave(self) -> None:
        """Let go of the other processes, before the process group is destroyed.

        The order matters: if DistributedDataParallel were the last to hold the group, it would
        wait for the group's threads without letting them have the interpreter lock.
        """
        self.training_model = self.model

    def train(self, epochs: int, stop: StopSignal) -> bool:
        """Train until `epochs` are done in all; False if `stop` came first."""
        self._tick = time.perf_counter()
        torch.set_rng_state(self.rng_state)
        while self.progress.epoch < epochs and not self._out_of_steps():
            if not self._train_epoch(stop):
                self.save()
                return False
            if self.progress.segment == len(self.segments):
                self.progress.epoch += 1
                self.progress.segment = 0
                self._evaluate()
                self.save()
        return True

    def finish(self) -> None:
        """See that the last evaluation and the checkpoint are those of the last step."""
        self._tick = time.perf_counter()
        if not self.progress.held_out or self.progress.held_out[-1][0] != self.progress.step:
            self._evaluate()
            self.save()

    def _out_of_steps(self) -> bool:
        return self.args.max_steps is not None and self.progress.step >= self.args.max_steps

    def _train_epoch(self, stop: StopSignal) -> bool:
        """Train on the rest of this epoch's segments; False if it was stopped in between."""
        progress = self.progress
        if progress.segment == 0:
            self.state = None
            progress.offset, progress.order = self.segments.draw(self.generator)
        inputs, targets = (
            self.team.share(part, dim=2)
            for part in self.segments.cut(progress.offset, progress.order)
        )
        with self._progress_bar() as bar:
            while progress.segment < len(self.segments) and not self._out_of_steps():
                loss = self._step(inputs[progress.segment], targets[progress.segment])
                # The processes have to leave the loop at the same step, whoever got a signal.
                loss, stopping = self.team.sum(loss / self.team.size, stop.number is not None)
                self._check_finite(loss)
                progress.losses.append(loss)
                progress.segment += 1
                self._count_time()
                bar.set_postfix(perplexity=f"{perplexity(loss):.2f}", refresh=False)
                bar.update(self.args.batch * self.args.steps)
                if stopping:
                    return False
                if progress.step % self.args.save_every == 0:
                    self.save()
        return True

    def _step(self, inputs: Tensor, targets: Tensor) -> float:
        """One step of the optimizer on one segment, [steps, batch]; returns the loss."""
        logits, state = self.training_model(inputs, self.state)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(self.model.parameters(), max_norm=1.0)
        self.optimizer.step()
        if self.args.sampling == "sequential":
            self.state = detach(state)
        return loss.item()

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise BadInput(
                f"argument --lr: must be small enough for the loss to stay finite, but was "
                f"{self.args.lr}, and the loss of step {self.progress.step + 1} was {loss}"
            )

    def _evaluate(self) -> None:
        args, progress = self.args, self.progress
        result = held_out_perplexity(
            self.model, self.corpus.held_out, args.batch, args.steps, self.team
        )
        progress.held_out.append([progress.step, result])
        self._count_time()
        if self.team.leads:
            recent = progress.losses[-len(self.segments) :]
            epochs = progress.step / len(self.segments)
            print(
                f"{self.backend}, {epochs:.1f} of {args.epochs} epochs: "
                f"training perplexity {perplexity(sum(recent) / len(recent)):.3f}, "
                f"held-out {result:.3f}, {self.speed:,.0f} characters/s",
                flush=True,
            )

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self._tick
        self._tick = now
        self.progress.forward_seconds = self.timer.forward
        self.progress.backward_seconds = self.timer.backward

    def _progress_bar(self) -> Any:
        size = self.args.batch * self.args.steps
        return progress(
            desc=f"{self.backend}, epoch {self.progress.epoch + 1} of {self.args.epochs}",
            initial=self.progress.segment * size,
            total=len(self.segments) * size,
            unit="char",
            unit_scale=True,
            lines=0,  # each epoch has one anyway
            disable=not self.team.leads,
        )

    def save(self) -> None:
        """Write everything that continuing exactly here takes."""
        self.rng_state = torch.get_rng_state()
        state = map_state(lambda part: self.team.gather(part, dim=1), self.state)
        if not self.team.leads:
            return
        checkpoint.save(
            {
                "config": checkpoint.config_of(self.args, self.backend, self.corpus.fingerprint),
                "vocabulary": self.corpus.vocabulary.characters,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "state": state,
                "rng": {"torch": self.rng_state, "epochs": self.generator.get_state()},
                "progress": vars(self.progress),
            },
            self.path,
        )

    def resume(self, contents: dict[str, Any]) -> None:
        """Continue where the run that wrote the checkpoint `contents` stopped."""
        wanted = checkpoint.config_of(self.args, self.backend, self.corpus.fingerprint)
        try:
            checkpoint.check_config(contents["config"], wanted, self.path)
            if contents["vocabulary"] != self.corpus.vocabulary.characters:
                raise ValueError("the vocabulary is not that of the text")
            self.model.load_state_dict(contents["model"])
            self.optimizer.load_state_dict(contents["optimizer"])
            self.generator.set_state(contents["rng"]["epochs"])
            self.rng_state = contents["rng"]["torch"]
            self.progress = Progress(**contents["progress"])
            self.state = contents["state"]
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise BadInput(
                f"argument --resume: must find a whole checkpoint, but {self.path} is damaged "
                f"({type(error).__name__})"
            ) from error
        self.timer.forward = self.progress.forward_seconds
        self.timer.backward = self.progress.backward_seconds
