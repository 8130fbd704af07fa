# Copyright © 2026 MLX Contributors

"""Merge a class of this tree with the upstream one that it extends (see setup.py)."""

import ast
from dataclasses import dataclass

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass
class Piece:
    """A statement, and its text with the comments above it."""

    node: ast.stmt
    text: str


def split(text: str, body: list[ast.stmt] | None = None, start: int = 0) -> list[Piece]:
    """Cut a module, or a class whose ``body`` is given, into its statements."""
    lines = text.splitlines(keepends=True)
    pieces = []
    for node in ast.parse(text).body if body is None else body:
        assert node.end_lineno is not None
        pieces.append(Piece(node, "".join(lines[start : node.end_lineno])))
        start = node.end_lineno
    return pieces


def bound_names(node: ast.stmt) -> dict[str, str]:
    """Map each name that a statement binds to what it stands for."""
    if isinstance(node, Definition):
        return {node.name: "a definition"}
    if isinstance(node, ast.Import):
        return {a.asname or a.name.partition(".")[0]: a.name for a in node.names}
    if isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        return {a.asname or a.name: f"{module}:{a.name}" for a in node.names}
    stored = (n for n in ast.walk(node) if isinstance(n, ast.Name))
    return {n.id: "a value" for n in stored if isinstance(n.ctx, ast.Store)}


def is_docstring(node: ast.stmt) -> bool:
    """Tell whether a statement is a bare string."""
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def bases(node: ast.ClassDef) -> set[str]:
    """List the plain names among the bases of a class."""
    return {base.id for base in node.bases if isinstance(base, ast.Name)}


def merge_class(theirs: Piece, ours: Piece, aliases: dict[str, str]) -> str:
    """
    Put our methods into upstream's class of the same name.

    A method that ends with a call of its ``super()`` ends with upstream's body.

    Args:
        theirs (Piece): Upstream's class.
        ours (Piece): Ours, whose one base is upstream's under another name.
        aliases (dict): Our other names of upstream's classes.

    Returns:
        str: The class.

    Raises:
        ValueError: If ours has other bases or decorators, or calls ``super()``
            in another way.

    Example:
        >>> (theirs,) = split("class A:\\n    def f(self):\\n        return 1\\n")
        >>> (ours,) = split("class A(_A):\\n    def g(self):\\n        return 2\\n")
        >>> print(merge_class(theirs, ours, {"_A": "A"}), end="")
        class A:
            def f(self):
                return 1
        <BLANKLINE>
            def g(self):
                return 2
    """
    upper, lower = theirs.node, ours.node
    assert isinstance(upper, ast.ClassDef) and isinstance(lower, ast.ClassDef)
    single = len(lower.bases) == 1 and not lower.keywords and not lower.decorator_list
    if not single or [aliases[b] for b in bases(lower)] != [lower.name]:
        raise ValueError(
            f"class {lower.name}: needs upstream's {lower.name} as its one base, and no "
            "decorator, to become one class with it."
        )
    members, own = _members(theirs), _members(ours)
    by_name = {n: m for m in members for n in bound_names(m.node)}
    head = "".join(theirs.text.splitlines(keepends=True)[: _header_end(theirs)])
    added = []
    for member in own:
        found = [by_name[n] for n in bound_names(member.node) if n in by_name]
        if is_docstring(member.node):
            if is_docstring(members[0].node):
                members.pop(0)
            head += member.text.rstrip("\n") + "\n\n"
            members[0].text = members[0].text.lstrip("\n")
        elif found:
            body = _resolve_super(member, found[0], lower.name)
            lead = "\n" if found[0].text.startswith("\n") else ""
            found[0].text = lead + body.strip("\n") + "\n"
        else:
            added.append("\n" + member.text.strip("\n") + "\n")
    return head + "".join(m.text for m in members) + "".join(added)


def _first_line(piece):
    """The line of the piece's text, counted from 1, that the node begins in."""
    node = piece.node
    decorators = getattr(node, "decorator_list", [])
    begin = min([node.lineno, *(d.lineno for d in decorators)])
    return (
        piece.text.count("\n") + (piece.text[-1:] != "\n") - (node.end_lineno - begin)
    )


def _offset(piece):
    """What to subtract from the node's line numbers to get lines of its text."""
    decorators = getattr(piece.node, "decorator_list", [])
    begin = min([piece.node.lineno, *(d.lineno for d in decorators)])
    return begin - _first_line(piece)


def _header_end(piece):
    """How many lines of a class or function stand above its body."""
    first = piece.node.body[0]
    decorators = getattr(first, "decorator_list", [])
    return min([first.lineno, *(d.lineno for d in decorators)]) - 1 - _offset(piece)


def _members(piece):
    """The statements of a class or function, with their comments."""
    offset, start = _offset(piece), _header_end(piece)
    lines = piece.text.splitlines(keepends=True)
    members = []
    for node in piece.node.body:
        end = node.end_lineno - offset
        members.append(Piece(node, "".join(lines[start:end])))
        start = end
    return members


def _resolve_super(ours, theirs, where):
    """Write upstream's body in place of the call of it that a method ends with."""
    node = ours.node
    calls = [
        n
        for n in ast.walk(node)
        if isinstance(n, ast.Call)
        and isinstance(n.func, ast.Name)
        and n.func.id == "super"
    ]
    if not calls:
        return ours.text
    names = [a.arg for a in theirs.node.args.args[1:]]
    wanted = f"super().{node.name}({', '.join(names)})"
    last = node.body[-1]
    value = last.value if isinstance(last, (ast.Return, ast.Expr)) else None
    if len(calls) > 1 or value is None or ast.unparse(value) != wanted:
        raise ValueError(
            f"{where}.{node.name}: can only end with {wanted}, to go on with upstream's "
            "body."
        )
    body = _members(theirs)
    if is_docstring(body[0].node):
        body.pop(0)
    head = "".join(ours.text.splitlines(keepends=True)[: _header_end(ours)])
    own = "".join(member.text for member in _members(ours)[:-1])
    return head + own + "".join(member.text for member in body)
