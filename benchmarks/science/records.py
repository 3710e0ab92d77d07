"""How the tables and the pictures read the records of the experiments."""

from __future__ import annotations

from collections.abc import Sequence

from ..common.files import Record


def by_mode(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each truncation, in the order in which these first come."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["mode"], []).append(record)
    return found


def chunk_name(chunk: int | None) -> str:
    """How far a rollout's gradient goes back."""
    return f"chunks of {chunk}" if chunk else "not cut"
