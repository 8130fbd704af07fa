# Copyright © 2026 MLX Contributors

"""Build and test this tree on another release of upstream, and say what broke.

Works on a copy of the tree whose pin, the one line in pyproject.toml, names the
other release, in a fresh environment. One line a failure; the status is 1 if
there is one.

    python benchmarks/check_upstream.py 0.32.1 --write
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from check_exported import bad, kinds
from compare_upstream_tests import run_each
from compare_wheels import copy_tree
from export_patch import build
from fresh_install import EXTRAS, README, make_environment, write_table

MARK = "releases"
HEADER = "| release | builds | our tests | what broke |\n|---|---|---|---|\n"


def pin(tree: Path, version: str) -> None:
    """Let a copy of the tree name another release."""
    path = tree / "pyproject.toml"
    old, text = build.pinned_version(path), path.read_text()
    path.write_text(text.replace(f"{build.NAME}=={old}", f"{build.NAME}=={version}"))
    if build.pinned_version(path) != version:
        raise ValueError(f"{path.name}: could not pin {version} in place of {old}.")


def check(version: str, work: Path, only: list[str] | None) -> tuple[str, list[str]]:
    """Build and test; return a row of the table and one line a failure."""
    tree = work / f"tree-{version}"
    if not tree.is_dir():
        copy_tree(tree)
        pin(tree, version)
    try:
        python = make_environment(work / f"venv-{version}", f"{tree}{EXTRAS}")
    except ValueError as e:
        return f"| {version} | no | - | {e} |", [str(e)]
    names = sorted(path.stem for path in (tree / "tests").glob("test_*.py"))
    chosen = [name for name in names if only is None or name in only]
    outcomes = run_each(python, tree / "tests", chosen)
    how_many = f"{kinds(outcomes)} in {len(chosen)} of {len(names)} modules"
    failures = [f"{name}: {outcome}" for name, outcome in bad(outcomes).items()]
    what = ", ".join(sorted({f"`{f.rpartition('.')[2]}`" for f in bad(outcomes)}))
    return f"| {version} | yes | {how_many} | {what or 'nothing'} |", failures


def replace_row(version: str, row: str) -> None:
    """Put a release's row into the README's table."""
    text = README.read_text("utf-8").partition(f"<!-- {MARK} -->\n")[2]
    table = text.partition(f"<!-- end of {MARK} -->")[0]
    rows = [r for r in table.splitlines()[2:] if not r.startswith(f"| {version} |")]
    write_table(MARK, HEADER + "\n".join(sorted([*rows, row])), README)


def main() -> None:
    """Check one release."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", help="A release of mlx-lm on PyPI.")
    parser.add_argument("--work", type=Path, help="Keep tree and environment here.")
    parser.add_argument("--only", nargs="*", help="Test modules to run, not all.")
    parser.add_argument("--write", action="store_true", help="Into README.md.")
    args = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work.resolve() if args.work else Path(scratch)
        row, failures = check(args.version, work, args.only)
    for failure in failures:
        print(f"{args.version}: {failure}")
    print(row)
    print(f"{len(failures)} failures in {time.monotonic() - begin:.0f} s")
    if args.write:
        replace_row(args.version, row)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
