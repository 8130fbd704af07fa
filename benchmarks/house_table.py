# Copyright © 2026 MLX Contributors

"""What the tree is made of, and what an import of it loads, as a table.

    python benchmarks/house_table.py [OTHER_TREE ...] [--suite [MODULE ...]]

Each tree is one that a build has laid upstream's files around; the first column is
this one. --suite runs their tests too, the trees in turn for each module, so that a
machine's other load falls on all alike.
"""

import argparse
import ast
import io
import json
import os
import re
import resource
import runpy
import statistics
import subprocess
import sys
import time
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


def count_tests(path: Path) -> int:
    """How many tests a module has, a table of cases counted once."""
    return len(re.findall(r"^    def test_", path.read_text("utf-8"), re.M))


def run_module(tree: Path, module: str) -> tuple[float, float]:
    """CPU and wall seconds of a test module, in a process with one thread for BLAS."""
    tests = tree / "tests"
    places = (tree, tests, tests / "fixtures", tree / "benchmarks")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, places)),
        "OPENBLAS_NUM_THREADS": "1",
    }
    before, tic = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    run = [sys.executable, "-m", "unittest", module]
    done = subprocess.run(run, cwd=tests, env=environment, capture_output=True)
    wall, after = time.perf_counter() - tic, resource.getrusage(
        resource.RUSAGE_CHILDREN
    )
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    state = "failed" if done.returncode else "ok"
    print(tree.name, module, f"{cpu:.1f} {wall:.1f}", state, file=sys.stderr)
    return cpu, wall


def suites(trees: list[Path], modules: list[str]) -> list[str]:
    """The seconds of each tree's tests, with their modules in turn."""
    found = [{path.stem for path in (t / "tests").glob("test_*.py")} for t in trees]
    seconds: list[list[tuple[float, float]]] = [[] for _ in trees]
    for module in modules or sorted(set.union(*found)):
        for tree, own, times in zip(trees, found, seconds):
            if module in own:
                times.append(run_module(tree, module))
    return [
        f"{sum(cpu for cpu, _ in times):,.0f} s · {sum(wall for _, wall in times):,.0f} s"
        for times in seconds
    ]


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
        "tests": f"{sum(map(count_tests, (tree / 'tests').glob('test_*.py'))):,}",
    }
    for name in IMPORTS:
        cells[f"`import mlx_lm.{name}`"] = loads(tree, f"import mlx_lm.{name}", rounds)
    return cells | {"`mlx_lm --help`": loads(tree, HELP, rounds)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("others", nargs="*", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--suite", nargs="*", metavar="MODULE")
    args = parser.parse_args()
    trees = [ROOT, *(other.resolve() for other in args.others)]
    columns = [column(tree, args.rounds) for tree in trees]
    if args.suite is not None:
        for cells, seconds in zip(columns, suites(trees, args.suite)):
            cells["tests' seconds: CPU, wall"] = seconds
    print(f"| | {' | '.join(tree.name for tree in trees)} |")
    print("|---|" + "---|" * len(trees))
    for name in columns[0]:
        print(f"| {name} | {' | '.join(c[name] for c in columns)} |")


if __name__ == "__main__":
    main()
