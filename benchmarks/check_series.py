# Copyright © 2026 MLX Contributors

"""Check that each prefix of the series stands alone on the release.

The first k patches are applied to a pristine tree, whose tests run with that tree first
on the path: those of the prefix, and upstream's, compared with the pristine release.
Each is also installed, and its files compared with the tree's. What has run is kept in
results.json, so that a check that ended goes on.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from hashlib import blake2b
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


def install(tree: Path, target: Path) -> list[str]:
    """Install a tree, and name what of its package is not there then."""
    shutil.rmtree(target, ignore_errors=True)
    version = "SETUPTOOLS_SCM_PRETEND_VERSION_FOR_MLX_LM"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run(
        [*command, "--target", str(target), str(tree)],
        check=True,
        env=os.environ | {version: "0.0.0"},
    )
    package = tree / "mlx_lm"
    names = [path.relative_to(tree) for path in package.rglob("*") if path.is_file()]
    # Upstream's guides stay in its source.
    needed = [x for x in names if x.suffix not in (".md", ".pyc") or "DPO" in x.name]
    missing = [str(x) for x in needed if not (target / x).is_file()]
    shutil.rmtree(target)
    return sorted(missing)


class Results:
    """What has run so far, kept in a file."""

    def __init__(self, path: Path):
        self._path = path
        self.found: dict[str, Any] = {}
        if path.is_file():
            self.found = json.loads(path.read_text("utf-8"))

    def run(self, key: str, what: Callable[..., Any], *given: Any) -> Any:
        """Find something out, unless that was done."""
        if key not in self.found:
            self.found[key] = what(*given)
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
    new: int | None = None,
) -> tuple[str, int]:
    """
    Apply, test and tell.

    Args:
        folder (Path): The patches, as ``export_patch.py --series`` writes them.
        archive (Path): The release.
        work (Path): Trees and results are kept here.
        numbers (Iterable): Prefixes to test. Default: all.
        only (Iterable, optional): Test modules to run. Default: all of the prefix.
        new (int, optional): From this prefix on, run of ours only the modules that its
            last patch brings or changes. Default: none is so short.

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
    lines = [
        "| | layer | files | lines | modules | tests | seconds | failures | upstream's "
        "| installed |"
    ]
    lines.append("|---|" + "---|" * 9)
    faults, notes, digest = 0, [], b""
    for number, patch in enumerate(sorted(folder.glob("*.patch")), 1):
        git(tree, "apply", "--whitespace=nowarn", str(patch))
        # Of all patches so far.
        digest = blake2b(digest + patch.read_bytes(), digest_size=6).digest()
        if numbers and number not in numbers:
            continue
        rows = changes(patch.read_text("utf-8", "replace"))
        names = sorted(test_modules(tree) - theirs)
        given = [n for n in names if only is None or n in only]
        which = "all"
        if new is not None and number >= new:
            brought = {Path(row[0]).stem for row in rows}
            given, which = [n for n in given if n in brought], "new"
        key = f"{number} {digest.hex()}"
        missing = results.run(f"{key} install", install, tree, work / "installed")
        ours = [results.run(f"{key} {n}", run_module, tree, n) for n in given]
        before = [results.run(f"0 {n}", run_module, pristine, n) for n in TESTS]
        after = [results.run(f"{key} {n}", run_module, tree, n) for n in TESTS]
        same = all(a["bad"] == b["bad"] for a, b in zip(before, after))
        bad = {k: x for one in ours for k, x in one["bad"].items()}
        faults += len(bad) + (not same) + len(missing)
        notes += [f"- {number}: {name} is not installed" for name in missing]
        notes += [f"- {number}: {name}: {outcome}" for name, outcome in bad.items()]
        total = sum(one["seconds"] for one in ours)
        cells = (
            *(number, LAYERS[number - 1].title, len(rows)),
            *(f"{sum(row[2] for row in rows):,}", f"{len(given)}, {which}"),
            *(sum(x["tests"] for x in ours), f"{total:,.0f}", len(bad)),
            *("as before" if same else "differ", "in part" if missing else "yes"),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, *(["", *notes] if notes else [])]), faults
