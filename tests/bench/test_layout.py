"""Imports within the benchmarks lead one way down, without a circle, those for types included."""

from __future__ import annotations

import ast
import graphlib
from importlib.util import resolve_name

from benchmarks.common.files import ROOT

FOLDER = ROOT / "benchmarks"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in FOLDER.rglob("*.py")
    if path.name != "__init__.py"
}
BELOW = {"": ("", "science", "cpu", "common"), "cpu": ("cpu", "common"), "gpu": ("gpu", "common")}
BELOW |= {"science": ("science", "cpu", "common"), "common": ("common",)}


def place(module: str) -> str:
    """The folder below benchmarks/ that a module lies in."""
    return module.rpartition(".")[0].removeprefix("benchmarks").removeprefix(".")


def imports(module: str) -> set[str]:
    """The modules of the benchmark that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            base = resolve_name(name, module.rpartition(".")[0]) if node.level else name
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys()


def test_imports_lead_one_way_down():
    graph = {module: imports(module) for module in MODULES}
    assert sum(map(len, graph.values())) > len(graph), "imports are found"
    for module, below in graph.items():
        for name in below:
            assert place(name) in BELOW[place(module)], f"{module} imports {name}"
    list(graphlib.TopologicalSorter(graph).static_order())  # raises where there is a circle
