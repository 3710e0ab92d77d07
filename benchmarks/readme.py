"""Puts the measured table into the README, between two marker comments.

python -m benchmarks.readme            rewrites README.md from benchmarks/results/avx512
python -m benchmarks.readme --check    only says, by its exit status, whether it is up to date
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .common import machine
from .cpu.results import Record, failures, load, write_text
from .cpu.tables import markdown_block

START, END = "<!-- benchmark:start -->", "<!-- benchmark:end -->"


def split(text: str) -> tuple[str, str]:
    """What stands before the start marker and after the end marker.

    Raises:
        ValueError: the markers are missing, doubled or in the wrong order.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"needs one {START} and, after it, one {END}")
    return text[: text.index(START)], text[text.index(END) + len(END) :]


def rendered(results: Record, text: str) -> str:
    """``text`` with the results' table in place of what stands between its markers.

    Raises:
        ValueError: the markers are not as :func:`split` needs them, or the results are of a run
            that failed or was cut off.
    """
    if not results["complete"] or failures(results):
        raise ValueError("the results are of a run that was cut off or has FAILED rows")
    before, after = split(text)
    return f"{before}{START}\n{markdown_block(results)}\n{END}{after}"


def update_readme(results: Record, path: Path) -> bool:
    """Rewrites the file if its table is another one; returns whether it was.

    Raises:
        OSError: the file cannot be read or written.
        ValueError: see :func:`rendered`.
    """
    text = path.read_text(encoding="utf-8")
    new = rendered(results, text)
    if new != text:
        write_text(path, new)
    return new != text


def main(argv: Sequence[str] | None = None) -> int:
    """Updates or checks the README; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.readme",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = machine.ROOT / "benchmarks" / "results" / "avx512" / "compare.json"
    parser.add_argument("--results", type=Path, default=default, metavar="JSON")
    parser.add_argument("--readme", type=Path, default=machine.ROOT / "README.md", metavar="FILE")
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if outdated")
    args = parser.parse_args(argv)
    try:
        results = load(args.results)
        if args.check:
            text = args.readme.read_text(encoding="utf-8")
            current = rendered(results, text) == text
            print(f"{args.readme} is {'up to date' if current else 'outdated'}")
            return 0 if current else 1
        changed = update_readme(results, args.readme)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{args.readme} {'updated' if changed else 'was up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
