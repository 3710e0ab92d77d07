"""Tests a wheel where it is installed: in clean environments, and without a compiler.

    python tools/wheel_test.py dist/fastbptt-*.whl
    python tools/wheel_test.py dist/fastbptt-*.whl --pairs 3.10:2.10 3.13:2.14

For each pair of a Python and a torch: a new environment with what pip takes from its index, and in
it tools/wheel_check.py, which says what it looks at, and the tests of the modules, from a copy
outside of the repository. Then, with the compiler that is here, that a user's cell compiles. At
last one torch is installed that the wheel is not for, if there is one to be had: importing
fastbptt must say so. Without --pairs each torch of the wheel is taken with one of the Pythons that
are found, and each Python with one torch at least. The Pythons are ``python3.10`` and so on, on
PATH or in ~/.pyenv/versions.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
NEEDED = ("bi-lstm-crf==0.2.1", "hypothesis", "numpy", "pytest")
TIME_LIMIT = 1800  # s


def find_python(version: str) -> str | None:
    named = shutil.which(f"python{version}")
    of_pyenv = Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}")
    for path in filter(None, (named, *map(str, of_pyenv))):
        command = [path, "-c", "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.stdout.strip() == version:
            return path
    return None


def torch_versions(wheel: Path) -> list[str]:
    """Those that a wheel has builds for, oldest first."""
    with zipfile.ZipFile(wheel) as archive:
        found = set(re.findall(r"_builds/torch-([\d.]+)/", "\n".join(archive.namelist())))
    return sorted(found, key=lambda version: [int(number) for number in version.split(".")])


def choose_pairs(wheel: Path) -> list[tuple[str, str]]:
    versions = torch_versions(wheel)
    pythons = [version for version in PYTHONS if find_python(version)]
    if missing := set(PYTHONS) - set(pythons):
        print(f"not tested, since not found: Python {', '.join(sorted(missing))}")
    if not pythons:
        sys.exit(f"error: there is none of Python {', '.join(PYTHONS)}")
    count = max(len(versions), len(pythons))
    return [(pythons[i % len(pythons)], versions[i % len(versions)]) for i in range(count)]


class Failed(Exception):
    """A step of a test; the message says what it printed."""


def run(*command: str | Path, **options: object) -> str:
    try:
        done = subprocess.run(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIME_LIMIT,
            **options,
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"took more than {TIME_LIMIT} s: {error.output}") from error
    if done.returncode != 0:
        raise Failed(f"status {done.returncode}:\n{done.stdout}")
    return done.stdout


class Environment:
    """A virtual environment in a folder of its own, where nothing of this repository is seen."""

    def __init__(self, python: str, folder: Path) -> None:
        self.folder = folder
        run(python, "-m", "venv", folder / "venv")
        self.python = folder / "venv" / "bin" / "python"
        kept = ("HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
        self.variables = {name: os.environ[name] for name in kept if name in os.environ}
        self.variables |= {
            "PATH": str(self.python.parent),
            "FASTBPTT_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "2",
        }

    def pip(self, *arguments: str | Path) -> None:
        # A machine's own constraint would be on the version that is asked for here.
        variables = os.environ | {"PIP_CONSTRAINT": os.devnull}
        variables["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
        command = (self.python, "-m", "pip", "install", "-qq", "--no-cache-dir", *arguments)
        run(*command, env=variables, cwd=self.folder)

    def run(self, *arguments: str | Path, **variables: str) -> str:
        return run(self.python, *arguments, env=self.variables | variables, cwd=self.folder)


def copy_tests(folder: Path) -> None:
    """The tests, what they import of this repository, and what pytest is told about them."""
    hidden = shutil.ignore_patterns("__pycache__", "results")
    for name in ("tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=hidden)
    (folder / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "wheel_check.py", folder / "tools")
    settings = re.search(
        r"(?ms)^\[tool\.pytest\.ini_options\]\n.*?(?=^\[)", (ROOT / "pyproject.toml").read_text()
    )
    (folder / "pyproject.toml").write_text(settings[0])


def test(wheel: Path, version: str, torch: str, folder: Path) -> str:
    """Tests a pair; returns what was found, a line each."""
    python = find_python(version)
    if python is None:
        raise Failed(f"there is no Python {version}")
    environment = Environment(python, folder)
    environment.pip(wheel, f"torch=={torch}.*", *NEEDED)
    copy_tests(folder)
    found = environment.run("tools/wheel_check.py", torch)
    tests = environment.run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "--all", "tests/modules"
    )
    found += f"tests/modules: {tests.splitlines()[-1]}\n"
    if shutil.which(os.environ.get("CXX", "c++").split()[0]):
        found += environment.run(
            "tools/wheel_check.py",
            "cell",
            PATH=os.environ["PATH"],
            **({"CXX": os.environ["CXX"]} if "CXX" in os.environ else {}),
        )
    return found


def test_other_torch(wheel: Path, folder: Path) -> str:
    """With a torch that the wheel is not for."""
    (version, *_) = filter(find_python, PYTHONS)
    environment = Environment(find_python(version), folder)
    newest = torch_versions(wheel)[-1]
    environment.pip("--no-deps", wheel)
    # The error comes before anything of torch is asked for but its version.
    (folder / "torch.py").write_text('__version__ = "2.999.0"\n')
    try:
        environment.run("-c", "import fastbptt", PYTHONPATH=str(folder))
    except Failed as error:
        said = str(error).strip().splitlines()[-1]
        if all(word in said for word in ("ImportError", "2.999.0", newest)):
            return said + "\n"
        raise
    raise Failed("fastbptt was imported with a torch that its wheel is not for")


def report(name: str, run_test, *arguments: object) -> bool:
    print(f"== {name}", flush=True)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fastbptt-wheel-") as folder:
        try:
            said, passed = run_test(*arguments, Path(folder)), True
        except Failed as error:
            said, passed = f"{error}\n", False
    print(said + f"{'passed' if passed else 'FAILED'} in {time.monotonic() - begin:.0f} s\n")
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--pairs", nargs="+", metavar="PYTHON:TORCH", help="as 3.10:2.13")
    arguments = parser.parse_args()
    wheel = arguments.wheel.resolve(strict=True)
    pairs = choose_pairs(wheel)
    if arguments.pairs:
        pairs = [tuple(pair.split(":")) for pair in arguments.pairs]
    results = [report("a torch that the wheel is not for", test_other_torch, wheel)]
    for python, torch in pairs:
        results.append(report(f"Python {python}, torch {torch}", test, wheel, python, torch))
    failed = results.count(False)
    print(f"{len(results) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
