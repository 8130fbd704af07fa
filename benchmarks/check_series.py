# Copyright © 2026 MLX Contributors

"""Check that each prefix of the series stands alone on the release.

The first k patches are applied to a pristine tree, whose tests run with that tree first
on the path: those of the prefix, and upstream's, compared with the pristine release.
What has run is kept in results.json, so that a check that ended goes on.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from compare_upstream_tests import RUNNER, TESTS
from export_facts import changes
from export_patch import git, unpack
from series import LAYERS

# A module that takes longer is ended, and counts as failed.
MOST_SECONDS = 1800


def run_module(tree: Path, name: str) -> dict[str, Any]:
    """Run a module of a tree's tests; outcomes that are not well, their number, time."""
    tests = tree / "tests"
    places = [tree, tests, tests / "fixtures", tree / "benchmarks"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, places)),
        "HF_HUB_OFFLINE": "1",
    }
    tic, outcomes = time.perf_counter(), {name: "ended"}
    command = [sys.executable, "-c", RUNNER, name]
    try:
        result = subprocess.run(
            command,
            cwd=tests,
            env=environment,
            capture_output=True,
            text=True,
            timeout=MOST_SECONDS,
        )
    except subprocess.TimeoutExpired:
        outcomes = {name: f"longer than {MOST_SECONDS} s"}
    else:
        if result.returncode == 0:
            _, path, outcomes = json.loads(result.stdout.splitlines()[-1])
            if not Path(path).is_relative_to(tree):
                raise ValueError(f"{path} was tested, not {tree}.")
        elif lines := result.stderr.strip().splitlines():
            outcomes = {name: lines[-1][:100]}
    fine = ("passed", "skipped", "expected failure")
    bad = {k: x for k, x in outcomes.items() if x.partition(":")[0] not in fine}
    seconds = round(time.perf_counter() - tic, 1)
    return {"tests": len(outcomes), "bad": bad, "seconds": seconds}


class Results:
    """What has run so far, kept in a file."""

    def __init__(self, path: Path):
        self._path = path
        self.found: dict[str, Any] = {}
        if path.is_file():
            self.found = json.loads(path.read_text("utf-8"))

    def run(self, key: str, tree: Path, name: str) -> dict[str, Any]:
        """Run a module, unless that was done."""
        if key not in self.found:
            self.found[key] = run_module(tree, name)
            self._path.write_text(json.dumps(self.found, indent=1), "utf-8")
            print(key, self.found[key], file=sys.stderr, flush=True)
        return self.found[key]


def test_modules(tree: Path) -> set[str]:
    """The test modules of a tree."""
    return {path.stem for path in (tree / "tests").glob("test_*.py")}


def check_series(
    folder: Path,
    archive: Path,
    work: Path,
    numbers: Iterable[int] = (),
    only: Iterable[str] | None = None,
) -> tuple[str, int]:
    """
    Apply, test and tell.

    Args:
        folder (Path): The patches, as ``export_patch.py --series`` writes them.
        archive (Path): The release.
        work (Path): Trees and results are kept here.
        numbers (Iterable): Prefixes to test. Default: all.
        only (Iterable, optional): Test modules to run. Default: all of the prefix.

    Returns:
        tuple: A table in Markdown, and the number of tests that failed.
    """
    trees = []
    for name in ("pristine", "prefix"):
        shutil.rmtree(work / name, ignore_errors=True)
        (work / name).mkdir(parents=True)
        trees.append(unpack(archive, work / name))
    pristine, tree = trees
    git(tree, "init", "--quiet")
    theirs, results = test_modules(pristine), Results(work / "results.json")
    lines = ["| | layer | files | lines | tests | seconds | failures | upstream's |"]
    lines.append("|---|" + "---|" * 7)
    faults, notes = 0, []
    for number, patch in enumerate(sorted(folder.glob("*.patch")), 1):
        git(tree, "apply", "--whitespace=nowarn", str(patch))
        if numbers and number not in numbers:
            continue
        rows = changes(patch.read_text("utf-8", "replace"))
        digest = git(tree, "hash-object", str(patch)).decode()[:12]
        names = sorted(test_modules(tree) - theirs)
        given = [n for n in names if only is None or n in only]
        ours = [results.run(f"{number} {digest} {n}", tree, n) for n in given]
        before = [results.run(f"0 {n}", pristine, n) for n in TESTS]
        after = [results.run(f"{number} {digest} {n}", tree, n) for n in TESTS]
        same = all(a["bad"] == b["bad"] for a, b in zip(before, after))
        bad = {k: x for one in ours for k, x in one["bad"].items()}
        faults += len(bad) + (not same)
        notes += [f"- {number}: {name}: {outcome}" for name, outcome in bad.items()]
        total = sum(one["seconds"] for one in ours)
        cells = (
            *(number, LAYERS[number - 1].title, len(rows)),
            *(f"{sum(row[2] for row in rows):,}", sum(x["tests"] for x in ours)),
            *(f"{total:,.0f}", len(bad), "as before" if same else "differ"),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, *(["", *notes] if notes else [])]), faults
