# Copyright © 2026 MLX Contributors

import ast
import json
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import mutate  # noqa: E402  # isort: skip
from mutations import mutations_of  # noqa: E402

SOURCE = '''"""No 1 of these words."""

LIMIT = 2.5


def mean(x, scale=1, *, keep: bool = True):
    """Nor 2 of these."""
    if not x:
        raise ValueError(f"{len(x) + 1} is wrong")
    total = sum(x[1:], start=0)
    return total / len(x) if keep and (
        scale > 0
    ) else [-total, mx.stop_gradient(total)]
'''


class TestMutations(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name)
        (self.root / "a.py").write_text(SOURCE)
        self.found = mutations_of(self.root / "a.py", self.root)

    def test_each_is_another_program(self):
        programs = {ast.dump(ast.parse(m.apply(SOURCE))) for m in self.found}
        self.assertEqual(
            len(programs | {ast.dump(ast.parse(SOURCE))}), 1 + len(self.found)
        )
        self.assertEqual(len({m.key for m in self.found}), len(self.found))

    def test_what_is_changed(self):
        changes = {f"{m.old} -> {m.new}" for m in self.found}
        for change in (
            *("2.5 -> 5.0", "1 -> 2", "True -> False", "not x -> (x)", "sum -> max"),
            *("0 -> 1", ", start=0 -> ", "/ -> *", "and -> or", "> -> >="),
            *("-total -> (total)", "mx.stop_gradient(total) -> (total)"),
        ):
            self.assertIn(change, changes)
        at_import = [m.old for m in self.found if m.at_import]
        self.assertEqual(at_import, ["2.5", "1", "True"])
        # A statement's tests are those of any of its lines.
        (lines,) = {m.lines for m in self.found if m.old == "and"}
        self.assertEqual(lines, range(11, 14))

    def test_cheapest_tests_come_first(self):
        record = {
            "seconds": {"slow": 2.0, "fast": 0.1, "other": 0.1},
            "lines": {"slow": {"a.py": [10]}, "fast": {"a.py": [10, 12]}, "other": {}},
        }
        (self.root / "module.json").write_text(json.dumps(record))
        tests = mutate.Tests(self.root)
        (change,) = (m for m in self.found if m.old == "sum")
        self.assertEqual(tests.of(change), ["fast", "slow"])
        (change,) = (m for m in self.found if m.old == "2.5")
        self.assertEqual(tests.of(change), ["fast", "slow"])
        other = change._replace(file="a/b.py")
        self.assertEqual(tests.of(other), ["fast", "slow"])

    def test_table(self):
        results = {m.key: {"noticed": "FAIL: test"} for m in self.found}
        for m, run in zip(self.found, (3, 1)):
            results[m.key] = {"noticed": "", "run": run, "covering": 3}
        reasons = self.root / "reasons.json"
        reasons.write_text(json.dumps({self.found[0].key: "the same number"}))
        with mock.patch.object(mutate, "EQUIVALENT", reasons):
            text = mutate.table(self.found, results)
        count = len(self.found)
        self.assertIn(f"| all | {count} | {count - 2} | 1 | 1 |", text)
        self.assertIn("[2.5 -> 5.0]` | the same number |", text)
        self.assertRegex(text, r"def mean.*\[1 -> 2\]` \| 1 of 3 \|")

    def test_every_mutant_of_the_core_is_a_program(self):
        for path in mutate.core_files(mutate.REPO):
            text = path.read_text()
            for m in mutations_of(path, mutate.REPO / mutate.PACKAGE)[::10]:
                ast.parse(m.apply(text))


if __name__ == "__main__":
    unittest.main()
