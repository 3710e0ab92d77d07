"""Counts the instructions of each kernel's step in its machine code, as nvdisasm prints it.

A step is the innermost loop that has a barrier and a product. What stands between its wait for
other blocks and its first product, and between the wait and the barrier behind the product, delays
each step. tools/cuda_steps.txt holds limits, so that a slower step is seen without a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

LIMITS = Path(__file__).with_suffix(".txt")
MARGIN = 1.05  # of a limit over what is counted when it is set


class Counts(NamedTuple):
    """Instructions of a step."""

    total: int  # of the loop
    to_product: int  # on the shortest way from the wait to the product
    to_barrier: int  # on all ways from the wait to the barrier after the product


class Instruction(NamedTuple):
    operation: str  # with its modifiers
    is_predicated: bool
    operands: str
    target: int | None  # of a label among the operands: the instruction that it stands before


INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"^\s*(\.L\w+):")
FUNCTION = re.compile(r"^\.text\.(\w+):", re.MULTILINE)


def parse_functions(sass: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel of what `nvdisasm -c` prints."""
    parts = FUNCTION.split(sass)
    return {
        name: parse_instructions(text) for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def parse_instructions(text: str) -> list[Instruction]:
    found, places = [], {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            places[label[1]] = len(found)
        elif match := INSTRUCTION.search(line):
            found.append(match.groups())
    code = []
    for predicate, operation, operands in found:
        label = re.search(r"\((\.L\w+)\)", operands)
        target = places.get(label[1]) if label else None
        code.append(Instruction(operation, bool(predicate), operands, target))
    return code


def is_a(code: list[Instruction], *names: str) -> set[int]:
    return {i for i, each in enumerate(code) if each.operation.split(".")[0] in names}


def successors_of(code: list[Instruction]) -> list[set[int]]:
    """Where each instruction goes on. A call returns, and so is passed over."""
    after: list[set[int]] = []
    for i, each in enumerate(code):
        name = each.operation.split(".")[0]
        is_conditional = each.is_predicated or re.match(r"!?U?P\w+,", each.operands)
        goes_on = name not in ("BRA", "EXIT", "RET", "BSYNC") or is_conditional
        after.append({i + 1} if goes_on and i + 1 < len(code) else set())
        if name == "BRA" and each.target is not None:
            after[i].add(each.target)
    # BSYNC goes where the BSSY before it says that names the same register.
    begins, ends = is_a(code, "BSSY"), is_a(code, "BSYNC")
    register = {i: code[i].operands.split(",")[0] for i in begins | ends}
    changed = True
    while changed:
        changed = False
        for i in begins:
            same = {j for j, name in register.items() if name == register[i]}
            reached = reach({i + 1}, lambda j, same=same: () if j in same else after[j])
            for j in reached & same & ends:
                changed |= code[i].target not in after[j]
                after[j].add(code[i].target)
    return after


def reach(begin: Iterable[int], follow: Callable[[int], Iterable[int]]) -> set[int]:
    seen, left = set(begin), list(begin)
    while left:
        for j in follow(left.pop()):
            if j not in seen:
                seen.add(j)
                left.append(j)
    return seen


class Graph:
    """The control flow among some of the instructions."""

    def __init__(self, after: list[set[int]]):
        self.after = after
        self.before: list[set[int]] = [set() for _ in after]
        for i, follow in enumerate(after):
            for j in follow:
                self.before[j].add(i)

    def cycle(self, i: int, allowed: set[int]) -> set[int]:
        """What i can reach, and be reached from, inside allowed."""
        forth = reach(self.after[i] & allowed, lambda j: self.after[j] & allowed)
        back = reach(self.before[i] & allowed, lambda j: self.before[j] & allowed)
        return forth & back

    def distance(self, i: int, goals: set[int], allowed: set[int]) -> int:
        """The instructions between i and the nearest of the goals, which it has."""
        seen, layer, between = {i}, {i}, -1
        while not layer & goals:
            layer = {k for j in layer for k in self.after[j] & allowed} - seen
            seen |= layer
            between += 1
        return between

    def innermost(self, products: set[int], barriers: set[int]) -> set[int]:
        """The innermost loop with one of each; empty if there is none."""
        found, allowed = set(), set(range(len(self.after)))
        while True:
            cycles = (self.cycle(i, allowed) for i in barriers & allowed)
            inside = max((c for c in cycles if c & products), key=len, default=set())
            if not inside:
                return found
            found = inside
            allowed = {i for i in found if self.before[i] <= found}  # without where it is entered


def count_step(code: list[Instruction]) -> Counts | None:
    """The counts of a kernel's step; None if it has no such loop."""
    barriers, tensor_cores = is_a(code, "BAR"), is_a(code, "HMMA")
    products = is_a(code, "LDSM") | tensor_cores if tensor_cores else is_a(code, "FFMA")
    if not products or not barriers:
        return None
    graph = Graph(successors_of(code))
    loop = graph.innermost(products, barriers)
    if not loop:
        return None
    # Where there is nobody else to wait for, a step begins behind the barrier of the one before.
    tries = {i for i in is_a(code, "SYNCS") if "TRYWAIT" in code[i].operation}
    waits = tries & loop or barriers & loop
    to_product, wait = min((graph.distance(i, products & loop, loop), i) for i in waits)
    to_barrier = reach(
        graph.after[wait] & loop, lambda i: () if i in barriers else graph.after[i] & loop
    )
    return Counts(len(loop), to_product, len(to_barrier - barriers))


Key = tuple[str, str]  # a kernel's name, and the architecture


def read_limits(text: str) -> dict[Key, Counts]:
    lines = [line.split(maxsplit=4) for line in text.splitlines() if not line.startswith("#")]
    return {(name, sm): Counts(*map(int, numbers)) for sm, *numbers, name in lines}


HEADER = """\
# The most instructions of a step: all; from its wait to the first product; and to the barrier.
"""


def write_limits(counted: dict[Key, Counts]) -> str:
    lines = []
    for (name, sm), counts in sorted(counted.items()):
        numbers = "".join(f"{int(MARGIN * count):8}" for count in counts)
        lines.append(f"{sm:6}{numbers}  {name}\n")
    return HEADER + "".join(lines)


def complaints(counted: dict[Key, Counts], limits: dict[Key, Counts]) -> list[str]:
    """What is over its limit, has none, or is not there any more."""
    found = []
    for (name, sm), counts in counted.items():
        if (name, sm) not in limits:
            found.append(f"{sm} {name}: its step has no limits")
            continue
        for what, count, limit in zip(Counts._fields, counts, limits[name, sm], strict=True):
            if count > limit:
                found.append(f"{sm} {name}: {what} is {count} instructions, its limit is {limit}")
    gone = limits.keys() - counted.keys()
    found += [f"{sm} {name}: it has limits, and no step" for name, sm in gone]
    return sorted(found)
