"""The command line."""

import argparse
from pathlib import Path

from shared_lib.command_line import Parser, learning_rate, positive_float, positive_int, seed
from shared_lib.layers import BACKENDS, CELLS


def truncation(text: str) -> int | None:
    """The number of steps between two cuts, or None for no cut."""
    if text.lower() in ("0", "none"):
        return None
    try:
        return positive_int(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of steps, or 0 or none for no truncation, but was {text!r}"
        ) from error


def make_parser(description: str) -> argparse.ArgumentParser:
    """All the options and their defaults."""
    parser = Parser(description)
    _add_text_options(parser.add_argument_group("text"))
    _add_model_options(parser.add_argument_group("model"))
    _add_training_options(parser.add_argument_group("training"))
    _add_output_options(parser.add_argument_group("output"))
    return parser


def _add_text_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="UTF-8 text, of which the last tenth is held out "
        "(default: the help topics that every CPython carries)",
    )
    group.add_argument(
        "--sampling",
        choices=("sequential", "random"),
        default="sequential",
        help="sequential: parallel streams, with the state carried from segment to segment; "
        "random: subsequences in random order, each from a state of zeros",
    )
    group.add_argument("--batch", type=positive_int, default=16, help="rows of a segment")
    group.add_argument("--steps", type=positive_int, default=128, help="characters of its rows")


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--backend",
        choices=(*BACKENDS, "both"),
        default="fastbptt",
        help="both: torch, then fastbptt, from equal weights, and a comparison",
    )
    group.add_argument("--cell", choices=tuple(CELLS), default="rnn", help="recurrent layer")
    group.add_argument(
        "--embedding", type=positive_int, default=64, help="features of an input character"
    )
    group.add_argument("--hidden", type=positive_int, default=256, help="units of the layer")
    group.add_argument(
        "--truncation",
        type=truncation,
        default=32,
        metavar="K",
        help="no gradient crosses a multiple of K steps in a segment; "
        "0 or none: it reaches back over the whole segment",
    )


def _add_training_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--epochs", type=positive_int, default=6, help="passes over the text")
    group.add_argument(
        "--max-steps",
        type=positive_int,
        metavar="N",
        help="stop after N segments, all epochs counted (default: never)",
    )
    group.add_argument("--lr", type=learning_rate, default=1e-3, help="learning rate of Adam")
    group.add_argument("--seed", type=seed, default=0, help="decides on all that is random")
    group.add_argument("--threads", type=positive_int, help="CPU threads (default: torch's)")


def _add_output_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--out",
        type=Path,
        default=Path("runs/char_lm"),
        metavar="DIR",
        help="folder for the checkpoints and the plot",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue from the checkpoint in the folder, given the same options and text",
    )
    group.add_argument(
        "--save-every",
        type=positive_int,
        default=200,
        metavar="N",
        help="save a checkpoint every N segments, besides the end of each epoch",
    )
    group.add_argument(
        "--prompt", help="beginning of the generated text (default: that of the training text)"
    )
    group.add_argument(
        "--sample-length",
        type=positive_int,
        default=400,
        metavar="N",
        help="characters of generated text after the prompt",
    )
    group.add_argument(
        "--temperature",
        type=positive_float,
        default=0.8,
        help="of the generated text: low keeps to the likely, high varies",
    )
