"""A copy of the repository in which the extension is built in other ways than users have it.

What tools/sanitize.py and tools/mutate.py work in: the working tree stays as it is, and a second
run compiles what has changed.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("FASTBPTT_CUDA", "0")
from ninja_rules import RULES  # noqa: E402

import setup  # noqa: E402  (after the above, which it needs)


def tracked_files() -> list[str]:
    """What git has, and what it would be asked to take, from the repository's root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def optimized_by(level: str) -> list[str]:
    """The extension's flags, at another level of optimization."""
    return [level if flag == "-O3" else flag for flag in setup.COMPILE_FLAGS]


class ScratchCopy:
    """The repository's files in a folder, and the extension built there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def update(self, changed: Mapping[str, str] = MappingProxyType({})) -> None:
        """Makes the copy's files the repository's, but for those that have a text of their own.

        Files that are so already keep their times, so that nothing is compiled for them.
        """
        names = {*tracked_files(), *changed}
        for name in names:
            to = self.folder / name
            content = changed[name].encode() if name in changed else (ROOT / name).read_bytes()
            if not to.exists() or to.read_bytes() != content:
                to.parent.mkdir(parents=True, exist_ok=True)
                to.write_bytes(content)
                if (ROOT / name).exists():
                    shutil.copymode(ROOT / name, to)
        for package in ("fastbptt", "tests", "csrc"):
            for path in (self.folder / package).rglob("*"):
                is_source = path.suffix in (".py", ".h", ".cpp", ".inc")
                if is_source and str(path.relative_to(self.folder)) not in names:
                    path.unlink()

    def build(
        self,
        flags_of: Callable[[str], Sequence[str]],
        link_flags: Sequence[str] = (),
        sources: Sequence[str] = tuple(setup.SOURCES),
        **options: object,
    ) -> None:
        """Compiles what has changed, each source with its flags, and links the copy's module.

        The options are those of ninja's process, for ``subprocess.run``.
        """
        from torch.utils import cpp_extension

        objects_folder = self.folder / "build" / "objects"
        objects_folder.mkdir(parents=True, exist_ok=True)
        standard = re.search(r"'(-std=c\+\+\d+)'", Path(cpp_extension.__file__).read_text())[1]
        flags = ["-fPIC", standard, "-DTORCH_EXTENSION_NAME=_C"]
        flags += ["-I", str(self.folder / "csrc"), "-I", sysconfig.get_path("include")]
        flags += [f"-isystem{path}" for path in cpp_extension.include_paths()]
        text, objects = f"cxx = {os.environ.get('CXX', 'c++')}\n{RULES}", []
        for source in sources:
            out = f"{Path(source).parent.name}_{Path(source).stem}.o"
            text += f"build {out}: compile {self.folder / source}\n"
            own = shlex.join([*flags_of(source), *flags]).replace("$", "$$")
            text += f"  flags = {own}\n"
            objects.append(out)
        library = self.folder / "fastbptt" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
        libraries += ["-lc10", "-ltorch_cpu", "-ltorch_python"]
        link = shlex.join(["-shared", *link_flags, *libraries]).replace("$", "$$")
        text += f"build {library}: link {' '.join(objects)}\n  flags = {link}\n"
        (objects_folder / "build.ninja").write_text(text)
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
        command = ["ninja", "-C", str(objects_folder), *jobs]
        subprocess.run(command, env=os.environ | {"PATH": path}, check=True, **options)
