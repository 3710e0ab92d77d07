"""Builds the extension module fastbptt._C. The package's metadata is in pyproject.toml.

The CUDA kernels are built where there is a CUDA toolkit and a CUDA build of torch. FASTBPTT_CUDA=1
makes it an error if they cannot be, FASTBPTT_CUDA=0 leaves them out. TORCH_CUDA_ARCH_LIST says for
which architectures.
"""

import os
import shutil
import sys
import sysconfig
from glob import glob
from pathlib import Path

import torch
from setuptools import setup
from setuptools.command.build_py import build_py
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension, include_paths

# The kernels, which know nothing of torch: tools/wheel.py builds them once for all its versions.
KERNEL_SOURCES = [
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/split.cpp",
    "csrc/cpu/team.cpp",
    "csrc/cpu/waves.cpp",
    "csrc/cpu/isa_avx512_bf16.cpp",
    "csrc/cpu/isa_avx512.cpp",
    "csrc/cpu/isa_avx2.cpp",
    "csrc/cpu/isa_neon_bf16.cpp",
    "csrc/cpu/isa_neon.cpp",
    "csrc/cpu/isa_baseline.cpp",
]
# Each unit_*.cpp includes those it is made of.
TORCH_SOURCES = [
    "csrc/python/module.cpp",
    "csrc/python/tensors.cpp",
    "csrc/unit_network.cpp",
    "csrc/unit_tangents.cpp",
    "csrc/unit_cpu.cpp",
]
SOURCES = TORCH_SOURCES + KERNEL_SOURCES
# What users' cells are compiled against, as in fastbptt/_compiler.py and _nvrtc.py.
CELL_HEADERS = [
    "csrc/cells.h",
    "csrc/few_rows.cuh",
    "csrc/few_rows.h",
    "csrc/host_device.h",
    "csrc/params.h",
    "csrc/scalar.h",
    "csrc/unrolled.cuh",
    "csrc/cpu/numbers.h",
    "csrc/cpu/vec.h",
    "csrc/user_cell/device.cuh",
    "csrc/user_cell/functions.h",
    "csrc/user_cell/interface.h",
    "csrc/user_cell/kernels.cuh",
    "csrc/user_cell/library.h",
    "csrc/user_cell/operations.h",
    "csrc/user_cell/product.cuh",
    "csrc/user_cell/step.h",
]
CUDA_SOURCES = [
    "csrc/cuda/torch/unit_cuda.cpp",
    "csrc/cuda/lane_bfloat16.cu",
    "csrc/cuda/lane_float.cu",
    "csrc/cuda/lane_half.cu",
    "csrc/cuda/persistent_bfloat16.cu",
    "csrc/cuda/persistent_float.cu",
    "csrc/cuda/persistent_half.cu",
    "csrc/cuda/persistent_tf32.cu",
    "csrc/cuda/stepwise.cu",
    "csrc/cuda/tangent.cu",
]
# All cards of 8.x run sm_80's code. Those beyond 9.0 compile its PTX, which has clusters, when they
# first run it; 9.0a's would run on no other card.
CUDA_ARCHITECTURES = "8.0;9.0+PTX"
NVCC_FLAGS = ["-O3", "-DNDEBUG", "-lineinfo"]


def openmp() -> tuple[list[str], list[str]]:
    """Flags to compile and to link with OpenMP, whose runtime is to be torch's own: two clash."""
    if sys.platform != "darwin":
        return ["-fopenmp"], []  # none is named: torch's is found, as one of its libraries
    # Apple's clang has no header of it, and torch's wheel has the library alone.
    places = (os.environ.get("OMP_PREFIX"), "/opt/homebrew/opt/libomp", "/usr/local/opt/libomp")
    headers = [f"{place}/include" for place in places if place]
    found = [f"-I{folder}" for folder in headers if Path(folder, "omp.h").exists()]
    runtime = Path(torch.__file__).parent / "lib" / "libomp.dylib"
    return ["-Xclang", "-fopenmp", *found[:1]], [str(runtime)]


OPENMP_COMPILE, OPENMP_LINK = openmp()
# Non-finite values keep their meaning: nothing here assumes that NaN and infinity do not occur.
COMPILE_FLAGS = [
    "-O3",
    "-DNDEBUG",
    "-g1",  # line tables for profilers; torch's headers make anything more very large
    *OPENMP_COMPILE,
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
]

# torch looks for ninja on PATH, which lacks an environment's scripts unless it has been activated.
os.environ["PATH"] = os.pathsep.join(
    [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
)


def cuda_headers(home: Path) -> Path | None:
    """Where a CUDA toolkit has its headers; conda's are by target."""
    for folder in (home / "include", *home.glob("targets/*/include")):
        if (folder / "cuda_runtime_api.h").exists():
            return folder
    return None


def find_toolkit() -> Path | None:
    """The CUDA toolkit's folder: of those where torch looks for it, the first that is whole."""
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [Path(home) for home in named if home]
    if nvcc := shutil.which("nvcc"):
        places += [Path(nvcc).parents[1], Path(nvcc).resolve().parents[1]]
    for home in dict.fromkeys([*places, Path("/usr/local/cuda")]):
        has_nvcc = (home / "bin" / "nvcc").exists()
        if has_nvcc and cuda_headers(home):
            return home
        # An nvcc may be a script that calls another toolkit's.
        lacking = "include/cuda_runtime_api.h" if has_nvcc else "bin/nvcc"
        if home in places:
            print(f"{home} is not taken for a CUDA toolkit: no {lacking}", file=sys.stderr)
    return None


def choose_toolkit() -> Path | None:
    """That of the CUDA kernels, or None: they are not built. Ends a build that must have them."""
    wish = os.environ.get("FASTBPTT_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"FASTBPTT_CUDA must be 0, 1 or not set, got {wish!r}")
    if wish == "0":
        return None
    toolkit, cuda_torch = find_toolkit(), torch.version.cuda is not None
    missing = []
    if toolkit is None:
        missing.append(
            "a CUDA toolkit (bin/nvcc and include/cuda_runtime_api.h: under CUDA_HOME, where nvcc "
            "is on PATH, or under /usr/local/cuda)"
        )
    if not cuda_torch:
        missing.append(f"a CUDA build of torch (torch {torch.__version__} is for the CPU)")
    if missing and wish == "1":
        sys.exit(f"FASTBPTT_CUDA=1, but the CUDA kernels need {' and '.join(missing)}")
    if missing and (toolkit or cuda_torch):
        print(
            f"fastbptt is built for the CPU only: the CUDA kernels need {missing[0]}",
            file=sys.stderr,
        )
    return None if missing else toolkit


class IncrementalBuild(BuildExtension):
    """Keeps the objects of an editable install in build/, so that ninja compiles what changed."""

    def finalize_options(self):
        super().finalize_options()
        if self.editable_mode:  # setuptools would give it a temporary folder
            self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"


class BuildWithHeaders(build_py):
    """Ships the headers that cells are compiled against. A checkout has them already."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        for path in CELL_HEADERS:
            to = Path(self.build_lib, "fastbptt", "_include", *Path(path).parts[1:])
            self.mkpath(str(to.parent))
            self.copy_file(path, str(to))


# As system headers, torch's own give no warnings.
cxx_flags = COMPILE_FLAGS + [f"-isystem{path}" for path in include_paths()]
include_dirs = [os.path.abspath("csrc")]
if toolkit := choose_toolkit():
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    cpp_extension.CUDA_HOME = str(toolkit)  # torch has looked into the first place only
    extension, sources = CUDAExtension, SOURCES + CUDA_SOURCES
    flags = {"cxx": cxx_flags, "nvcc": NVCC_FLAGS}
    include_dirs.append(str(cuda_headers(toolkit)))
else:
    extension, sources, flags = CppExtension, SOURCES, {"cxx": cxx_flags}

if __name__ == "__main__":
    setup(
        ext_modules=[
            extension(
                "fastbptt._C",
                sources,
                include_dirs=include_dirs,
                depends=sorted(set(glob("csrc/**/*.*", recursive=True)) - set(sources)),
                extra_compile_args=flags,
                extra_link_args=OPENMP_LINK,
            )
        ],
        cmdclass={"build_ext": IncrementalBuild, "build_py": BuildWithHeaders},
    )
