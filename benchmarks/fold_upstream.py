# Copyright © 2026 MLX Contributors

"""Fold a module of this tree, see setup.py, into the upstream one that it extends.

    fold(upstream, ours, name)       one module out of two
      split(text)                    top-level statements with their comments
      Overlay.read(ours, name)       our imports and definitions, twins taken out
      fold_class.merge_class         our methods in upstream's class
    point_home(text, names)          other files name the folded modules

``ast`` says where statements are; what is written are slices of the two texts,
so that comments and layout stay. Sorting imports is left to isort.
"""

import ast
import re
from dataclasses import dataclass, field

from fold_class import Piece, bases, bound_names, is_docstring, merge_class, split

TWIN = "_upstream_"


def is_main(node: ast.stmt) -> bool:
    """Tell whether a statement is ``if __name__ == "__main__":``."""
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def rename(text: str, names: dict[str, str]) -> str:
    """Write other expressions for names that a text reads."""
    places = [
        (node.lineno, node.col_offset, node.id)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Name) and node.id in names
    ]
    lines = [line.encode() for line in text.splitlines(keepends=True)]
    for number, column, name in sorted(places, reverse=True):
        line = lines[number - 1]  # columns count bytes
        rest = line[column + len(name.encode()) :]
        lines[number - 1] = line[:column] + names[name].encode() + rest
    return b"".join(lines).decode()


@dataclass
class Overlay:
    """What a module of ours adds to its upstream twin."""

    docstring: str = ""
    imports: list[Piece] = field(default_factory=list)
    body: list[Piece] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)  # ours -> upstream's name

    @classmethod
    def read(cls, text: str, name: str) -> "Overlay":
        """Take a module apart; imports of its twin ``name`` are left out."""
        overlay = cls()
        for piece in split(text):
            node = piece.node
            if is_docstring(node) and not overlay.imports and not overlay.body:
                overlay.docstring = piece.text.partition('"""')[2]
            elif isinstance(node, ast.ImportFrom) and node.module == TWIN + name:
                renamed = {a.asname: a.name for a in node.names if a.asname}
                overlay.aliases |= renamed
            elif isinstance(node, (ast.Import, ast.ImportFrom)) and not overlay.body:
                overlay.imports.append(Piece(node, piece.text.lstrip("\n")))
            else:
                overlay.body.append(piece)
        if overlay.imports and not overlay.docstring:
            # The copyright line above the first import is upstream's to give.
            first = overlay.imports[0]
            first.text = re.sub(r"\A(#.*\n|\n)+", "", first.text)
        return overlay


def reads_while_imported(text: str, name: str) -> bool:
    """
    Tell whether a module needs something of an upstream twin to be imported.

    Args:
        text (str): The module.
        name (str): The module that the twin is of.

    Returns:
        bool: True where a base class, a default or an annotation comes from it.

    Example:
        >>> use = "from ._upstream_x import A\\nclass B(A):\\n    pass\\n"
        >>> reads_while_imported(use, "x")
        True
    """
    if TWIN + name not in text:
        return False
    tree, names = ast.parse(text), {TWIN + name}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == TWIN + name:
            names |= {alias.asname or alias.name for alias in node.names}
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Name) and node.id in names:
            return True
        body = getattr(node, "body", [])
        later = (
            body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else []
        )
        todo += [child for child in ast.iter_child_nodes(node) if child not in later]
    return False


def fold(
    upstream: str, ours: str, name: str, late: frozenset[str] = frozenset()
) -> str:
    """
    Make one module of upstream's and the one of ours that extends it.

    Definitions of ours that upstream has as well take their place; the others
    follow in their order, above ``if __name__ == "__main__":`` where there is one.

    Args:
        upstream (str): The text of upstream's module.
        ours (str): The text of ours, which imports ``._upstream_NAME``.
        name (str): The module's name.
        late (frozenset): Modules beside it that need upstream's definitions to be
            imported: ours imports them below these.

    Returns:
        str: The text; its imports are complete, but neither merged nor sorted.

    Raises:
        ValueError: If a name would mean two things, or a class can't be merged.

    Example:
        >>> twin = "from ._upstream_loss import kl as _kl"
        >>> print(fold("def kl():\\n    return 1\\n", twin, "loss"), end="")
        def kl():
            return 1
    """
    overlay = Overlay.read(_without_itself(ours, name), name)
    pieces = split(upstream)
    tail = "".join(upstream.splitlines(keepends=True)[_end(pieces) :])
    head = _import_block(pieces)
    _check_names(overlay, pieces, name)
    places = {
        bound: i
        for i, piece in enumerate(pieces)
        if not isinstance(piece.node, (ast.Import, ast.ImportFrom))
        for bound in bound_names(piece.node)
    }
    texts = [piece.text for piece in pieces]
    added = ""
    for piece in overlay.body:
        place = next((places[n] for n in bound_names(piece.node) if n in places), None)
        if place is not None:
            texts[place] = _replace(pieces[place], piece, overlay.aliases)
        else:
            added += rename(piece.text, overlay.aliases)
    if added:
        added = "\n\n" + added.strip("\n") + "\n"
    end = len(texts) - (bool(pieces) and is_main(pieces[-1].node))
    rest = "".join(texts[head:end])
    used = set() if name == "__init__" else _read_names(rest + added)
    sooner = [p for p in overlay.imports if getattr(p.node, "module", "") not in late]
    after = [p for p in overlay.imports if p not in sooner]
    merged = "".join(_hand_on(piece, used) for piece in sooner)
    if after:
        imports = "".join(_hand_on(piece, used) for piece in after)
        added = f"\n{imports}{added}"
    start = _with_docstring(
        texts[:head], overlay.docstring, upstream if not pieces else ""
    )
    # Own imports stand right behind upstream's, where isort merges the two.
    if not head and rest and merged:
        start, rest = _copyright(rest)
        merged += "\n\n"
    return start + merged + rest + added + "".join(texts[end:]) + tail


def _replace(theirs, ours, aliases):
    """Our definition in upstream's place, a class that extends it merged with it."""
    text = ours.text
    if isinstance(ours.node, ast.ClassDef) and bases(ours.node) & set(aliases):
        text = merge_class(theirs, ours, aliases)
    lead = re.match(r"\n*", theirs.text)
    assert lead is not None
    return lead.group() + rename(text, aliases).strip("\n") + "\n"


def _without_itself(text, name):
    """Our module with its uses of its twin as a module resolved."""
    twin, places = TWIN + name, []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == twin:
            places.append((node, node.attr))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            if ast.unparse(node.args[0]) == twin and len(node.args) == 2:
                places.append((node, f"globals()[{ast.unparse(node.args[1])}]"))
    for node, new in sorted(places, key=lambda p: p[0].lineno, reverse=True):
        if node.lineno != node.end_lineno:
            raise ValueError(
                f"{name}.py:{node.lineno}: write {twin}'s use in one line."
            )
        lines = text.splitlines(keepends=True)
        line = lines[node.lineno - 1].encode()
        line = line[: node.col_offset] + new.encode() + line[node.end_col_offset :]
        lines[node.lineno - 1] = line.decode()
        text = "".join(lines)
    return re.sub(rf"(?m)^from \. import {twin}\n", "", text)


def _read_names(text):
    return {n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)}


def _hand_on(piece, used):
    """An import of ours; a name that is only handed on says so: ``f as f``."""
    node = piece.node
    if not used or not isinstance(node, ast.ImportFrom):
        return piece.text.rstrip("\n") + "\n"
    if all((a.asname or a.name) in used for a in node.names):
        return piece.text.rstrip("\n") + "\n"
    for alias in node.names:
        if alias.name not in used and not alias.asname:
            alias.asname = alias.name
    return ast.unparse(node) + "\n"


def _end(pieces):
    return pieces[-1].node.end_lineno if pieces else 0


def _import_block(pieces):
    """The index behind the imports that a module begins with, 0 without."""
    head = 0
    for i, piece in enumerate(pieces):
        if isinstance(piece.node, (ast.Import, ast.ImportFrom)):
            head = i + 1
        elif not (i == 0 and is_docstring(piece.node)):
            break
    return head


def _copyright(text):
    match = re.match(r"(#.*\n)*\n*", text)
    assert match is not None
    return match.group(), text[match.end() :]


def _with_docstring(texts, docstring, empty):
    """Text up to the imports, with our docstring where upstream has none."""
    text = "".join(texts) or empty
    if not docstring or (texts and is_docstring(ast.parse(text).body[0])):
        return text
    comment, rest = _copyright(text)
    return f'{comment.rstrip()}\n\n"""{docstring.rstrip()}\n\n{rest}'.lstrip("\n")


def _check_names(overlay, pieces, name):
    """Refuse a name that means one thing in our module and another in upstream's."""
    theirs = {
        n: what for piece in pieces for n, what in bound_names(piece.node).items()
    }
    for piece in overlay.imports:
        for local, what in bound_names(piece.node).items():
            if theirs.get(local, what) != what:
                raise ValueError(
                    f"{name}.py: {local} is {what} here and {theirs[local]} upstream: "
                    "rename it."
                )
    extended = set(overlay.aliases.values())
    for piece in overlay.body:
        for local, what in bound_names(piece.node).items():
            if local in theirs and (":" in theirs[local] or local[0] == "_"):
                if local not in extended:
                    raise ValueError(
                        f"{name}.py: {local} is {what} here and upstream has its own: "
                        "rename it."
                    )


def point_home(text: str, names: set[str]) -> str:
    """
    Let a module or test that named upstream's twins name the folded modules.

    ``from ._upstream_x import f`` becomes ``from . import x`` and ``x.f``: ``x``
    may import this module in turn.

    Args:
        text (str): The text of the module.
        names (set): Names of the modules that were folded.

    Returns:
        str: The text without twins.

    Raises:
        ValueError: If the module's own names are in the way.

    Example:
        >>> print(point_home("from ._upstream_x import f\\nf(1)\\n", {"x"}), end="")
        from . import x
        x.f(1)
    """
    if TWIN not in text:
        return text
    tree = ast.parse(text)
    taken = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    taken |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    lines = text.splitlines(keepends=True)
    uses: dict[str, str] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        package, _, module = node.module.rpartition(".")
        home = module.removeprefix(TWIN)
        if home == module or home not in names:
            continue
        if home in taken or home == "__init__":
            raise ValueError(f"{home!r} is taken: import {node.module} as a module.")
        uses |= {a.asname or a.name: f"{home}.{a.name}" for a in node.names}
        assert node.end_lineno is not None
        end, start = node.end_lineno, node.lineno - 1
        lines[start:end] = ["\n"] * (end - start)
        indent = " " * node.col_offset
        parent = "." * node.level + package
        lines[start] = f"{indent}from {parent} import {home}\n"
    text = rename("".join(lines), uses)
    twins = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    return re.sub(rf"\b{TWIN}({twins})\b", r"\1", text) if names else text
