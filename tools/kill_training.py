"""Kills a training run at random moments, again and again: what it loses, and how it ends.

    python tools/kill_training.py --kills 100

examples/char_lm.py trains and saves checkpoints; each process is killed with SIGKILL and the next
one resumes. After every kill the checkpoint must be whole and no older than the last that was seen;
in the end the losses and the model must be, to the bit, those of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

SAVE_EVERY = 2  # segments
OPTIONS = (
    "--threads=1 --hidden=16 --embedding=8 --batch=4 --steps=16 --truncation=5 --lr=0.01 "
    f"--sample-length=20 --save-every={SAVE_EVERY} --epochs=99999 --backend=fastbptt"
).split()
TIME_LIMIT = 100  # seconds, for a process to begin


def command(text: Path, out: Path, last: int) -> list[str]:
    program = str(ROOT / "examples" / "char_lm.py")
    resume = ["--resume"] if (out / "checkpoint-fastbptt.pt").exists() else []
    options = [f"--text={text}", f"--out={out}", f"--max-steps={last}", *OPTIONS, *resume]
    return [sys.executable, program, *options]


def steps_in(checkpoint: Path) -> int:
    """How many segments a checkpoint holds; ends the program where it is not whole."""
    from char_lm_lib.checkpoint import load

    return len(load(checkpoint)["progress"]["losses"]) if checkpoint.exists() else 0


def kill_once(text: Path, out: Path, last: int, choose: random.Random) -> None:
    """Trains until there is a newer checkpoint and a little longer."""
    checkpoint = out / "checkpoint-fastbptt.pt"
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    process = subprocess.Popen(
        command(text, out, last), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + TIME_LIMIT
        early = choose.random() < 0.2  # while it starts, imports and reads
        while not early and time.monotonic() < deadline and process.poll() is None:
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns != before:
                break
            time.sleep(0.001)
        time.sleep(choose.uniform(0, 1.0 if early else 0.03))
    finally:
        process.kill()
        process.wait()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    options = parser.parse_args(arguments)
    import torch

    from char_lm_lib.checkpoint import load
    from char_lm_lib.text import read_text

    choose = random.Random(options.seed)
    never = 10**8
    with tempfile.TemporaryDirectory() as folder:
        text, out, whole = (Path(folder, name) for name in ("text.txt", "out", "whole"))
        text.write_text(read_text(None)[:4000], encoding="utf-8")
        checkpoint, seen = out / "checkpoint-fastbptt.pt", 0
        for kill in range(1, options.kills + 1):
            kill_once(text, out, never, choose)
            steps = steps_in(checkpoint)
            if steps < seen:
                print(f"kill {kill}: the checkpoint went back from {seen} segments to {steps}")
                return 1
            seen = steps
        last = seen + 3
        for where in (out, whole):
            subprocess.run(command(text, where, last), check=True, stdout=subprocess.DEVNULL)
        ours, theirs = (load(where / checkpoint.name) for where in (out, whole))
    same = ours["progress"]["losses"] == theirs["progress"]["losses"] and all(
        torch.equal(value, theirs["model"][name]) for name, value in ours["model"].items()
    )
    print(
        f"{options.kills} kills in {last} segments: every checkpoint whole; the run ended "
        f"{'as one without kills, to the bit' if same else 'otherwise than one without kills'}"
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
