"""How far a loop has come: a bar on a terminal, and a few lines where the output is a file."""

import sys
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

from tqdm import tqdm


class Lines:
    """What is shown in place of a bar where it could not be drawn over again: `lines` lines."""

    def __init__(self, iterable: Iterable, total: int, desc: str, unit: str, lines: int) -> None:
        self.iterable, self.total, self.desc, self.unit = iterable, total, desc, unit
        self.lines = lines
        self.count = self.shown = 0
        self.postfix = ""

    def __iter__(self) -> Iterator:
        for item in self.iterable:
            yield item
            self.update()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.lines and self.shown < self.count and error is None:
            self._show()

    def update(self, count: int = 1) -> None:
        """`count` more are done."""
        before = self.count * self.lines // self.total
        self.count += count
        if self.count * self.lines // self.total > before:
            self._show()

    def set_postfix(self, values: dict[str, Any] | None = None, **more: Any) -> None:
        """What the next line says besides."""
        more.pop("refresh", None)
        self.postfix = "".join(f", {k}={v}" for k, v in {**(values or {}), **more}.items())

    def _show(self) -> None:
        self.shown = self.count
        title = f"{self.desc}: " if self.desc else ""
        print(
            f"{title}{self.count} of {self.total} {self.unit}s{self.postfix}",
            file=sys.stderr,
            flush=True,
        )


def progress(
    iterable: Iterable = (),
    *,
    total: int | None = None,
    desc: str = "",
    unit: str = "step",
    lines: int = 1,
    disable: bool = False,
    **options: Any,
) -> "tqdm | Lines":
    """A bar over `iterable`, or with `update`; `options` are tqdm's.

    Where the output is no terminal it is `lines` lines in all: 0 where the program writes its own.
    """
    if total is None:
        total = len(iterable)  # type: ignore[arg-type]
    if disable or not sys.stderr.isatty():
        return Lines(iterable, total, desc, unit, 0 if disable else lines)
    source = iterable or None
    return tqdm(source, total=total, desc=desc or None, unit=unit, leave=False, **options)
