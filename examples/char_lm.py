"""Train a character-level language model on a text by truncated backpropagation through time.

    python examples/char_lm.py --text book.txt              train with fastbptt
    python examples/char_lm.py --cell lstm                  with another recurrent layer
    python examples/char_lm.py --backend both               the same model with torch and with
                                                            fastbptt: time, curves, perplexity
    torchrun --nproc-per-node 2 examples/char_lm.py         data-parallel

A checkpoint is saved regularly and on Ctrl-C; --resume continues exactly from it. The exit status
is 0 when training came to its end, 2 for an argument that cannot be used, and 128 plus the
signal's number when a signal stopped it.
"""

import argparse
import os
import signal
import sys

import torch

from char_lm_lib import checkpoint, parallel, report
from char_lm_lib.model import generate
from char_lm_lib.options import make_parser
from char_lm_lib.text import Corpus, check_length, read_text, unigram_perplexity
from char_lm_lib.training import Trainer
from shared_lib.command_line import BadInput, run_program
from shared_lib.interruption import StopSignal
from shared_lib.layers import BACKENDS
from shared_lib.output import prepare_folder

CURVES = "curves.png"


def check_arguments(args: argparse.Namespace, corpus: Corpus) -> None:
    """Refuse what no single option can see."""
    check_length(corpus, args.batch, args.steps, args.text)
    processes = parallel.world_size()
    if args.batch % processes:
        raise BadInput(
            f"argument --batch: must be a multiple of the {processes} processes, "
            f"but was {args.batch}"
        )
    unknown = sorted(set(args.prompt or "") - set(corpus.vocabulary.characters))
    if args.prompt == "" or unknown:
        raise BadInput(
            "argument --prompt: must be one or more characters of the training text, "
            f"but was {args.prompt!r}" + (f", with {''.join(unknown)!r}" if unknown else "")
        )


def make_trainers(args: argparse.Namespace, corpus: Corpus) -> list[Trainer]:
    """One trainer for each backend; with --resume, as its checkpoint left it.

    Where one of two backends has no checkpoint yet, it begins afresh.
    """
    backends = BACKENDS if args.backend == "both" else (args.backend,)
    trainers = [Trainer(args, backend, corpus) for backend in backends]
    if args.resume:
        saved = [trainer for trainer in trainers if os.path.exists(trainer.path)]
        if not saved:
            raise BadInput(
                f"argument --resume: must find {trainers[0].path}, but there is no such file"
            )
        for trainer in saved:
            trainer.resume(checkpoint.load(trainer.path))
    return trainers


def set_earlier_aside(trainers: list[Trainer]) -> None:
    """Rename the checkpoints of an earlier run, so that this one does not overwrite them."""
    for path in [trainer.path for trainer in trainers if trainer.path.exists()]:
        aside = path.with_suffix(".previous.pt")
        os.replace(path, aside)
        print(f"{path} of an earlier run is now {aside.name}")


def train(
    epochs: int, trainers: list[Trainer], team: parallel.Team, stop: StopSignal
) -> Trainer | None:
    """Train all the trainers; returns the one that a signal stopped, if any.

    Two backends take turns, an epoch each, so that whatever else the machine is doing slows
    both of them.
    """
    for trainer in trainers:
        trainer.join(team)
    try:
        for epoch in range(1, epochs + 1):
            for trainer in trainers:
                if not trainer.train(epoch, stop):
                    return trainer
        for trainer in trainers:
            trainer.finish()
        return None
    finally:
        for trainer in trainers:
            trainer.leave()


def show_results(args: argparse.Namespace, corpus: Corpus, trainers: list[Trainer]) -> None:
    """Generated text, loss curves, and the comparison with the baselines."""
    last = trainers[-1]
    prompt = args.prompt or corpus.opening
    length, temperature = args.sample_length, args.temperature
    text = generate(last.model, corpus.vocabulary, prompt, length, temperature, args.seed)
    print(f"\n{last.backend} continues {prompt!r}:\n\n{text}\n")

    unigram = unigram_perplexity(corpus)
    if len(trainers) == 2:
        print(report.table(*trainers))
    for trainer in trainers:
        result = trainer.progress.held_out[-1][1]
        speed = f"{trainer.speed:,.0f} characters/s"
        print(f"{trainer.backend}: held-out perplexity {result:.3f}, {speed}")
    print(f"unigram model: held-out perplexity {unigram:.3f}")
    report.plot(trainers, unigram, args.out / CURVES)
    print(f"loss curves: {args.out / CURVES}")


def run(args: argparse.Namespace) -> int:
    """Check everything, train, and show the results; returns the exit status."""
    if args.threads:
        torch.set_num_threads(args.threads)
    corpus = Corpus.of(read_text(args.text))
    check_arguments(args, corpus)
    trainers = make_trainers(args, corpus)
    if parallel.rank() == 0:
        prepare_folder(args.out, [args.out / CURVES, *(trainer.path for trainer in trainers)])
        if not args.resume:
            set_earlier_aside(trainers)

    with parallel.Team() as team, StopSignal() as stop:
        stopped = train(args.epochs, trainers, team, stop)
    if stopped:
        if team.leads:
            print(f"interrupted: saved {stopped.path}; --resume continues from it")
        return 128 + (stop.number or signal.SIGTERM)  # or: another process got the signal
    if team.leads:
        show_results(args, corpus, trainers)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the program on a command line; returns the exit status."""
    parser = make_parser(__doc__.split("\n\n")[0])
    interrupted = "interrupted at once: the checkpoints are as they were"
    return run_program(run, parser, arguments, interrupted, leads=parallel.rank() == 0)


if __name__ == "__main__":
    # The generated text may hold characters that the terminal's encoding lacks.
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
