# Copyright © 2026 MLX Contributors

"""Change the core in one place at a time, and see whether a test notices.

    python benchmarks/mutate.py --work FOLDER --sample 150 --seed 0

The tree is copied into the folder. What the folder holds is not done again: the tests
that cover each line (a file for each test module), and a line for each mutant. Of a
mutant those tests run that cover its line, cheapest first, until one fails; their cost
is at most --budget seconds, and a later run with a larger one goes on with survivors.
A table is printed at the end. mutate_equivalent.json says which mutants compute the
same as the original, and why.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
import unittest
from collections import Counter, defaultdict
from pathlib import Path

from mutations import Mutation, mutations_of

REPO = Path(__file__).parents[1]
PACKAGE = "mlx_lm/preference"
CORE = [
    *("objective/*.py", "forward/*.py", "step.py", "reference/*.py", "batch/*.py"),
    *("measure/*.py", "run/loop.py"),
]
EQUIVALENT = Path(__file__).with_name("mutate_equivalent.json")
SLOW_IMPORTS = ["transformers", "mlx.nn", "mlx.optimizers"]
# Seconds of tests before the rest is loaded: most mutants don't outlive them.
FIRST_TESTS = 3.0


def core_files(tree: Path) -> list[Path]:
    """The files that are mutated."""
    return sorted(x for room in CORE for x in (tree / PACKAGE).glob(room))


def room_of(file: str) -> str:
    """The room that a file is in, itself or as a folder."""
    return file.removesuffix(".py").split("/")[0]


def record(module: str, out: Path) -> None:
    """Run a module's tests; write the time of each, and the lines that it covers."""
    import coverage

    tree = Path.cwd().parent
    files = list(map(str, core_files(tree)))
    cover = coverage.Coverage(data_file=None, config_file=False, include=files)
    seconds: dict[str, float] = {}

    class Result(unittest.TextTestResult):
        def startTest(self, test):
            super().startTest(test)
            cover.switch_context(test.id())
            self.tic = time.perf_counter()

        def addSuccess(self, test):
            super().addSuccess(test)
            seconds[test.id()] = round(time.perf_counter() - self.tic, 3)

    cover.start()
    suite = unittest.defaultTestLoader.loadTestsFromName(module)
    unittest.TextTestRunner(resultclass=Result).run(suite)  # type: ignore[arg-type]
    cover.stop()
    lines: dict[str, dict[str, list[int]]] = {test: {} for test in seconds}
    for file in cover.get_data().measured_files():
        name = str(Path(file).relative_to(tree / PACKAGE))
        for line, tests in cover.get_data().contexts_by_lineno(file).items():
            for test in set(tests) & seconds.keys():
                lines[test].setdefault(name, []).append(line)
    out.write_text(json.dumps({"seconds": seconds, "lines": lines}))


def run_tests(tree: Path, tests: list[str], log: Path) -> None:
    """Run tests of a tree in this process, which ends with them."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.path[:0] = search = test_paths(tree)
    os.environ |= {
        "PYTHONPATH": os.pathsep.join(search),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    os.chdir(tree / "tests")
    sys.dont_write_bytecode = True
    program = unittest.main(
        None, argv=["unittest", "-f", *tests], exit=False, catchbreak=False
    )
    os._exit(not program.result.wasSuccessful())


def test_paths(tree: Path) -> list[str]:
    """Where the tests of a tree look for modules."""
    return list(map(str, (tree, tree / "tests/fixtures", tree / "tests")))


class Tests:
    """What each test costs, and which tests cover a line."""

    def __init__(self, folder: Path):
        self.seconds: dict[str, float] = {}
        self._by_line: dict[tuple, set[str]] = defaultdict(set)
        self._by_room: dict[str, set[str]] = defaultdict(set)
        for path in sorted(folder.glob("*.json")):
            found = json.loads(path.read_text())
            self.seconds |= found["seconds"]
            for test, files in found["lines"].items():
                for file, lines in files.items():
                    for line in lines:
                        self._by_line[file, line].add(test)
                    self._by_room[room_of(file)].add(test)

    def of(self, mutation: Mutation) -> list[str]:
        """The tests of a mutation, cheapest first."""
        found = set()
        for line in mutation.lines:
            found |= self._by_line[mutation.file, line]
        if mutation.at_import:
            # No test runs such a line, all of the room may depend on it.
            found = self._by_room[room_of(mutation.file)]
        return sorted(found, key=lambda test: (self.seconds[test], test))


class Tree:
    """The copy that mutants are written into."""

    def __init__(self, work: Path):
        self.path = work / "tree"
        self.backup = work / "original"
        if not self.path.exists():
            skipped = shutil.ignore_patterns(".git", "__pycache__", "build")
            shutil.copytree(REPO, self.path, ignore=skipped, symlinks=True)
        if self.backup.exists():
            # An earlier run was killed.
            name, text = self.backup.read_text().split("\n", 1)
            (self.path / PACKAGE / name).write_text(text)
            self.backup.unlink()
        self.log = work / "log"
        # A process that has imported what takes long is copied for each mutant.
        self.server = multiprocessing.get_context("forkserver")
        self.server.set_forkserver_preload(SLOW_IMPORTS)

    def run(self, tests: list[str], timeout: float) -> str:
        """Run tests: the first that fails, or nothing."""
        arguments = (self.path, tests, self.log)
        process = self.server.Process(target=run_tests, args=arguments)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            return "ERROR: it takes too long"
        if process.exitcode == 0:
            return ""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        failed = [x for x in lines if x.startswith(("FAIL:", "ERROR:"))]
        return failed[0] if failed else f"ERROR: {lines[-1:]}"

    def record(self, modules: list[str], out: Path) -> None:
        """Record the modules that are not in the folder yet."""
        out.mkdir(exist_ok=True)
        for module in modules:
            path = out / f"{module}.json"
            if not path.exists():
                script = str(Path(__file__).resolve())
                search = os.pathsep.join(test_paths(self.path))
                done = subprocess.run(
                    [sys.executable, script, "--record", module, str(path)],
                    cwd=self.path / "tests",
                    env=os.environ | {"PYTHONPATH": search},
                    capture_output=True,
                    text=True,
                )
                print(module, done.stderr.strip().splitlines()[-1:], flush=True)

    def try_mutant(self, mutation: Mutation, tests: list[str], seconds: float) -> str:
        """What noticed a mutant, or nothing."""
        path = self.path / PACKAGE / mutation.file
        text = path.read_text()
        self.backup.write_text(f"{mutation.file}\n{text}")
        try:
            path.write_text(mutation.apply(text))
            return self.run(tests, timeout=60 + 5 * seconds)
        finally:
            path.write_text(text)
            self.backup.unlink()


def judge(tree: Tree, tests: Tests, mutation: Mutation, budget: float) -> dict:
    """Run a mutant's tests as far as they are in the budget."""
    found = tests.of(mutation)
    first: list[str] = []
    rest: list[str] = []
    total, noticed = 0.0, ""
    for test in found:
        if total + tests.seconds[test] > budget and first:
            break
        total += tests.seconds[test]
        (first if total < FIRST_TESTS or not first else rest).append(test)
    for part in (first, rest):
        if part and not noticed:
            seconds = sum(tests.seconds[test] for test in part)
            noticed = tree.try_mutant(mutation, part, seconds)
    run = len(first) + len(rest)
    return {
        **{"mutant": mutation.key, "noticed": noticed, "covering": len(found)},
        **{"run": run, "budget": budget},
    }


def read_results(path: Path) -> dict[str, dict]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {x["mutant"]: x for x in map(json.loads, lines)}


def is_done(result: dict | None, budget: float) -> bool:
    """Whether more tests would not change a result."""
    if result is None:
        return False
    enough = result["run"] == result["covering"] or result["budget"] >= budget
    return bool(result["noticed"]) or (enough and result["covering"] > 0)


def table(mutants: list[Mutation], results: dict[str, dict]) -> str:
    """Counts by room, the equivalent ones and the survivors, as Markdown."""
    reasons = json.loads(EQUIVALENT.read_text())
    counts: dict[str, Counter] = defaultdict(Counter)
    survivors, same = [], []
    for mutant in mutants:
        result = results.get(mutant.key)
        if result is None:
            continue
        room = room_of(mutant.file)
        if result["noticed"]:
            outcome = "killed"
        elif mutant.key in reasons:
            outcome = "equivalent"
            same.append(f"| `{mutant.cell}` | {reasons[mutant.key]} |")
        else:
            outcome = "survived"
            tests = f"{result['run']} of {result['covering']}"
            survivors.append(f"| `{mutant.cell}` | {tests} |")
        for name in (room, "all"):
            counts[name].update([outcome, "mutants"])
    names = ("mutants", "killed", "equivalent", "survived")
    rows = ["| room | " + " | ".join(names) + " |", "|---" * 5 + "|"]
    for room in (*sorted(counts.keys() - {"all"}), "all"):
        rows.append(f"| {room} | " + " | ".join(str(counts[room][n]) for n in names))
        rows[-1] += " |"
    for title, found in (("equivalent | why", same), ("survived | tests", survivors)):
        if found:
            rows += ["", f"| {title} |", "|---|---|", *found]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help="folder for copy and results")
    parser.add_argument("--sample", type=int, help="how many; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of tests")
    parser.add_argument("--tests", nargs="+", help="test modules; default: all")
    parser.add_argument("--only", default="", help="mutants whose name has this")
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args()
    if args.record:
        return record(args.record[0], Path(args.record[1]))
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    tree, results_file = Tree(work), work / "results.jsonl"
    root = tree.path / PACKAGE
    found = [m for f in core_files(tree.path) for m in mutations_of(f, root)]
    random.Random(args.seed).shuffle(found)
    found = [m for m in found if args.only in m.key][: args.sample]
    results = read_results(results_file)
    if not args.table:
        names = sorted(path.stem for path in (tree.path / "tests").glob("test_*.py"))
        tree.record(args.tests or names, work / "coverage")
        tests = Tests(work / "coverage")
        equivalent = json.loads(EQUIVALENT.read_text())
        for mutant in found:
            known = results.get(mutant.key)
            if is_done(known, args.budget) or mutant.key in equivalent and known:
                continue
            results[mutant.key] = one = judge(tree, tests, mutant, args.budget)
            with results_file.open("a") as file:
                file.write(json.dumps(one) + "\n")
            print(one["noticed"] or "SURVIVED", "|", mutant.key, flush=True)
    print(table(found, results))


if __name__ == "__main__":
    main()
