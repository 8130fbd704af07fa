# Copyright © 2026 MLX Contributors

"""Run upstream's own tests on plain and on patched mlx-lm and compare.

Each interpreter has one of the two installed. The tests come from upstream's
source archive. Prints a Markdown table; any difference makes the status 1.

    python benchmarks/compare_upstream_tests.py \\
        --plain /path/to/plain/bin/python --patched "$(which python)"
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from fresh_install import extract

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    "test_tuner_utils",
    "test_tuner_trainer",
    "test_datsets",
    "test_losses",
    "test_utils",
    "test_finetune",
    "test_models.TestModels.test_gpt2",
)
# Prints one JSON object: the version under test and test id -> outcome.
RUNNER = """
import io, json, os, re, sys, unittest
import mlx_lm

# What differs from run to run: addresses, numbers, temporary folders.
CHANGING = re.compile(r"0x[0-9a-f]+|/\\S+|\\d+")

class Outcomes(unittest.TestResult):
    def __init__(self):
        super().__init__()
        self.outcomes = {}
    def record(self, test, outcome, error=None):
        name = getattr(test, "test_case", test).id()
        if error is not None:
            reason = CHANGING.sub("#", str(error[1])).strip().partition("\\n")[0]
            outcome += f": {error[0].__name__}: {reason[:72]}".rstrip(": ")
        if self.outcomes.get(name, "passed") == "passed":
            self.outcomes[name] = outcome
    def addSuccess(self, test):
        self.record(test, "passed")
    def addFailure(self, test, error):
        self.record(test, "failed", error)
    def addError(self, test, error):
        self.record(test, "error", error)
    def addSubTest(self, test, subtest, error):
        self.record(test, "passed" if error is None else "failed", error)
    def addSkip(self, test, reason):
        self.record(test, "skipped")
    def addExpectedFailure(self, test, error):
        self.record(test, "expected failure")
    def addUnexpectedSuccess(self, test):
        self.record(test, "unexpected success")

# Whole: some tests go to another folder.
sys.path.insert(0, os.getcwd())
result = Outcomes()
unittest.defaultTestLoader.loadTestsFromNames(sys.argv[1:]).run(result)
print()
print(json.dumps([mlx_lm.__version__, mlx_lm.__file__, result.outcomes]))
"""


def unpack_tests(archive: Path, target: Path) -> Path:
    """Unpack upstream's tests and return their folder."""
    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if "/tests/" in m.name]
        extract(tar, target, members)
    return next(target.glob("*/tests"))


def download(target: Path) -> Path:
    """Fetch the source archive of the release that the build pins."""
    pins = re.findall(r'"(mlx-lm==[^"]+)"', (ROOT / "pyproject.toml").read_text())
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    pip += ["--no-binary", ":all:", "--dest", str(target), *pins]
    subprocess.run(pip, check=True)
    return next(target.glob("*.tar.gz"))


def run_tests(python: str, folder: Path, names: list[str]) -> tuple[str, dict]:
    """Run the tests with one interpreter; return its version and the outcomes."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    # A hub that answers now and then is no oracle; HF_HUB_OFFLINE=0 asks it anyway.
    environment.setdefault("HF_HUB_OFFLINE", "1")
    result = subprocess.run(
        [os.path.abspath(python), "-c", RUNNER, *names],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise SystemExit(f"{python} could not run the tests:\n{result.stderr}")
    version, path, outcomes = json.loads(result.stdout.splitlines()[-1])
    print(f"{python}: mlx-lm {version} at {path}", file=sys.stderr)
    return version, outcomes


def run_each(python: str, folder: Path, names: list[str]) -> dict[str, str]:
    """Run modules one by one: one that ends the process ends no other."""
    outcomes: dict[str, str] = {}
    for name in names:
        try:
            outcomes |= run_tests(python, folder, [name])[1]
        except SystemExit as e:
            outcomes[name] = f"ended: {str(e).splitlines()[-1][:72]}"
    return outcomes


def compare(before: dict[str, str], after: dict[str, str]) -> list[tuple[str, ...]]:
    """List each test with both outcomes."""
    return [
        (name, before.get(name, "absent"), after.get(name, "absent"))
        for name in sorted(before.keys() | after.keys())
    ]


def main() -> None:
    """Compare the outcomes test by test."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plain", required=True, help="Python with plain mlx-lm.")
    parser.add_argument("--patched", default=sys.executable, help="Python with DPO.")
    parser.add_argument("--sdist", type=Path, help="Default: downloaded with pip.")
    parser.add_argument("tests", nargs="*", default=TESTS, help="Names for unittest.")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        archive = args.sdist or download(Path(folder))
        tests = unpack_tests(archive, Path(folder))
        plain_version, plain = run_tests(args.plain, tests, args.tests)
        patched_version, patched = run_tests(args.patched, tests, args.tests)

    if "+dpo." in plain_version or "+dpo." not in patched_version:
        raise SystemExit(
            f"Needs plain against patched, got {plain_version} and {patched_version}."
        )
    print(f"| test | {plain_version} | {patched_version} | same |")
    print("|---|---|---|---|")
    different = 0
    for name, before, after in compare(plain, patched):
        different += before != after
        same = "yes" if before == after else "**no**"
        print(f"| {name} | {before} | {after} | {same} |")
    print(f"\n{len(plain)} tests on plain mlx-lm, {different} differ.")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
