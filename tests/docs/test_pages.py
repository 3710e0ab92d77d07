"""The programs on the pages run, the errors are as they say, and no public name is missing."""

from __future__ import annotations

import importlib
import linecache
import re
import sys
import types
import warnings

import pytest
import torch

import fastbptt
from common import DOCS, python_blocks
from fastbptt import _third

# Each page's blocks are one program.
PROGRAMS = {"book.md": 10, "five_minutes.md": 5, "precision.md": 2, "resets_in_rl.md": 4}


@pytest.mark.parametrize(("page", "count"), PROGRAMS.items())
def test_programs_run(page, count, capsys):
    blocks = python_blocks(page)
    assert len(blocks) == count
    names: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, block {number}", "exec"), names)


def test_the_recipes_of_recurrent_rl_are_the_loop():
    """What a library's loop over steps computes, theirs computes with the lines that change."""
    names: dict = {}
    for block in python_blocks("resets_in_rl.md"):
        exec(block, names)
    T, B, H = 6, 3, 4
    lstm, done = fastbptt.LSTM(H, H), torch.rand(T, B) < 0.3
    x, state = torch.randn(T, B, H), (torch.randn(1, B, H), torch.randn(1, B, H))
    expected, last = fastbptt.reference.run(lstm, x, state, resets=done)

    agent = types.SimpleNamespace(network=torch.nn.Identity(), lstm=lstm)
    seen, flags = (255.0 * x).flatten(0, 1), done.flatten().float()
    output, ours = names["Agent"].get_states(agent, seen, state, flags)
    torch.testing.assert_close(output, expected.flatten(0, 1))
    torch.testing.assert_close(ours, last)

    features, starts = (each.transpose(0, 1).flatten(0, 1) for each in (x, done.float()))
    output, ours = names["one_call"](features, state, starts, lstm)
    torch.testing.assert_close(output, expected.transpose(0, 1).flatten(0, 1))
    torch.testing.assert_close(ours, last)


def test_the_callback_of_lightning(monkeypatch):
    """What a Trainer calls of it, in its order; tests/clients has it in Lightning itself."""
    lightning = types.ModuleType("lightning")
    lightning.Callback = object
    monkeypatch.setitem(sys.modules, "lightning", lightning)
    names: dict = {}
    (block,) = (b for b in python_blocks("choosing_a_truncation.md") if "lightning" in b)
    exec(block, names)

    torch.manual_seed(0)
    module = torch.nn.Module()
    module.rnn = fastbptt.GRU(3, 5)
    module.loss = lambda output, target: (output - target).square().mean()
    batch = torch.randn(20, 8, 3), torch.randn(20, 8, 5)

    def make():
        return names["AdaptTruncation"](fastbptt.AdaptiveTruncation(0.5, k_max=10, every=2))

    callback = make()
    for number in range(3):
        callback.on_train_batch_start(None, module, batch, number)
        assert module.rnn.truncation == fastbptt.TBPTT(
            callback.schedule.k, 2 * callback.schedule.k - 1
        )
    resumed = make()
    resumed.load_state_dict(callback.state_dict())
    module.rnn.truncation = None
    resumed.on_train_batch_start(None, module, batch, 3)  # does not measure
    assert resumed.schedule.k == callback.schedule.k and module.rnn.truncation is not None


PREAMBLE = python_blocks("errors.md")[0]
ERRORS = re.findall(
    r"^```python\n((?:(?!```).*\n)+)```\n\n```text\n((?:(?!```).*\n)+)```$",
    (DOCS / "errors.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


def raised(program: str) -> str:
    """The error that a program ends with, or else its warning."""
    name = "<errors.md>"  # cells' errors show the line
    linecache.cache[name] = (len(program), None, program.splitlines(keepends=True), name)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            names: dict = {}
            exec(PREAMBLE, names)
            exec(compile(program, name, "exec"), names)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "\n".join(f"{each.category.__name__}: {each.message}" for each in warned)


def test_all_errors_are_found():
    assert len(ERRORS) == len(python_blocks("errors.md")) - 1 == 22


@pytest.mark.parametrize(("program", "message"), ERRORS, ids=lambda text: text.splitlines()[-1])
def test_an_error_is_what_its_page_says(program, message, monkeypatch):
    monkeypatch.setattr(_third, "_warned", False)  # it warns once in a process
    wanted = re.escape(" ".join(message.split()))
    wanted = wanted.replace("FILE:LINE", r"\S+:\d+").replace(re.escape("..."), ".*")
    assert re.fullmatch(wanted, " ".join(raised(program).split()))


def public_names() -> list[str]:
    modules = (fastbptt.cells, fastbptt.diagnostics, fastbptt.reference)
    names = [f"fastbptt.{name}" for name in fastbptt.__all__]
    return names + [f"{m.__name__}.{name}" for m in modules for name in m.__all__]


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    listed, module, whole = set(), "fastbptt", set()
    for kind, name in re.findall(r"^\.\. (\w+):: ([\w.]+)", text, re.MULTILINE):
        if kind == "currentmodule":
            module = name
        elif kind == "automodule":
            whole.add(name)
        else:
            listed.add(f"{module}.{name}")
    # A module with :members: lists what its __all__ does; that of cells is written out.
    whole.discard("fastbptt.cells")
    missing = {n for n in public_names() if n not in listed and n.rpartition(".")[0] not in whole}
    assert missing == {f"fastbptt.{name}" for name in ("cells", "diagnostics", "reference")}
    for name in listed:
        path, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(path), last)


def test_every_page_is_in_a_list_of_pages():
    """As the site's build finds it, which needs more than the tests do."""
    lists = "".join(
        block
        for page in DOCS.glob("**/*.md")
        for block in re.findall(r"```\{toctree\}(.*?)```", page.read_text(encoding="utf-8"), re.S)
    )
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.glob("**/*.md")}
    assert pages - {"index"} <= set(lists.split())
