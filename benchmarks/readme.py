"""Puts measured tables into README.md and the pages of docs/, between marker comments.

python -m benchmarks.readme            rewrites them from benchmarks/results
python -m benchmarks.readme --check    only says, by its exit status, whether they are up to date
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from .common import machine
from .cpu.results import write_text
from .pages import BLOCKS

END = "<!-- benchmark:end -->"
START = re.compile(r"<!-- benchmark:(?!end)([\w-]+) -->")
_MARKER = re.compile(r"<!-- benchmark:([\w-]+) -->")


def pages() -> list[Path]:
    """The README and the pages of the site that have such markers."""
    found = [machine.ROOT / "README.md", *sorted((machine.ROOT / "docs").glob("**/*.md"))]
    return [page for page in found if _MARKER.search(page.read_text(encoding="utf-8"))]


def rendered(results: Path, text: str) -> str:
    """``text`` with the tables of a folder of results in place of what stands between its markers.

    Raises:
        OSError: the results cannot be read.
        ValueError: a start without an end or the other way round, a table that there is not, or
            results of a run that failed or was cut off.
    """
    names = _MARKER.findall(text)
    pairs = len(names) // 2
    if not names or names[1::2] != ["end"] * pairs or "end" in names[::2] or len(names) % 2:
        raise ValueError(f"needs pairs of <!-- benchmark:NAME --> and {END}")
    for name in names[::2]:
        if name not in BLOCKS:
            raise ValueError(f"no table {name!r}; there are {', '.join(BLOCKS)}")

    def table(match: re.Match) -> str:
        return f"<!-- benchmark:{match[1]} -->\n{BLOCKS[match[1]](results)}\n{END}"

    return re.sub(rf"{START.pattern}.*?{END}", table, text, flags=re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Updates or checks the pages; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.readme",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = machine.ROOT / "benchmarks" / "results"
    parser.add_argument("--results", type=Path, default=default, metavar="DIR")
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if outdated")
    parser.add_argument(
        "pages", type=Path, nargs="*", metavar="PAGE", help="default: README.md and docs/"
    )
    args = parser.parse_args(argv)
    outdated = 0
    for page in args.pages or pages():
        try:
            text = page.read_text(encoding="utf-8")
            new = rendered(args.results, text)
        except (OSError, ValueError) as error:
            parser.error(f"{page}: {error}")
        if new == text:
            print(f"{page} {'is' if args.check else 'was'} up to date")
        elif args.check:
            print(f"{page} is outdated")
            outdated += 1
        else:
            write_text(page, new)
            print(f"{page} updated")
    return 1 if outdated else 0


if __name__ == "__main__":
    sys.exit(main())
