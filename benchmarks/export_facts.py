# Copyright © 2026 MLX Contributors

"""Facts of an exported patch, for whoever writes the pull request.

What coverage counts is in pyproject.toml.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path


def changes(patch: str) -> list[tuple[str, bool, int, int]]:
    """
    List the files of a patch.

    Args:
        patch (str): A diff that git wrote.

    Returns:
        list: Name, whether the file is new, lines added, lines removed.

    Example:
        >>> changes("diff --git a/x b/x\\n--- a/x\\n+++ b/x\\n@@ -1 +1 @@\\n-a\\n+b\\n")
        [('x', False, 1, 1)]
    """
    found = []
    for part in re.split(r"(?m)^diff --git ", patch)[1:]:
        head, _, body = part.partition("\n@@")
        name = head.splitlines()[0].rpartition(" b/")[2]
        signs = [line[:1] for line in body.splitlines()]
        new = "\nnew file mode" in head
        found.append((name, new, signs.count("+"), signs.count("-")))
    return found


def count_tests(folder: Path, names: list[str]) -> int:
    """Count the test methods of some files, inherited ones aside."""
    count = 0
    for name in names:
        tree = ast.parse((folder / name).read_text())
        functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))
        count += sum(function.name.startswith("test_") for function in functions)
    return count


def coverage(root: Path) -> str:
    """Say what the last measured run covered, if its file is there."""
    report = root / "coverage.json"
    if report.is_file():
        totals = json.loads(report.read_text())["totals"]
        return f"{totals['percent_covered']:.1f} % (coverage.json)"
    if not (root / ".coverage").is_file():
        return "not measured: neither coverage.json nor .coverage is there"
    command = [sys.executable, "-m", "coverage", "report", "--format=total"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    total = result.stdout.strip()
    return f"{total} % (.coverage)" if total else "coverage can't read .coverage"


def tables(text: str) -> str:
    """
    Keep the headings and the tables of a Markdown document.

    Args:
        text (str): The document.

    Returns:
        str: Its tables, each below its heading.

    Example:
        >>> print(tables("# A\\nwords\\n## B\\n| x |\\n|---|\\nmore"))
        ## B
        | x |
        |---|
    """
    kept: list[str] = []
    heading = ""
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line
        elif line.startswith("|"):
            if heading:
                kept.append(heading)
                heading = ""
            kept.append(line)
    return "\n".join(kept)


def section(text: str, title: str) -> str:
    """
    Take one section out of a Markdown document.

    Args:
        text (str): The document.
        title (str): The section's heading.

    Returns:
        str: The section with its heading; empty if there is none.

    Example:
        >>> section("# A\\n## B\\nwords\\n## C\\n", "B")
        '## B\\nwords\\n'
    """
    parts = re.split(r"(?m)^(?=## )", text)
    return next((x for x in parts if x.startswith(f"## {title}\n")), "")


def facts(root: Path, patch: str) -> str:
    """
    Write what a pull request would have to say in numbers.

    Args:
        root (Path): This tree.
        patch (str): The patch.

    Returns:
        str: Files, lines, tests, coverage, what a reviewer may ask, and the
        benchmarks' tables, in Markdown.
    """
    text = (root / "benchmarks" / "README.md").read_text("utf-8")
    rows = changes(patch)
    tests = [n for n, *_ in rows if re.fullmatch(r"tests/test_\w+\.py", n)]
    new = sum(is_new for _, is_new, _, _ in rows)
    added, removed = sum(row[2] for row in rows), sum(row[3] for row in rows)
    parts = [
        f"{len(rows)} files, {new} of them new; {added} lines added, "
        f"{removed} removed",
        f"{count_tests(root, tests)} tests in {len(tests)} files",
        f"coverage: {coverage(root)}",
        "",
        "| file | | added | removed |",
        "|---|---|---|---|",
        *(
            f"| {n} | {'new' if is_new else ''} | {a} | {r} |"
            for n, is_new, a, r in rows
        ),
        "",
        section(text, "What a reviewer may ask"),
        tables(text),
    ]
    return "\n".join(parts)
