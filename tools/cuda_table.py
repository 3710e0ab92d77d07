"""The table of docs/cuda_kernels.md, from the code that divides the work: writes it, or prints it.

python tools/cuda_table.py [--print]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "cuda_kernels.md"
BEGIN, END = "<!-- tools/cuda_table.py: begin -->\n", "<!-- end -->\n"


def make_table() -> str:
    with tempfile.TemporaryDirectory() as folder:
        program = os.path.join(folder, "table")
        source = str(ROOT / "tools" / "cuda_table.cpp")
        compiler = os.environ.get("CXX", "c++")
        command = [compiler, "-std=c++17", f"-I{ROOT / 'csrc'}", source, "-o", program]
        subprocess.run(command, check=True)
        return subprocess.run([program], check=True, capture_output=True, encoding="utf-8").stdout


def with_table(page: str, table: str) -> str:
    before, rest = page.split(BEGIN)
    return before + BEGIN + table + END + rest.split(END)[1]


def main() -> None:
    table = make_table()
    if sys.argv[1:] == ["--print"]:
        print(table, end="")
    else:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), table), encoding="utf-8")


if __name__ == "__main__":
    main()
