"""Other commits of this repository, built: each once, in a folder of its own below build/."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ..common.files import ROOT

FOLDER = ROOT / "build" / "against"


class NotBuilt(Exception):
    """There is no such commit, or it does not build here; says why."""


def commit_of(revision: str) -> str:
    """The hash of a commit, for anything that git takes as one.

    Raises:
        NotBuilt: git knows none by that name.
    """
    words = ["git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"]
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    except OSError as error:
        raise NotBuilt(f"git cannot be run: {error}") from None
    if done.returncode:
        raise NotBuilt(f"git knows no commit {revision!r} {done.stderr.strip()}".strip())
    return done.stdout.strip()


def built(commit: str) -> Path:
    """A folder with the commit's package in it, built with this Python and torch.

    Its sources are taken out of git into a temporary folder: the working tree stays as it is.

    Raises:
        NotBuilt: it does not build.
    """
    name = f"{commit[:12]}-{sys.implementation.cache_tag}-torch{torch.__version__}"
    folder = FOLDER / name
    if folder.is_dir():
        return folder
    FOLDER.mkdir(parents=True, exist_ok=True)
    log = FOLDER / f"{name}.log"
    with tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
        tree, archive = Path(temporary) / "tree", Path(temporary) / "tree.tar"
        words = ["git", "archive", "--output", str(archive), commit]
        subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
        shutil.unpack_archive(archive, tree)
        words = [sys.executable, "setup.py", "build_ext", "--inplace"]
        with log.open("w", encoding="utf-8") as file:
            status = subprocess.run(
                words, cwd=tree, env=os.environ | {"FASTBPTT_CUDA": "0"}, stdout=file, stderr=file
            ).returncode
        if status:
            raise NotBuilt(f"the build of {commit[:12]} failed with status {status}, see {log}")
        made = Path(temporary) / "made"
        made.mkdir()
        shutil.move(tree / "fastbptt", made / "fastbptt")
        os.replace(made, folder)
    return folder
