"""The stubs say what there is, and a user's program passes a strict type checker."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastbptt
from fastbptt import _C, nn

PACKAGE = Path(fastbptt.__file__).parent
PROGRAM = Path(__file__).parent / "typed" / "program.py"
# What mypy knows of torch takes it 20 s to find out; it looks itself whether that still holds.
CACHE = Path(__file__).parents[2] / "build" / "mypy"


def stub(name: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{name}.pyi").read_text(encoding="utf-8"))


def arguments(function: ast.FunctionDef) -> list[str]:
    args = function.args
    return [each.arg for each in (*args.posonlyargs, *args.args, *args.kwonlyargs)]


def functions(tree: ast.Module | ast.ClassDef) -> list[ast.FunctionDef]:
    return [each for each in tree.body if isinstance(each, ast.FunctionDef)]


def test_compiled_functions_are_those_of_the_stub():
    named = {each.name for each in functions(stub("_C"))}
    assert named <= set(dir(_C))
    sources = "".join(p.read_text() for p in PACKAGE.rglob("*.py"))
    used = set(re.findall(r"(?<!torch\.)\b_C\.([a-z]\w+)", sources))
    assert used <= named, "give fastbptt/_C.pyi what Python calls"


def test_modules_take_what_the_stub_says():
    classes = {c.name: c for c in stub("nn").body if isinstance(c, ast.ClassDef)}
    for name in nn.__all__:
        ours = getattr(nn, name)
        base = classes[name if name == "LSTM" else "_WithOneState"]
        calls = [f for f in functions(base) if f.name == "forward"]
        assert len(calls) == 4
        for call in calls:
            assert arguments(call) == list(inspect.signature(ours.forward).parameters)
        (made,) = (f for f in functions(classes[name]) if f.name == "__init__")
        values = {each: None for each in arguments(made)[1:]}
        values |= {"input_size": 3, "hidden_size": 4, "num_layers": 1, "bias": True}
        values |= {"batch_first": False, "dropout": 0.0, "bidirectional": False}
        values |= {key: 2 for key in ("proj_size",) if key in values}
        values |= {"nonlinearity": "tanh"} if "nonlinearity" in values else {}
        keywords = [each.arg for each in made.args.kwonlyargs]
        module = ours(**values)
        settings = [each for each in keywords if each not in ("device", "dtype")]
        assert all(each in inspect.signature(ours.__init__).parameters for each in settings)
        assert all(hasattr(module, each) for each in settings)
        # The same order: by position all of torch's arguments arrive where they belong.
        by_position = [value for key, value in values.items() if key not in keywords]
        assert ours(*by_position).state_dict().keys() == module.state_dict().keys()


@pytest.mark.slow
def test_a_users_program_is_typed(tmp_path):
    def check(program: Path) -> str:
        # The package as it is installed for others: its own lines are not looked at.
        command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"]
        command += [f"--cache-dir={CACHE}", "--no-error-summary", str(program)]
        env = {"MYPYPATH": str(PACKAGE.parent), "PATH": ""}
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
        assert not done.stderr
        return done.stdout

    assert check(PROGRAM) == ""
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import fastbptt\n"
        "fastbptt.GRU(3, 4, trunctation=3)\n"
        "fastbptt.RNN(3, 4, nonlinearity='sigmoid')\n"
        "fastbptt.LSTM(3, 4, truncation='32')\n"
    )
    found = check(wrong)
    assert [f"wrong.py:{line}:" in found for line in (2, 3, 4)] == [True] * 3
