"""Places where the sources can be broken, and how: what tools/mutate.py draws from.

A mutant of C++ is behind a switch, so that one build has all of them: the program's environment
says by FASTBPTT_MUTANT which one is on. A mutant of Python is a changed file.

Where FASTBPTT_MUTANTS_REACHED names a file, the byte of a mutant of C++ is set there when it is
come by.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: What mutated C++ includes.
HEADER = """\
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>

namespace fastbptt {

inline const int kMutantOn = [] {
  const char* const number = std::getenv("FASTBPTT_MUTANT");
  return number ? std::atoi(number) : -1;
}();

inline unsigned char* const kMutantsReached = [] {
  const char* const name = std::getenv("FASTBPTT_MUTANTS_REACHED");
  const int file = name ? open(name, O_RDWR) : -1;
  struct stat status;
  if (file < 0 || fstat(file, &status) != 0) return static_cast<unsigned char*>(nullptr);
  void* const memory = mmap(nullptr, status.st_size, PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  return memory == MAP_FAILED ? nullptr : static_cast<unsigned char*>(memory);
}();

constexpr bool is_mutant(int number) {
  if (__builtin_is_constant_evaluated()) return false;
  if (kMutantsReached) kMutantsReached[number] = 1;
  return kMutantOn == number;
}

// A factor in front of a number: -1 if the mutant is on.
struct MutantSign {
  int number;
};
template <typename T>
[[gnu::always_inline]] constexpr T operator*(MutantSign sign, const T& value) {
  return is_mutant(sign.number) ? T(-value) : value;
}

}  // namespace fastbptt
"""
IS_ON, SIGN = "::fastbptt::is_mutant({})", "::fastbptt::MutantSign{{{}}} * "
# By the name of a kind, what is looked for in a line of C++, whose group is replaced, and by what.
CPP = {
    # one step, row or lane less
    "bound": (r"\bfor \([^;]*; [^;<]*< [\w.>()-]+(?=;)()", f" - {IS_ON}"),
    # one element further
    "index": (r"[\w\])]\[[a-z]\w*(?: [+*] \w+)?()\]", f" + {IS_ON}"),
    "sign": (r"[\w)\]] [+-] ()(?=[a-z_])", SIGN),
    "condition": (
        r"^\s*(?:\} else )?if \(()(?=[^=;]*\) (?:\{|return|continue))",
        f"{IS_ON} != bool(",
    ),
    # barriers, sums and stores among them
    "statement": (r"^\s*()(?=[\w.>\[\]()-]+(?:\([^;{}]*\)| [+*-]?= [^;{}]*);$)", f"if (!{IS_ON}) "),
}
# What only sizes what grows anyway, and what is no code.
NO_CODE = re.compile(
    r".*\breserve\b|^\s*(//|#|static_assert|using |template|return;|namespace|constexpr|TORCH_)"
)


@dataclass(frozen=True)
class Mutant:
    """One place and one way to break it."""

    path: str  # from the repository's root
    line: int  # from 1 on
    kind: str
    begin: int  # in the file's text
    end: int
    text: str  # in place of what is there; of C++ with {} for the number

    @property
    def is_cpp(self) -> bool:
        return not self.path.endswith(".py")

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.kind}"


def _code(line: str) -> str:
    """The line with its strings and comments blanked."""
    line = re.sub(r'"(?:[^"\\]|\\.)*"', lambda m: '"' + "_" * (len(m[0]) - 2) + '"', line)
    return re.sub(r"//.*", lambda m: " " * len(m[0]), line)


def of_cpp(path: str, text: str) -> Iterator[Mutant]:
    at, before = 0, ""
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        code = _code(line.rstrip("\n"))
        is_whole = before.endswith((";", "{", "}")) and not before.endswith(");{")
        if not NO_CODE.match(line) and "constexpr" not in code and not code.endswith("\\"):
            for kind, (pattern, replacement) in CPP.items():
                if kind == "statement" and not is_whole:
                    continue  # the second line of one, or the body of an if
                for match in re.finditer(pattern, code):
                    where = at + match.start(1)
                    yield Mutant(path, number, kind, where, where, replacement)
                    if kind == "condition":
                        break
        if code.strip():
            before = code.rstrip()
        at += len(line)


def with_all(text: str, numbered: dict[int, Mutant]) -> str:
    """A file of C++ with the switches of its mutants."""
    for number, mutant in sorted(numbered.items(), key=lambda item: -item[1].begin):
        new = mutant.text.format(number)
        end = mutant.end
        if mutant.kind == "condition":  # up to the bracket that closes it
            depth, end = 1, mutant.begin
            while depth:
                depth += {"(": 1, ")": -1}.get(text[end], 0)
                end += 1
            end -= 1
            text = text[: mutant.begin] + new + text[mutant.begin : end] + ")" + text[end:]
        else:
            text = text[: mutant.begin] + new + text[end:]
    return text


_OTHER = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
    ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.FloorDiv: "*", ast.And: "or", ast.Or: "and",
}  # fmt: skip


def of_python(path: str, text: str) -> Iterator[Mutant]:
    """Operators turned into others, conditions into their contrary, numbers into the next.

    What an error says is left as it is.
    """
    tree = ast.parse(text)
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def span(node: ast.AST) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[
            node.end_lineno - 1
        ] + node.end_col_offset

    lines = text.splitlines()
    raises = (node for node in ast.walk(tree) if isinstance(node, ast.Raise))
    said = {part for node in raises for part in ast.walk(node)}
    for node in ast.walk(tree):
        if node in said or "stacklevel" in lines[getattr(node, "lineno", 1) - 1]:
            continue
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            operator, left, right = node.ops[0], node.left, node.comparators[0]
        elif isinstance(node, ast.BinOp):
            operator, left, right = node.op, node.left, node.right
        elif isinstance(node, ast.BoolOp):
            operator, left, right = node.op, node.values[0], node.values[1]
        elif isinstance(node, ast.If | ast.IfExp) and not isinstance(node.test, ast.Compare):
            begin, end = span(node.test)
            yield Mutant(path, node.lineno, "condition", begin, end, f"not ({text[begin:end]})")
            continue
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            begin, end = span(node)
            yield Mutant(path, node.lineno, "number", begin, end, str(node.value + 1))
            continue
        else:
            continue
        begin, end = span(left)[1], span(right)[0]
        between = text[begin:end]
        is_plain = re.fullmatch(r"\s[^\s()#\"']+( not| in)?\s", between)
        if type(operator) in _OTHER and is_plain:
            new = f" {_OTHER[type(operator)]} "
            yield Mutant(path, node.lineno, "operator", begin, end, new)


def all_of(root: Path, paths: list[str]) -> list[Mutant]:
    found: list[Mutant] = []
    for path in paths:
        text = (root / path).read_text()
        found += (of_python if path.endswith(".py") else of_cpp)(path, text)
    return found
