"""Builds the extension module fastbptt._C. The package's metadata is in pyproject.toml."""

import os
import sys
import sysconfig
from glob import glob

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

SOURCES = [
    "csrc/ops.cpp",
    "csrc/network.cpp",
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/team.cpp",
    "csrc/cpu/isa_avx512.cpp",
    "csrc/cpu/isa_avx2.cpp",
    "csrc/cpu/isa_baseline.cpp",
]
# Non-finite values keep their meaning: nothing here assumes that NaN and infinity do not occur.
COMPILE_FLAGS = [
    "-O3",
    "-DNDEBUG",
    "-g1",  # line tables for profilers; torch's headers make anything more very large
    "-fopenmp",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
]
LINK_FLAGS = ["-fopenmp"]

# torch looks for ninja on PATH, which lacks an environment's scripts unless it has been activated.
os.environ["PATH"] = os.pathsep.join(
    [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
)


class IncrementalBuild(BuildExtension):
    """Keeps the objects of an editable install in build/, so that ninja compiles what changed."""

    def finalize_options(self):
        super().finalize_options()
        if self.editable_mode:  # setuptools would give it a temporary folder
            self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"


setup(
    ext_modules=[
        CppExtension(
            "fastbptt._C",
            SOURCES,
            include_dirs=[os.path.abspath("csrc")],
            depends=sorted(set(glob("csrc/**/*.*", recursive=True)) - set(SOURCES)),
            # As system headers, torch's own give no warnings.
            extra_compile_args=COMPILE_FLAGS + [f"-isystem{path}" for path in include_paths()],
            extra_link_args=LINK_FLAGS,
        )
    ],
    cmdclass={"build_ext": IncrementalBuild},
)
