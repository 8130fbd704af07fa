# Copyright © 2026 MLX Contributors

"""The changes that ``mutate.py`` makes to a file: one node of its syntax tree each."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

OPERATORS: dict[type, tuple[str, str]] = {
    **{ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/")},
    **{ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "*")},
    **{ast.Pow: ("**", "*"), ast.Lt: ("<", "<="), ast.LtE: ("<=", "<")},
    **{ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!=")},
    **{ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.In: ("in", "not in")},
    **{ast.IsNot: ("is not", "is"), ast.NotIn: ("not in", "in")},
    **{ast.And: ("and", "or"), ast.Or: ("or", "and")},
}
# Functions that have a counterpart, and those that can be left out.
SWAPPED = {
    **{"maximum": "minimum", "minimum": "maximum", "max": "min", "min": "max"},
    **{"any": "all", "all": "any", "logical_and": "logical_or", "sum": "max"},
}
LEFT_OUT = {"stop_gradient", "reversed", "sorted", "float", "int"}
# What is said to a user is compared by the tests of messages.
SPOKEN = {"rprint", "InputError", "ValueError", "TypeError", "TrainingStopped"}


class Mutation(NamedTuple):
    """Some text of a file in the place of other text."""

    file: str  # in mlx_lm/preference
    lines: range  # of the statement that it is in
    start: int  # in characters of the file
    end: int
    old: str
    new: str
    line: str  # the line that it begins in
    at_import: bool  # in no function
    number: int = 1  # of those that look alike

    @property
    def key(self) -> str:
        """Its name, which does not change with other lines of the file."""
        number = f" #{self.number}" if self.number > 1 else ""
        change = f"{_short(self.old)} -> {_short(self.new)}"
        return f"{self.file}: {self.line}  [{change}]{number}"

    @property
    def cell(self) -> str:
        """Its name in a cell of a Markdown table."""
        return self.key.replace("|", "\\|")

    def apply(self, text: str) -> str:
        """The file's text with the change."""
        return text[: self.start] + self.new + text[self.end :]


def _short(text):
    return " ".join(text.split()) or "nothing"


class _File:
    """A file's text, and where its nodes are in it."""

    def __init__(self, path: Path):
        self.text = path.read_text()
        self.lines = self.text.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    def at(self, line: int, column: int) -> int:
        # Columns are in bytes.
        before = self.lines[line - 1].encode()[:column].decode()
        return self.starts[line - 1] + len(before)

    def span(self, node: ast.AST) -> tuple[int, int]:
        start = self.at(node.lineno, node.col_offset)  # type: ignore[attr-defined]
        end = self.at(node.end_lineno, node.end_col_offset)  # type: ignore
        return start, end

    def of(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.text[start:end]


Change = tuple[int, int, str]


def _operator(
    file: _File, left: ast.AST, right: ast.AST, op: ast.AST
) -> Iterator[Change]:
    if type(op) not in OPERATORS:
        return
    old, new = OPERATORS[type(op)]
    start, end = file.span(left)[1], file.span(right)[0]
    pattern = re.escape(old).replace(r"\ ", r"\s+")
    if match := re.search(pattern, file.text[start:end]):
        yield start + match.start(), start + match.end(), new


def _is_text(node):
    is_string = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return is_string or isinstance(node, ast.JoinedStr)


def _constant(file, node):
    value = node.value
    if isinstance(value, bool):
        yield *file.span(node), str(not value)
    elif isinstance(value, int):
        yield *file.span(node), str(value + 1)
    elif isinstance(value, float):
        yield *file.span(node), repr(2 * value or 1.0)


def _call(file, node):
    start, end = file.span(node.func)
    name = file.of(node.func).rpartition(".")[2]
    if name in SWAPPED:
        yield end - len(name), end, SWAPPED[name]
    if name in LEFT_OUT and len(node.args) == 1 and not node.keywords:
        yield *file.span(node), f"({file.of(node.args[0])})"
    # Each argument that has a name, left out.
    given = sorted([*node.args, *node.keywords], key=lambda x: file.span(x)[0])
    for before, keyword in zip([None, *given], given):
        if isinstance(keyword, ast.keyword) and keyword.arg:
            start, end = file.span(keyword)
            if before is not None:
                start = file.span(before)[1]
            elif len(given) > 1:
                end = file.span(given[1])[0]
            yield start, end, ""


def _changes(file: _File, node: ast.AST) -> Iterator[Change]:
    """The changes of one node."""
    match node:
        case ast.BinOp(left=left, right=right, op=op):
            if not (_is_text(left) or _is_text(right)):
                yield from _operator(file, left, right, op)
        case ast.BoolOp(values=[first, second, *_], op=op):
            yield from _operator(file, first, second, op)
        case ast.Compare(left=left, ops=ops, comparators=[*others]):
            for one, other, kind in zip([left, *others], others, ops):
                yield from _operator(file, one, other, kind)
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield *file.span(node), f"({file.of(operand)})"
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            if not isinstance(test, (ast.Compare, ast.UnaryOp)):
                yield *file.span(test), f"(not ({file.of(test)}))"
        case ast.Constant():
            yield from _constant(file, node)
        case ast.Call():
            yield from _call(file, node)
        case ast.AugAssign(target=target, value=value, op=op):
            yield from _operator(file, target, value, op)
        case ast.Expr(value=ast.Call()):
            yield *file.span(node), "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield *file.span(node), "pass"


def _is_left_alone(file, node):
    """Documentation, types, and what is said to a user."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    if isinstance(node, ast.Call):
        return file.of(node.func).rpartition(".")[2] in SPOKEN
    return isinstance(node, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom))


def _header(node):
    """The lines of a statement without those of its body."""
    body = getattr(node, "body", None)
    is_block = isinstance(body, list) and body
    return range(node.lineno, body[0].lineno if is_block else node.end_lineno + 1)


def _walk(file, node, lines, in_function):
    if _is_left_alone(file, node):
        return
    if isinstance(node, ast.stmt):
        lines = _header(node)
    for change in _changes(file, node):
        yield change, lines, not in_function
    in_body = isinstance(node, (ast.FunctionDef, ast.Lambda))
    for name, child in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        inside = in_function or (in_body and name == "body")
        for one in child if isinstance(child, list) else [child]:
            if isinstance(one, ast.AST):
                yield from _walk(file, one, lines, inside)


def mutations_of(path: Path, root: Path) -> list[Mutation]:
    """All changes of a file, in its order."""
    file, found, seen = _File(path), [], Counter[str]()
    name = str(path.relative_to(root))
    walk = _walk(file, ast.parse(file.text), range(0), False)
    for change, lines, at_import in sorted(walk, key=lambda found: found[0]):
        start, end, new = change
        before = file.text.count("\n", 0, start)
        line = " ".join(file.lines[before].split())
        old = file.text[start:end]
        one = Mutation(name, lines, start, end, old, new, line, at_import)
        seen[one.key] += 1
        found.append(one._replace(number=seen[one.key]))
    return found
