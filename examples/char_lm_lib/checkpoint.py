"""Checkpoints: writing and reading them, and what a resumed run has to agree on."""

import argparse
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from shared_lib.command_line import BadInput

PROGRAM = "fastbptt char_lm"  # marks a checkpoint as ours

# What must be equal for a resumed run to continue as the interrupted one would have.
OPTIONS = "backend cell embedding hidden sampling batch steps truncation lr seed".split()


def save(contents: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that `path` holds, at every moment, an old one or the new one."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with open(unfinished, "wb") as file:
            torch.save({"program": PROGRAM, **contents}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise BadInput(
                f"argument --out: must be a folder with room for checkpoints, but {path} "
                f"cannot be written ({error.strerror}); it is as it was"
            ) from error
        raise


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint; nothing in the file is executed."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # compares checksums, which torch.load does not
        if damaged:
            raise zipfile.BadZipFile(damaged)
        contents = torch.load(path, weights_only=True)
    except Exception as error:  # torch.load has many ways to fail, and documents none
        raise BadInput(
            f"argument --resume: must find a checkpoint of this program, but {path} cannot be "
            f"read as one ({type(error).__name__})"
        ) from error
    if not isinstance(contents, dict) or contents.get("program") != PROGRAM:
        raise BadInput(
            f"argument --resume: must find a checkpoint of this program, but {path} was written "
            "by another"
        )
    return contents


def config_of(args: argparse.Namespace, backend: str, fingerprint: str) -> dict[str, Any]:
    """What a checkpoint has to agree on with the run that resumes from it."""
    options = {**vars(args), "backend": backend}
    return {**{name: options[name] for name in OPTIONS}, "text": fingerprint}


def check_config(saved: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """Refuse to resume a run with other options or another text."""
    for name in OPTIONS:
        if saved[name] != wanted[name]:
            raise BadInput(
                f"argument --{name}: must be {saved[name]}, as in {path}, but was {wanted[name]}"
            )
    if saved["text"] != wanted["text"]:
        raise BadInput(f"argument --text: must be the text that {path} was trained on, but was not")
