"""Results on disk, whole or not at all. Needs nothing that has to be built first."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Record = dict[str, Any]  # as in a JSON file of results: see measure() of each benchmark


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def save(results: Record, path: Path) -> None:
    """Writes results as JSON, a line a record."""
    lines = {key: json.dumps(value) for key, value in results.items() if key != "records"}
    lines["records"] = "[\n  " + ",\n  ".join(json.dumps(r) for r in results["records"]) + "\n ]"
    write_text(path, "{\n " + ",\n ".join(f'"{k}": {v}' for k, v in lines.items()) + "\n}\n")
