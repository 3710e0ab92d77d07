"""Libraries of the user's own compiler, and the folder that keeps them.

A library is compiled when it is first asked for, and kept by what it was made from: its source, the
package's headers, the compiler and its flags. ``FASTBPTT_CACHE`` says where; else it is a folder of
the user's cache (``XDG_CACHE_HOME``).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

FLAGS = (
    "-std=c++17 -shared -fPIC -O3 -DNDEBUG -ffp-contract=fast -fno-math-errno "
    "-fno-trapping-math -fvisibility=hidden -w"
).split()
COMPILERS = ("c++", "g++", "clang++")
#: The package's headers that a library is compiled against.
HEADERS = (
    *("cells.h", "host_device.h", "params.h", "cpu/numbers.h", "cpu/vec.h"),
    *("user_cell/functions.h", "user_cell/library.h", "user_cell/interface.h"),
    "user_cell/operations.h",
)
TIME_LIMIT = 300  # s

_HASH_BYTES = 32


class Unavailable(Exception):
    """There is no compiled cell; the message says why."""


@functools.cache
def headers() -> Path:
    """The folder of the package's headers: installed, or of a checkout."""
    package = Path(__file__).parent
    for folder in (package / "_include", package.parent / "csrc"):
        if (folder / "user_cell" / "library.h").exists():
            return folder
    raise Unavailable(f"the headers of fastbptt are missing in {package / '_include'}")


@functools.cache
def headers_hash(names: tuple[str, ...]) -> str:
    """Of the package's headers of these names."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode() + b"\0" + (headers() / name).read_bytes() + b"\0")
    return digest.hexdigest()


def _compilers() -> list[list[str]]:
    """The commands that may be the user's compiler, best first."""
    if named := os.environ.get("CXX"):
        return [shlex.split(named)]
    found: dict[str, str] = {}
    for name in COMPILERS:
        if path := shutil.which(name):
            found.setdefault(os.path.realpath(path), path)
    if not found:
        raise Unavailable(f"there is no C++ compiler: none of {', '.join(COMPILERS)} is on PATH")
    return [[path] for path in found.values()]


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, timeout=TIME_LIMIT
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{shlex.join(command)} does not run: {error}") from error
    if done.returncode != 0:
        raise Unavailable(
            f"{shlex.join(command)} does not run: {(done.stderr or done.stdout).strip()}"
        )
    return done.stdout


def cache_folder() -> Path:
    """Where libraries are kept; a temporary folder of this process where that is not writable."""
    if named := os.environ.get("FASTBPTT_CACHE"):
        folder = Path(named)
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastbptt"
    return _writable(folder)


@functools.cache
def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        temporary = _temporary_folder()
        warnings.warn(
            f"fastbptt cannot keep compiled cells in {folder} ({error}): they are compiled anew by "
            f"each process, in {temporary.name}. FASTBPTT_CACHE names another folder.",
            RuntimeWarning,
            stacklevel=2,
        )
        return Path(temporary.name)


@functools.cache
def _temporary_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="fastbptt-")


def kept(made_from: Sequence[str], suffix: str, make: Callable[[Path], bytes]) -> Path:
    """The file of the cache that holds what was made from something, made if it is not there.

    Args:
        made_from: all that it depends on.
        suffix: of its name.
        make: makes its content, given an empty folder that is there until then.
    """
    key = hashlib.sha256("\0".join((*made_from, platform.machine())).encode()).hexdigest()
    folder = cache_folder()
    path = folder / f"cell-{key[:32]}{suffix}"
    if _is_whole(path):
        return path
    # Others may be making the same: each in a folder of its own, and the last one's name stays.
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as work:
        content, made = make(Path(work)), Path(work, "made")
        # With its hash behind it, which a loader passes over.
        made.write_bytes(content + hashlib.sha256(content).digest())
        made.chmod(0o755)
        os.replace(made, path)
    return path


def content(path: Path) -> bytes:
    """That of a file of the cache."""
    return path.read_bytes()[:-_HASH_BYTES]


def _is_whole(path: Path) -> bool:
    """Whether a file is there as it was written: to load a part of one may end the process."""
    try:
        code = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(code[:-_HASH_BYTES]).digest() == code[-_HASH_BYTES:]


def _build(source: str, more_flags: Sequence[str], command: Sequence[str]) -> Path:
    """The library of a source: from the cache, or compiled into it."""
    flags = [*FLAGS, *more_flags]

    def make(work: Path) -> bytes:
        written, made = work / "cell.cpp", work / "cell.so"
        written.write_text(source)
        call = [*command, *flags, f"-I{headers()}", str(written), "-o", str(made)]
        try:
            done = subprocess.run(call, capture_output=True, text=True, timeout=TIME_LIMIT)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"{shlex.join(command)} failed: {error}") from error
        if done.returncode != 0 or not made.exists():
            said = (done.stderr or done.stdout).strip()
            raise Unavailable(
                f"{shlex.join(command)} failed with status {done.returncode}: {said[:2000]}"
            )
        return made.read_bytes()

    made_from = (source, headers_hash(HEADERS), _version(tuple(command)), *command, *flags)
    return kept(made_from, ".so", make)


def library(source: str, flags: Sequence[str]) -> ctypes.CDLL:
    """The library of a source, by the first compiler that makes one.

    Raises:
        Unavailable: none does; the message has each one's own.
    """
    errors = []
    for command in _compilers():
        try:
            return ctypes.CDLL(str(_build(source, flags, command)))
        except (Unavailable, OSError) as error:
            errors.append(str(error))
    raise Unavailable("\n".join(errors))
