"""The CUDA sources with toolkits that are not there, as far as the one that is can show it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def nvcc(*arguments: str, cwd: Path) -> str:
    command = [NVCC, "-arch=sm_90", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    return done.stderr if done.returncode else ""


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
def test_oldest_toolkit(tmp_path):
    """CUDA 12.1 has PTX 8.1, whose instructions are all that its kernels have."""
    flags = ["-std=c++17", f"-I{ROOT}/csrc", f"-I{ROOT}/tests", "-Werror=all-warnings"]
    source = str(ROOT / "tests" / "emulation" / "test_kernels.cu")  # has all primitives
    for fences, is_older in ((0, True), (1, False)):
        defined = f"-DFASTBPTT_RESTRICTED_FENCES={fences}"
        assert not nvcc(*flags, defined, "-ptx", "-o", "kernels.ptx", source, cwd=tmp_path)
        ptx = (tmp_path / "kernels.ptx").read_text()
        older = re.sub(r"^\.version .*$", ".version 8.1", ptx, flags=re.MULTILINE)
        (tmp_path / "older.ptx").write_text(older)
        said = nvcc("-cubin", "-o", "older.cubin", "older.ptx", cwd=tmp_path)
        assert (not said) == is_older and ("requires PTX ISA .version 8.6" in said) != is_older
