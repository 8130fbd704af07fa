# Copyright © 2026 MLX Contributors

"""What the tree is made of, and what an import of it loads, as a table.

    python benchmarks/house_table.py [OTHER_TREE ...]

Each tree is one that a build has laid upstream's files around; the first column is
this one.
"""

import argparse
import ast
import io
import json
import os
import runpy
import statistics
import subprocess
import sys
import tokenize
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = ["tuner.losses", "tuner.datasets", "tuner.trainer", "dpo"]
COUNT = """
import sys, time
start = time.perf_counter()
{code}
seconds = time.perf_counter() - start
import json
names = [m for m in sys.modules if m.startswith("mlx_lm")]
print(json.dumps([len(names), len(sys.modules), seconds]))
"""
HELP = 'import sys; sys.argv = ["mlx_lm", "--help"]\nfrom mlx_lm import cli\n'
HELP += "try:\n    cli.main()\nexcept SystemExit:\n    pass"


def lines(path: Path) -> tuple[int, int, int, int]:
    """A module's lines: all, code, docstrings, comments."""
    text = path.read_text("utf-8")
    docs: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, owners) and ast.get_docstring(node) is not None:
            docs |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    code, comments = set(), set()
    skipped = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in (*skipped, tokenize.ENDMARKER):
            code |= set(range(token.start[0], token.end[0] + 1))
    code -= docs
    return len(text.splitlines()), len(code), len(docs), len(comments - code)


def loads(tree: Path, code: str, rounds: int) -> str:
    """Modules of mlx_lm, of all, and the median seconds that some code needs."""
    environment = os.environ | {"PYTHONPATH": str(tree)}
    run = [sys.executable, "-c", COUNT.format(code=code)]
    results = []
    for _ in range(rounds):
        done = subprocess.run(
            run, cwd=tree, env=environment, capture_output=True, text=True, check=True
        )
        results.append(json.loads(done.stdout.splitlines()[-1]))
    own, every, _ = results[-1]
    return f"{own} ({every:,}) · {statistics.median(r[2] for r in results):.2f} s"


def column(tree: Path, rounds: int) -> dict[str, str]:
    """Everything about one tree, by what it is called."""
    build = SimpleNamespace(**runpy.run_path(str(tree / "setup.py")))
    package = tree / build.PACKAGE
    own = [p for p in build.own_files(package) if p.suffix == ".py"]
    sums = [sum(n) for n in zip(*map(lines, own))]
    rooms = {p.relative_to(package).parts[:-1] for p in own} - {()}
    tests = [lines(p)[0] for p in sorted((tree / "tests").rglob("*.py"))]
    cells = {
        "modules, folders": f"{len(own)}, {len(rooms)}",
        "modules in `mlx_lm/tuner`": str(sum(p.parent.name == "tuner" for p in own)),
        "lines": f"{sums[0]:,}",
        "of code, docstrings, comments": ", ".join(f"{n:,}" for n in sums[1:]),
        "longest module": str(max(lines(p)[0] for p in own)),
        "lines of tests": f"{sum(tests):,}",
    }
    for name in IMPORTS:
        cells[f"`import mlx_lm.{name}`"] = loads(tree, f"import mlx_lm.{name}", rounds)
    return cells | {"`mlx_lm --help`": loads(tree, HELP, rounds)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("others", nargs="*", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    trees = [ROOT, *(other.resolve() for other in args.others)]
    columns = [column(tree, args.rounds) for tree in trees]
    print(f"| | {' | '.join(tree.name for tree in trees)} |")
    print("|---|" + "---|" * len(trees))
    for name in columns[0]:
        print(f"| {name} | {' | '.join(c[name] for c in columns)} |")


if __name__ == "__main__":
    main()
