"""The output folder, and pictures in it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from .command_line import BadInput

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def prepare_folder(folder: Path, files: list[Path]) -> None:
    """Make the output folder, and find out now whether `files` can be written in it later.

    Asking for permissions would not do: they do not bind root, and say nothing of a read-only
    file system. So a file is written, and removed. Folders made on the way to a failure are
    removed as well.
    """
    made = []
    try:
        for step in [*reversed(folder.parents), folder]:
            if not step.exists():
                step.mkdir()
                made.append(step)
        with tempfile.NamedTemporaryFile(dir=folder) as probe:
            probe.write(b"probe")
        for file in files:
            if file.is_dir():
                raise IsADirectoryError(0, f"{file} is a folder")
    except OSError as error:
        for step in reversed(made):
            step.rmdir()
        raise BadInput(
            f"argument --out: must be a folder that can be written to, but was {folder} "
            f"({error.strerror})"
        ) from error


def save_picture(figure: Figure, path: Path, dpi: int = 90) -> None:
    """Write the picture, whole or not at all."""
    unfinished = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(unfinished, format="png", dpi=dpi, facecolor="white")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
