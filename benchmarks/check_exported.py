# Copyright © 2026 MLX Contributors

"""Apply the exported patch to the release, install it, and test the result.

In fresh environments: upstream's whole test suite on the pristine release and
on the patched one, which must end alike for the same reasons; our tests on the
patched one; seeded runs with this tree installed and with the patch installed,
which must give the same bytes. Any finding makes the status 1.

    python benchmarks/check_exported.py --sdist mlx_lm-0.32.2.tar.gz --write
    python benchmarks/check_exported.py --sdist ... --series FOLDER --work WORK
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import compare_lora_adapters
from check_series import check_series
from compare_upstream_tests import compare, download, run_each
from export_patch import ROOT, build, git, make_patch, unpack
from fresh_install import EXTRAS, make_environment, write_table

MARK = "exported patch"
PIN = build.pinned_version(ROOT / "pyproject.toml")
# setuptools-scm would look for tags, which a source archive lacks.
VERSION = "SETUPTOOLS_SCM_PRETEND_VERSION_FOR_MLX_LM"


def prepare(archive: Path, work: Path) -> tuple[Path, Path]:
    """Unpack the release twice and apply the patch to one of them."""
    for name in ("export", "pristine", "patched"):
        shutil.rmtree(work / name, ignore_errors=True)
    patch = work / "dpo.patch"
    patch.write_bytes(make_patch(ROOT, archive, work / "export"))
    trees = []
    for name in ("pristine", "patched"):
        (work / name).mkdir(parents=True)
        trees.append(unpack(archive, work / name))
    git(trees[1], "init", "--quiet")
    git(trees[1], "apply", "--check", str(patch))
    git(trees[1], "apply", str(patch))
    return trees[0], trees[1]


def install(tree: Path, folder: Path, version: str) -> str:
    """Install one of the trees with what its tests need."""
    return make_environment(folder, f"{tree}{EXTRAS}", **{VERSION: version})


def suites(pristine: Path, patched: Path) -> tuple[list[str], list[str]]:
    """Name upstream's test modules and those that the patch adds."""
    names = [
        {path.stem for path in (tree / "tests").glob("test_*.py")}
        for tree in (pristine, patched)
    ]
    return sorted(names[0]), sorted(names[1] - names[0])


def kinds(outcomes: dict[str, str]) -> str:
    """Count outcomes: passed, skipped, failed."""
    counts = Counter(outcome.partition(":")[0] for outcome in outcomes.values())
    return ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) or "none"


def bad(outcomes: dict[str, str]) -> dict[str, str]:
    """Keep the tests that did not end well."""
    fine = ("passed", "skipped", "expected failure")
    return {n: o for n, o in outcomes.items() if o.partition(":")[0] not in fine}


def report(
    before: dict[str, str],
    after: dict[str, str],
    ours: dict[str, str],
    adapters: list[tuple[str, ...]],
) -> tuple[str, int]:
    """Write the result as Markdown; also return how many findings it has."""
    differ = [row for row in compare(before, after) if row[1] != row[2]]
    broken = bad(ours)
    unequal = [row for row in adapters if len(set(row[1:])) != 1]
    reasons = Counter(outcome for outcome in bad(after).values())
    lines = [
        "| what | result |",
        "|---|---|",
        f"| upstream's tests on the pristine {PIN} | {kinds(before)} |",
        f"| upstream's tests on the patched {PIN} | {kinds(after)} |",
        f"| of them, ended otherwise | {len(differ)} |",
        f"| our tests on the patched {PIN} | {kinds(ours)} |",
        f"| adapters, this tree and the patch | {len(adapters)} runs, "
        f"{len(unequal)} differ |",
        "",
    ]
    for name, *hashes in adapters:
        lines.append(f"- {name}: " + " and ".join(h[:16] for h in hashes))
    lines += [f"- ended otherwise: {n}: {a} / {b}" for n, a, b in differ]
    lines += [f"- ours: {name}: {outcome}" for name, outcome in broken.items()]
    lines += ["", "Why upstream's fail, on both:", ""]
    lines += [f"- {count} x `{why}`" for why, count in reasons.most_common()]
    return "\n".join(lines), len(differ) + len(broken) + len(unequal)


def main() -> None:
    """Prepare, install, test and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sdist", type=Path, help="Default: downloaded with pip.")
    parser.add_argument("--work", type=Path, help="Keep trees and environments here.")
    parser.add_argument(
        "--installed", default=sys.executable, help="Python with this tree installed."
    )
    parser.add_argument("--only", nargs="*", help="Test modules to run, not all.")
    parser.add_argument(
        "--series", type=Path, help="Check each prefix of the patches here instead."
    )
    parser.add_argument(
        "--prefixes", type=int, nargs="*", default=[], help="Only these, such as 1 3."
    )
    parser.add_argument(
        "--new", type=int, help="From this prefix on only the modules of its layer."
    )
    parser.add_argument("--write", action="store_true", help="Into README.md.")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            work = args.work.resolve() if args.work else Path(scratch)
            work.mkdir(parents=True, exist_ok=True)
            archive = args.sdist or download(work)
            if args.series:
                given = args.series, archive, work, args.prefixes, args.only
                text, findings = check_series(*given, args.new)
                print(text)
                if args.write:
                    write_table("series", text)
                sys.exit(bool(findings))
            trees = prepare(archive, work)
            plain = install(trees[0], work / "plain-venv", PIN)
            patched = install(trees[1], work / "patched-venv", f"{PIN}+dpo.exported")
            pythons = (args.installed, patched)
            with tempfile.TemporaryDirectory() as folder:
                adapters = compare_lora_adapters.compare(pythons, Path(folder), True)
            theirs, own = (
                [n for n in names if args.only is None or n in args.only]
                for names in suites(*trees)
            )
            after = run_each(patched, trees[1] / "tests", theirs)
            before = run_each(plain, trees[0] / "tests", theirs)
            ours = run_each(patched, trees[1] / "tests", own)
    except (ValueError, subprocess.CalledProcessError) as e:
        print(f"check_exported: {e}", file=sys.stderr)
        sys.exit(2)
    text, findings = report(before, after, ours, adapters)
    print(text)
    if args.write:
        write_table(MARK, text)
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
