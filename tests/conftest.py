"""Which tests run; fixtures: each instruction set, thread counts, poisoned buffers."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

# Read when libgomp is loaded, so before torch: OpenMP's threads sleep while they wait rather than
# spin. On a busy machine they would hold the cores that the threads they wait for need.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import common  # noqa: E402
import fastbptt  # noqa: E402
from selection import for_a_short_run  # noqa: E402

# Derandomized: a run finds today what it found yesterday. FASTBPTT_TEST_EXPLORE=1 looks further.
# The fixtures set what an example does not change: an instruction set, the threads.
fixtures = hypothesis.HealthCheck.function_scoped_fixture
common_settings = {"deadline": None, "suppress_health_check": [fixtures]}
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, max_examples=40, database=None, **common_settings
)
hypothesis.settings.register_profile(
    "explore", max_examples=1000, print_blob=True, **common_settings
)
# For tools/aarch64_test.py: that an example takes long to draw says nothing in a processor that
# is emulated.
hypothesis.settings.register_profile(
    "emulated",
    hypothesis.settings.get_profile("repeatable"),
    max_examples=10,
    suppress_health_check=[fixtures, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile(
    "explore" if os.environ.get("FASTBPTT_TEST_EXPLORE") == "1" else "repeatable"
)


def pytest_addoption(parser):
    parser.addoption(
        "--all",
        action="store_true",
        help="run the slow tests too, and every combination of a test's parameters, not only each "
        "pair of two parameters' values (so does naming a test by its id)",
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow(runs=0): without --all it runs with so many combinations of its parameters"
    )


@pytest.hookimpl(trylast=True)  # of what -k and -m have left
def pytest_collection_modifyitems(config, items):
    if config.getoption("all") or any("::" in argument for argument in config.args):
        return
    of_test = {}
    for item in items:
        of_test.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {id(item) for each in of_test.values() for item in for_a_short_run(each)}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


@pytest.fixture(params=[isa for isa in fastbptt._C.cpu_isas() if not isa.endswith("_bf16")])
def isa(request):
    """Runs the test once in each instruction set that this machine has."""
    yield from _run_in(request.param)


@pytest.fixture(params=fastbptt._C.cpu_isas())
def isa_of_16_bits(request):
    """The same for bfloat16 and float16, whose kernels may be another set's than the others'."""
    yield from _run_in(request.param)


def _run_in(isa):
    before = fastbptt._C.cpu_isa()
    fastbptt._C.set_cpu_isa(isa)
    yield isa
    fastbptt._C.set_cpu_isa(before)


@pytest.fixture(params=[1, 2, 3], ids="threads={}".format)
def threads(request):
    """Runs the test with 1, 2 and 3 threads, however many cores there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def _what_was_computed_once():
    """Is given up with the file of tests: together it takes a gigabyte."""
    yield
    for cached in common.CACHES:
        cached.cache_clear()


@pytest.fixture
def few_kernels(monkeypatch):
    """The CPU as a device that has kernels in float32 and float64 alone, without autocast."""
    monkeypatch.setitem(fastbptt.call.KERNEL_DTYPES, "cpu", (torch.float32, torch.float64))
    monkeypatch.setattr(fastbptt.autocast, "DEVICES", set())


@pytest.fixture
def workspace_limit_restored():
    before = fastbptt.get_workspace_limit()
    yield
    fastbptt.set_workspace_limit(before)


@pytest.fixture
def poisoned():
    """Every new buffer, outputs and scratch alike, is full of NaN until something fills it."""
    torch.use_deterministic_algorithms(True)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(2).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)


def pytest_collection_finish():
    """What is loaded by now stays, so no collection of garbage need look through it."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    """Builds the emulation, if a test needs it, beside the tests before: most keep one core busy.

    Until it is built its fixture waits, and tells what went wrong if it could not be.
    """
    needed = any("emulation" in getattr(item, "fixturenames", ()) for item in session.items)
    first = os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0"  # each collects all tests
    if not needed or not first or session.config.option.collectonly:
        return (yield)
    command = [sys.executable, Path(__file__).parent / "emulation" / "build.py"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, start_new_session=True, **quiet) as build:
        try:
            return (yield)
        finally:
            if build.poll() is None:
                os.killpg(build.pid, signal.SIGTERM)  # the compilers too


@pytest.fixture(scope="session")
def emulation():
    """torch.ops.emulation: the CUDA kernels built as C++, and operators that run them."""
    from emulation.build import load

    load()
    return torch.ops.emulation


@pytest.fixture
def emulated_cuda(emulation):
    """Runs the test's calls on CPU tensors by the CUDA kernels, emulated."""
    from emulation.operators import emulated_operators

    with emulated_operators():
        yield
    emulation.check_guards()


@pytest.fixture(params=common.SCHEDULES, ids=lambda s: s[0] + (" early" if s[1] else ""))
def schedule(request, emulation):
    """Runs the test under each of them, for what the order of threads must not change."""
    emulation.set_order(*request.param)
    yield request.param
    emulation.set_order("forward")
