"""What the tests of the examples share: running one in this process, and as a process to stop."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))  # after this import, a test can import the examples


def run_fixture(main: Callable[[list[str]], int], *options: str) -> Callable:
    """A fixture: calls an example with `options`, writing to a folder of the test's own.

    Its value returns the status, output and error output. The number of threads, which the
    example sets, is restored.
    """

    @pytest.fixture
    def run(tmp_path, capsys):
        before = torch.get_num_threads()

        def run(*arguments: object, out: str = "out") -> tuple[int, str, str]:
            status = main([f"--out={tmp_path / out}", *options, *map(str, arguments)])
            return status, *capsys.readouterr()

        yield run
        torch.set_num_threads(before)

    return run


def assert_refused(result: tuple[int, str, str], message: str) -> None:
    """The program said no more than `message`, in one line."""
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and message in err


def start(program: str, out: Path, *arguments: str, launcher: tuple[str, ...] = ()):
    """Starts an example as a process in a group of its own, with its output in a file."""
    with open(f"{out}.log", "w") as log:
        return subprocess.Popen(
            [sys.executable, *launcher, str(EXAMPLES / program), f"--out={out}", *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell's background jobs ignore it, and so would what they start.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def wait_until(ready: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 100
    while not ready():
        assert process.poll() is None, "it ended early"
        assert time.monotonic() < deadline, "not ready after 100 s"
        time.sleep(0.01)


def finish(process: subprocess.Popen) -> int:
    try:
        return process.wait(timeout=100)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its processes, within 30 seconds
        process.wait(timeout=60)
        raise
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def interrupt(process: subprocess.Popen, number: int, ready: Callable[[], bool]) -> int:
    """Sends a signal as soon as the process is ready for it; returns the exit status."""
    try:
        wait_until(ready, process)
        process.send_signal(number)
    finally:
        status = finish(process)
    return status
