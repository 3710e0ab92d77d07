"""NVRTC, which compiles users' cells for a GPU; it runs without one.

Where there is no libnvrtc most of this is skipped; CUDA_HOME may name a folder that has it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastbptt
from cells.programs import CASES
from emulation import user_cells
from fastbptt import Recurrent, _codegen, _compiled, _compiler, _nvrtc, cells
from fastbptt._device_layer import DeviceLayer
from shipped import SHIPPED
from test_compiled import arguments

CAPABILITIES = [(8, 0), (9, 0)]


@pytest.fixture
def nvrtc():
    try:
        return _nvrtc.library()
    except _nvrtc.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTBPTT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


PROGRAMS = {name: (s.cell.program, s.cell.recurrent) for name, s in SHIPPED.items()}
PROGRAMS |= {f"{name}, a program": case[:2] for name, case in CASES.items()}


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"{c[0]}.{c[1]}")
@pytest.mark.parametrize("dtype", _codegen.SCALARS, ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_it_compiles(name, dtype, capability, nvrtc):
    source = _codegen.write_kernels(*PROGRAMS[name], dtype)
    code = _nvrtc.image(source, capability)
    assert code.startswith(b"\x7fELF")
    for kernel in ("forward", "backward", "finish"):
        assert f"fastbptt_cell_{kernel}".encode() in code


# A sine's own way with large arguments is in double.
@pytest.mark.parametrize(
    "name", [n for n, case in CASES.items() if not {o.name for o in case[0].ops} & {"sin", "cos"}]
)
def test_float32_stays_float32(name, nvrtc):
    """Functions are those of floats: nothing is computed in double."""
    program, recurrent, _ = CASES[name]
    source = _codegen.write_kernels(program, recurrent, torch.float32)
    flags = ["--gpu-architecture=compute_80", *_nvrtc.FLAGS]
    ptx = _nvrtc._compile(nvrtc, source, flags, is_code=False).decode()
    assert ".entry fastbptt_cell_forward" in ptx and ".f32" in ptx
    for operation in ("add", "mul", "fma", "div", "sqrt"):
        assert f"{operation}.f64" not in ptx and f"{operation}.rn.f64" not in ptx


def test_it_is_kept(cache, nvrtc, monkeypatch):
    source = _codegen.write_kernels(cells.gru.program, 0, torch.float32)
    code = _nvrtc.image(source, (9, 0))
    assert _nvrtc.image(source, (8, 0)) != code
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr(_nvrtc, "_compile", None)
    assert _nvrtc.image(source, (9, 0)) == code
    (kept,) = (path for path in cache.iterdir() if _compiler.content(path) == code)
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    with pytest.raises(TypeError):  # compiled anew
        _nvrtc.image(source, (9, 0))


def test_what_nvrtc_says(nvrtc):
    with pytest.raises(_nvrtc.Unavailable, match=r"NVRTC \d+\.\d+ failed: .*no_such_type"):
        _nvrtc.image("no_such_type x;", (9, 0))


def test_architectures(nvrtc):
    assert _nvrtc.architecture_for(nvrtc, (8, 6)) == "sm_86"
    newer = _nvrtc.architecture_for(nvrtc, (99, 0))
    assert newer.startswith("compute_")
    code = _nvrtc.image(_codegen.write_kernels(cells.leaky.program, 0, torch.float32), (99, 0))
    assert b".target" in code
    with pytest.raises(_nvrtc.Unavailable, match=r"knows no GPU of compute capability \(1, 0\)"):
        _nvrtc.architecture_for(nvrtc, (1, 0))


def test_without_nvrtc_the_loop_runs_with_a_warning(monkeypatch):
    fresh = fastbptt.cell(gates=1, states=1)(cells.leaky.function)
    net, x = Recurrent(fresh, 3, 4, alpha=0.3), torch.randn(5, 2, 3)
    expected = net(x)[0]
    fresh.compiled.clear()
    monkeypatch.setattr(_compiled, "_layers", {})
    monkeypatch.setattr(_compiled, "_said", set())
    monkeypatch.setattr(_compiled, "variant", lambda _: "cuda:0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(_nvrtc, "_candidates", lambda: iter(["/nowhere/libnvrtc.so"]))
    _nvrtc.library.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"there is no NVRTC \(libnvrtc.so\) of CUDA 13.0"):
            torch.testing.assert_close(net(x)[0], expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(net(x)[0], expected)
    finally:
        _nvrtc.library.cache_clear()


def test_other_builds_of_torch_have_none(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(_nvrtc.Unavailable, match="torch is not built for CUDA"):
        _nvrtc.CudaKernels("", torch.device("cuda:0"))


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """A driver without a GPU, and torch as if it had one."""
    made = tmp_path / "libcuda.so.1"
    source = Path(__file__).parent / "fake_driver.c"
    call = [os.environ.get("CC", "gcc"), "-shared", "-fPIC", str(source), "-o", str(made)]
    subprocess.run(call, check=True, capture_output=True)
    driver = ctypes.CDLL(str(made))
    stream = SimpleNamespace(cuda_stream=0x55667788990)
    monkeypatch.setattr(_nvrtc, "_driver", lambda: driver)
    monkeypatch.setattr(_nvrtc, "image", lambda source, capability: b"\x7fELF" + source.encode())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    _nvrtc._products.cache_clear()
    yield driver
    _nvrtc._products.cache_clear()


def test_what_the_driver_is_told(driver, monkeypatch):
    """And what it says: on a machine with a GPU it is another library with the same functions."""
    program, _, _ = CASES["gru"]
    kernels = _nvrtc.CudaKernels("source", torch.device("cuda:0"))
    layer, of = DeviceLayer(program, 0, kernels), arguments("gru", 5, 2, 7)
    layer.forward(of)
    assert ctypes.c_int.in_dll(driver, "launches").value == 5
    assert ctypes.c_void_p.in_dll(driver, "last_stream").value == 0x55667788990
    ctypes.c_int.in_dll(driver, "fails_with").value = 700
    message = "could not be launched: CUDA error 700: an illegal memory access"
    with pytest.raises(RuntimeError, match=message):
        layer.forward(of)
    assert _nvrtc.CudaKernels.error(99) == "CUDA error 99: unknown"
    monkeypatch.setattr(_nvrtc, "image", lambda *_: b"no image")
    with pytest.raises(_nvrtc.Unavailable, match="CUDA error 200: unknown"):
        _nvrtc.CudaKernels("source", torch.device("cuda:0"))


def test_without_a_driver(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: _raise(OSError(f"{name}: no such file")))
    _nvrtc._driver.cache_clear()
    try:
        with pytest.raises(_nvrtc.Unavailable, match="there is no CUDA driver: libcuda.so.1"):
            _nvrtc._driver()
    finally:
        _nvrtc._driver.cache_clear()


def _raise(error):
    raise error


def test_headers_are_those_that_are_included():
    """And no others: NVRTC finds nothing else."""
    folder = _compiler.headers()
    found, waiting = set(), {"user_cell/kernels.cuh", "user_cell/product.cuh"}
    while waiting:
        name = waiting.pop()
        found.add(name)
        lines = (folder / name).read_text().splitlines()
        own = {line.split('"')[1] for line in lines if line.startswith('#include "')}
        waiting |= {each for each in own if not each.startswith("emulation/")} - found
    assert found == set(_nvrtc.HEADERS)
    assert (user_cells.ROOT / "csrc").samefile(folder)
