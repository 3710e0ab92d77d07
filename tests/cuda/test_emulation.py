"""The emulation of the CUDA runtime: right kernels give right results, broken ones are found out.

The kernels are in emulation/test_kernels.cu. What the emulation proves stands in
emulation/runtime.h.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from common import SCHEDULES

ROOT = Path(__file__).parents[2]
BY = ["store_async", "stores", "barrier"]  # how the blocks of a ring send


@pytest.fixture(scope="session")
def kernels(emulation):
    return torch.ops.emulation_test


def draw(*shape: int) -> torch.Tensor:
    """Whole numbers, all of a shape different where there are few: their sums are exact."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-99, 100, shape, generator=generator).float()


# What a kernel gave, and what it must give.
def block_sum(kernels, fault=""):
    x = draw(3, 128)
    return kernels.block_sum(x, fault), x.sum(1)


def warp_sum(kernels, fault=""):
    x = draw(3, 64)
    sums = x.view(3, 2, 32).sum(2, keepdim=True)
    return kernels.warp_sum(x, fault), sums.expand(3, 2, 32).reshape(3, 64)


def reversed_tiles(kernels, fault=""):
    x, valid = draw(5, 32, 4), 4
    truth = x.flip(1)
    truth[valid:] = 0
    x[valid:] = float("nan")  # must not be copied
    return kernels.reversed_tiles(x, valid, fault), truth


def gather(kernels, fault=""):
    x = draw(2, 4, 64)
    return kernels.gather(x, fault), x.sum(1, keepdim=True).expand(x.shape)


def ring(kernels, fault="", by="store_async", steps=9):
    x = draw(2, 4, 32)
    return kernels.ring(x, steps, by, fault), x.roll(steps, 1) + steps


def exchange(kernels, fault="", blocks=5, each=2, steps=7):
    x = draw(blocks, 32, each)
    flag = torch.ops.emulation.guarded_copy(torch.zeros(1, dtype=torch.int32))
    truth = x
    for _ in range(steps):
        truth = truth.sum(0) % 101 + torch.arange(blocks).view(-1, 1, 1)
    return kernels.exchange(x, flag, steps, fault), truth


def product(kernels, fault=""):
    a, b = draw(16, 8) + (0.1 if fault else 0), draw(8, 8)
    return kernels.product(a, b, False, fault), a @ b


@pytest.mark.parametrize("run", [block_sum, warp_sum, reversed_tiles, gather])
def test_right_kernels(kernels, schedule, run):
    result, truth = run(kernels)
    assert torch.equal(result, truth)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("by", BY)
def test_blocks_of_a_cluster_exchange(kernels, schedule, by, steps):
    result, truth = ring(kernels, by=by, steps=steps)
    assert torch.equal(result, truth)


@pytest.mark.parametrize("size", [1, 2, 8, 16])
@pytest.mark.parametrize("by", BY)
def test_clusters_of_every_size(kernels, schedule, by, size):
    x = draw(1, size, 32)
    assert torch.equal(kernels.ring(x, 5, by), x.roll(5, 1) + 5)


@pytest.mark.parametrize("by", BY)
def test_clusters_of_a_cooperative_grid_run_at_once(kernels, schedule, by):
    x = draw(3, 4, 32)
    assert torch.equal(kernels.ring(x, 5, by, cooperative=True), x.roll(5, 1) + 5)


@pytest.mark.parametrize("steps", [0, 1, 2, 7])
@pytest.mark.parametrize(("blocks", "each"), [(1, 1), (2, 4), (5, 2), (40, 1)])
def test_blocks_of_a_grid_exchange(kernels, schedule, blocks, each, steps):
    """40 blocks are more than threads."""
    result, truth = exchange(kernels, blocks=blocks, each=each, steps=steps)
    assert torch.equal(result, truth)


# What is wrong, and words of the message; none where results may be wrong and no more.
FAULTS = [
    (block_sum, "missing barrier", None),
    (block_sum, "divergent barrier", "threads of a block wait at different barriers"),
    (block_sum, "other count", "threads of a block wait at different barriers"),
    (block_sum, "outsider", "a barrier of the first threads: this is none of them"),
    (block_sum, "early exit", "threads returned while others of their block wait for them"),
    (block_sum, "shared bounds", r"shared memory of block .*written to, 0 bytes behind its end"),
    (block_sum, "global bounds", r"tensor of shape \[3\], float was written to, 0 bytes behind"),
    (warp_sum, "divergent shuffle", "lanes of a warp are at different places"),
    (reversed_tiles, "missing wait", None),
    (reversed_tiles, "missing barrier", None),
    (reversed_tiles, "missing barrier after", None),
    (product, "not rounded", "round_to_tf32 has not rounded"),
    (gather, "missing barrier", None),
    (gather, "missing barrier after", "map_shared to a block that has ended"),
    (gather, "divergent cluster", "lanes of a warp arrive at the cluster's barrier at different"),
    (ring, "wrong count", "deadlock.*lacks 1 of 2 arrivals and 0 bytes"),
    (ring, "wrong bytes", "deadlock.*lacks 0 of 1 arrivals and 4 bytes"),
    (ring, "missing fence", "fence_barrier_init is missing"),
    (ring, "missing init", "an mbarrier that is not initialised"),
    (ring, "missing empty", None),
    (ring, "missing wait for barrier", "more arrivals in a phase of an mbarrier than its count"),
    (exchange, "missing barrier", None),
    (exchange, "missing barrier after", None),
    (exchange, "missing wait for flag", None),
    (
        exchange,
        "missing raise",
        r"deadlock.*wait_flag .*for byte 0 of .*int, which is 34, to become 35",
    ),
    (exchange, "not cooperative", "wait_flag in a launch that is not cooperative"),
]


@pytest.mark.parametrize(
    ("run", "fault", "message"),
    FAULTS,
    ids=[f"{run.__name__}, {fault}" for run, fault, _ in FAULTS],
)
def test_broken_kernels_are_found_out(kernels, emulation, run, fault, message):
    """Under one of the schedules at least where results are wrong, else under each."""
    found = []
    for schedule in SCHEDULES:
        emulation.set_order(*schedule)
        try:
            result, truth = run(kernels, fault)
            found.append("" if torch.equal(result, truth) else "wrong results")
        except RuntimeError as error:
            found.append(str(error))
        finally:
            emulation.set_order("forward")
    if message is None:
        assert any(found)
    else:
        assert all(re.search(message, text, re.DOTALL) for text in found), found
    result, truth = run(kernels)
    assert torch.equal(result, truth)  # a fault leaves nothing behind


def test_a_message_says_where_every_thread_is(kernels):
    with pytest.raises(RuntimeError) as caught:
        block_sum(kernels, "divergent barrier")
    source = (ROOT / "tests/emulation/test_kernels.cu").read_text().splitlines()
    start = next(i for i, line in enumerate(source) if "kDivergentBarrier" in line)
    first, second = (i for i in range(start, start + 5) if "sync_block();" in source[i - 1])
    assert str(caught.value).splitlines()[1:] == [
        "block (0, 0, 0):",
        f"  threads 0-31 wait at sync_block (test_kernels.cu:{first})",
        f"  threads 32-127 wait at sync_block (test_kernels.cu:{second})",
    ]


@pytest.mark.parametrize("by_load_matrix", [False, True])
@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float], ids=str)
def test_products(kernels, schedule, dtype, by_load_matrix):
    """Each pair of elements by itself, so that no position can stand in for another."""
    K = 8 if dtype == torch.float else 16
    a, b = draw(16, K).to(dtype), draw(K, 8).to(dtype)  # exact in 8 bits
    assert torch.equal(kernels.product(a, b, by_load_matrix), a.float() @ b.float())
    for k in range(K):
        only_a, only_b = torch.zeros_like(a), torch.zeros_like(b)
        only_a[:, k], only_b[k] = a[:, k], b[k]
        truth = torch.outer(a[:, k], b[k].float())
        assert torch.equal(kernels.product(only_a, only_b, by_load_matrix), truth)


def test_tf32_is_rounded_to_the_nearest(kernels):
    a, b = torch.zeros(16, 8), torch.eye(8)
    ulp = 2.0**-10
    a[0, :4] = torch.tensor([1 + 0.49 * ulp, 1 + 0.5 * ulp, -1 - 0.5 * ulp, 1 + 1.51 * ulp])
    expected = torch.tensor([1, 1 + ulp, -1 - ulp, 1 + 2 * ulp])
    assert torch.equal(kernels.product(a, b, False)[0, :4], expected)


def test_approximations_are_as_good_as_they_say(kernels):
    x = torch.linspace(-20, 20, 4001)
    exp2, tanh, reciprocal, half, bfloat16 = kernels.approximations(x)
    x64 = x.double()

    def error(approximation, truth):
        return ((approximation.double() - truth) / truth)[x != 0].abs().max()

    assert error(exp2, x64.exp2()) < 2**-22
    assert 2**-12 < error(tanh, x64.tanh()) < 2**-10.99  # no better than on a GPU
    assert error(reciprocal, 1 / x64) < 2**-22
    assert torch.equal(half, x.half().float())
    assert torch.equal(bfloat16, x.bfloat16().float())


def test_broken_flags_are_found_out(kernels):
    """They must be zero before the launch."""
    x = draw(2, 32, 1)
    for value in (-1, 2):
        flag = torch.ops.emulation.guarded_copy(torch.tensor([value], dtype=torch.int32))
        with pytest.raises(RuntimeError, match="a flag that was not set to zero before the launch"):
            kernels.exchange(x, flag, 1)


def test_limits(kernels, emulation):
    """An H100's, or what a test sets; a launch beyond them is refused."""
    assert kernels.limits() == [90, 132, 232448]
    assert kernels.resident_gathers(2, 4, 232448) == 33
    assert kernels.resident_gathers(2, 4, 232449) == 0
    for shape, message in [
        ((1, 17, 32), "cluster's number of blocks is 17, the limit is 16"),
        ((1, 2, 1025), "block's number of threads is 1025, the limit is 1024"),
        ((0, 2, 32), "number of blocks along x is 0"),
    ]:
        with pytest.raises(RuntimeError, match=f"launched at test_kernels.cu.*{message}"):
            kernels.gather(torch.zeros(shape))
    with pytest.raises(RuntimeError, match="cooperative grid's number of blocks is 136, .* is 132"):
        kernels.ring(torch.zeros(34, 4, 32), 1, "stores", cooperative=True)
    emulation.set_limits(capability=80, multiprocessors=108, shared_bytes=512)
    try:
        assert kernels.limits() == [80, 108, 512]
        assert kernels.resident_gathers(2, 4, 0) == 0
        with pytest.raises(RuntimeError, match="cluster's number of blocks is 2, the limit is 1"):
            kernels.gather(torch.zeros(1, 2, 32))
        with pytest.raises(RuntimeError, match="sync_cluster needs compute capability 90"):
            kernels.gather(torch.zeros(1, 1, 32))
        with pytest.raises(RuntimeError, match="shared memory in bytes is 1024, the limit is 512"):
            kernels.block_sum(torch.zeros(1, 256))
        with pytest.raises(RuntimeError, match="grid's number of blocks is 109, the limit is 108"):
            exchange(kernels, blocks=109)
    finally:
        emulation.set_limits()


H100 = [18, 18, 18, 16, 16, 16, 16, 14]  # SMs of each GPC of one


@pytest.mark.parametrize(
    ("size", "threads", "shared_bytes", "clusters"),
    [
        (16, 512, 100000, 7),  # one GPC has fewer SMs
        (8, 512, 100000, 15),
        (4, 512, 100000, 4 * 3 + 4 * 4 + 3),
        (2, 512, 100000, 66),
        (1, 512, 100000, 132),  # registers allow one block an SM
        (8, 256, 100000, 2 * 15),
        (1, 256, 0, 2 * 132),
        (8, 128, 233472 // 3 - 1024, 3 * 15),  # a block takes 1 KiB more than it asks for
        (8, 128, 233472 // 3 - 1023, 2 * 15),
        (8, 32, 0, 16 * 15),
    ],
)
def test_clusters_stay_in_a_gpc(kernels, emulation, size, threads, shared_bytes, clusters):
    emulation.set_limits(gpcs=H100)
    try:
        assert kernels.resident_gathers(1, size, shared_bytes, threads) == clusters
    finally:
        emulation.set_limits()


def test_code_of_an_older_architecture_has_no_clusters(kernels, emulation):
    """Whatever the device has, as where a new one runs what was compiled before it."""
    emulation.set_limits(capability=100, multiprocessors=148, code=80)
    try:
        assert kernels.limits() == [100, 148, 232448]
        assert kernels.resident_gathers(1, 1, 0) == 148
        assert kernels.resident_gathers(1, 2, 0) == 0
        with pytest.raises(RuntimeError, match="cluster's number of blocks is 2, the limit is 1"):
            kernels.gather(torch.zeros(1, 2, 32))
        with pytest.raises(RuntimeError, match="sync_cluster needs .* 90, and the code is .* 80"):
            kernels.gather(torch.zeros(1, 1, 32))
        emulation.set_limits(capability=100, code=90)
        assert kernels.resident_gathers(1, 2, 0) == 66
        with pytest.raises(ValueError, match="GPCs' SMs must add up to the device's 132"):
            emulation.set_limits(gpcs=[18])
    finally:
        emulation.set_limits()


@pytest.mark.parametrize("freed", [False, True])
@pytest.mark.parametrize("offset", [-4096, -1, 12, 12 + 4095])
def test_guards_around_tensors(emulation, offset, freed):
    """Also around memory that is free by the time somebody asks."""
    tensor = emulation.guarded_copy(torch.arange(6, dtype=torch.int16).view(2, 3))
    assert torch.equal(tensor, torch.arange(6, dtype=torch.int16).view(2, 3))
    emulation.check_guards()
    ctypes.memset(tensor.data_ptr() + offset, 0, 1)
    if freed:
        del tensor
    where = f"{-offset} bytes before its begin" if offset < 0 else f"{offset - 12} bytes behind"
    with pytest.raises(RuntimeError, match=rf"shape \[2, 3\], short int was written to, {where}"):
        emulation.check_guards()
    emulation.check_guards()  # each fault is told once


def test_guards_are_checked_by_each_launch(kernels, emulation):
    tensor = emulation.guarded_copy(torch.zeros(3))
    ctypes.memset(tensor.data_ptr() + 12, 0, 4)
    with pytest.raises(RuntimeError, match="launched at test_kernels.cu.*shape .3., float was"):
        block_sum(kernels)
    block_sum(kernels)


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


@pytest.mark.slow
@pytest.mark.skipif(nvcc() is None, reason="there is no nvcc")
def test_the_kernels_compile_for_gpus(tmp_path):
    """That is, the primitives' own bodies do. For sm_80 what only sm_90 has is a trap."""
    command = [nvcc(), "-std=c++17", "-Icsrc", "-Itests", "-Werror=all-warnings", "--threads=2"]
    command += [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in ("80", "90")]
    command += ["-c", "tests/emulation/test_kernels.cu", "-o", str(tmp_path / "test_kernels.o")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
