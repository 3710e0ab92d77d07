"""What the build says and chooses, in each environment; nothing is compiled."""

from __future__ import annotations

import os
import re
import runpy
import shutil
from pathlib import Path

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

from tools import cuda_check

ROOT = Path(__file__).parents[2]


@pytest.fixture
def toolkit(tmp_path):
    """A folder that looks like a CUDA toolkit."""
    return make_toolkit(tmp_path / "cuda", "include")


def make_toolkit(home: Path, headers: str | None) -> Path:
    for folder in filter(None, ("bin", headers)):
        (home / folder).mkdir(parents=True)
    (home / "bin" / "nvcc").touch(mode=0o755)
    if headers:
        (home / headers / "cuda_runtime_api.h").touch()
    return home


@pytest.fixture
def build(monkeypatch, capsys):
    """Runs setup.py up to its call of setup(): the sources, and what it has said."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")  # setup.py sets it: to be put back
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")

    def run(
        cuda: str | None, home: Path, wish: str | None = None, on_path: Path | None = None
    ) -> tuple[list[str], str]:
        called, exists = [], Path.exists
        of_machine = Path("/usr/local/cuda")
        monkeypatch.setattr(Path, "exists", lambda p: of_machine not in p.parents and exists(p))
        monkeypatch.setattr(shutil, "which", lambda _: on_path and str(on_path / "bin" / "nvcc"))
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("PATH", os.environ["PATH"])  # which setup.py extends
        monkeypatch.setenv("CUDA_HOME", str(home or ""))
        monkeypatch.delenv("CUDA_PATH", raising=False)
        monkeypatch.delenv("FASTBPTT_CUDA", raising=False)
        if wish is not None:
            monkeypatch.setenv("FASTBPTT_CUDA", wish)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(home))
        monkeypatch.setattr(setuptools, "setup", lambda **options: called.append(options))
        runpy.run_path("setup.py", run_name="__main__")
        ((extension,),) = (options["ext_modules"] for options in called)
        assert "csrc/unit_network.cpp" in extension.sources
        assert str(ROOT / "csrc") in extension.include_dirs
        if has_cuda(extension.sources):
            assert any((Path(d) / "cuda_runtime_api.h").exists() for d in extension.include_dirs)
        return extension.sources, capsys.readouterr().err

    return run


def has_cuda(sources: list[str]) -> bool:
    device_code = any(source.endswith(".cu") for source in sources)
    assert device_code == ("csrc/cuda/torch/unit_cuda.cpp" in sources)
    return device_code


@pytest.mark.parametrize("wish", [None, "", "1"])
def test_toolkit_and_cuda_build_of_torch(build, toolkit, wish):
    sources, said = build("13.0", toolkit, wish)
    assert has_cuda(sources) and not said
    on_disk = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cu")}
    assert on_disk <= set(sources)


def test_left_out_where_asked(build, toolkit):
    sources, said = build("13.0", toolkit, "0")
    assert not has_cuda(sources) and not said


@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_no_toolkit_where_cuda_is_asked_for(build, tmp_path, cuda):
    with pytest.raises(SystemExit) as end:
        build(cuda, tmp_path, "1")
    for word in ("FASTBPTT_CUDA=1", "CUDA toolkit", "CUDA_HOME", "nvcc"):
        assert word in end.value.code
    assert ("a CUDA build of torch" in end.value.code) == (cuda is None)


def test_toolkit_and_cpu_build_of_torch(build, toolkit):
    sources, said = build(None, toolkit)
    assert not has_cuda(sources)
    assert "built for the CPU only" in said and "need a CUDA build of torch" in said
    with pytest.raises(SystemExit) as end:
        build(None, toolkit, "1")
    assert "FASTBPTT_CUDA=1" in end.value.code and "a CUDA build of torch" in end.value.code


def test_cuda_build_of_torch_alone(build, tmp_path):
    sources, said = build("13.0", tmp_path)
    assert not has_cuda(sources)
    assert "built for the CPU only" in said and "need a CUDA toolkit" in said


def test_neither(build):
    sources, said = build(None, None)
    assert not has_cuda(sources) and not said


@pytest.mark.parametrize("named", [False, True])
def test_script_that_calls_another_nvcc(build, toolkit, tmp_path, named):
    """A folder without CUDA's headers is passed over: its build would fail in the end."""
    script = make_toolkit(tmp_path / "local", None)
    home, on_path = (script, toolkit) if named else (None, script)
    sources, said = build("13.0", home, None, on_path)
    assert has_cuda(sources) == named and (cpp_extension.CUDA_HOME == str(toolkit)) == named
    assert f"{script} is not taken for a CUDA toolkit: no include/cuda_runtime_api.h" in said
    assert ("built for the CPU only" in said) == (not named)


def test_link_to_nvcc(build, toolkit, tmp_path):
    links = tmp_path / "local" / "bin"
    links.mkdir(parents=True)
    (links / "nvcc").symlink_to(toolkit / "bin" / "nvcc")
    assert has_cuda(build("13.0", None, None, links.parent)[0])
    assert cpp_extension.CUDA_HOME == str(toolkit)


def test_headers_by_target(build, tmp_path):
    """As conda has them."""
    home = make_toolkit(tmp_path / "conda", "targets/x86_64-linux/include")
    sources, said = build("13.0", home)
    assert has_cuda(sources) and not said


def test_a_wish_that_is_none(build, toolkit):
    with pytest.raises(SystemExit, match="FASTBPTT_CUDA must be 0, 1 or not set, got 'yes'"):
        build("13.0", toolkit, "yes")


def test_architectures(build, toolkit, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0;12.0")
    build("13.0", toolkit)
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "9.0;12.0"
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    build("13.0", toolkit)
    flags = " ".join(cpp_extension._get_cuda_arch_flags())  # as torch understands it
    assert set(re.findall(r",code=(\w+)", flags)) == {"sm_80", "sm_90", "compute_90"}


def test_newer_cards_get_all_that_a_card_can_do():
    """The PTX is the newest architecture's, and of no variant that one card alone has."""
    *older, newest = cuda_check.BUILT
    assert cuda_check.BUILT[newest] and not any(cuda_check.BUILT[each] for each in older)
    assert newest.removeprefix("sm_").isdigit()


PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8fastbptt12_GLOBAL__N_15twiceIfEEvPT_' for 'sm_80'
ptxas info    : Function properties for _ZN8fastbptt12_GLOBAL__N_15twiceIfEEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 26 registers, used 0 barriers, 544 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN8fastbptt6thriceEPf' for 'sm_90'
ptxas info    : Function properties for _ZN8fastbptt6thriceEPf
    48 bytes stack frame, 40 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 48 bytes cumulative stack size, 512 bytes smem
"""


def test_report_of_the_kernels():
    twice, thrice = cuda_check.parse_report(PTXAS)
    assert twice[1:] == ("sm_80", 26, 0, 0, 0)
    assert thrice[1:] == ("sm_90", 255, 512, 48, 64)
    assert cuda_check.readable([twice.name, thrice.name]) == ["twice<float>", "thrice"]


def test_names_of_kernels_say_whom_a_block_shares_weights_with():
    header = "enum class Other { kNone };\nenum class Reach { kBlock, kAll };\n"
    assert cuda_check.read_reaches(header) == ["kBlock", "kAll"]
    of_grid = "_ZN8fastbptt12_GLOBAL__N_14stepIfLNS0_5ReachE2EEEvv"
    assert cuda_check.readable([of_grid]) == ["step<float, kGrid>"]


PTX = """\
.visible .entry _Z5clean(.param .u64 p)
{
mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f1}, {%r1}, {%r2}, {%f2};
ret;
}
.visible .entry _Z11brokenCoresv()
{
@%p1 bra $L_trap;
trap;
}
"""


def test_ptx_of_the_kernels():
    assert cuda_check.with_traps(PTX) == ["_Z11brokenCoresv"]
    assert cuda_check.without_tensor_cores(PTX) == ["_Z11brokenCoresv"]
    with pytest.raises(SystemExit, match=r"PTX of sm_90: a trap in brokenCores$"):
        cuda_check.refuse("a trap", cuda_check.with_traps(PTX), "PTX of sm_90")
