# Copyright © 2026 MLX Contributors

import io
import sys
import tempfile
import unittest
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import check_exported  # noqa: E402
import check_upstream  # noqa: E402
import compare_upstream_tests  # noqa: E402
import fresh_install  # noqa: E402


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


class TestComparing(unittest.TestCase):
    def test_outcomes_and_reasons(self):
        with tempfile.TemporaryDirectory() as folder:
            write(
                Path(folder),
                {
                    "mlx_lm.py": "__version__ = '1.0'\n",
                    "test_a.py": "import unittest\n"
                    "class T(unittest.TestCase):\n"
                    "    def test_no(self): raise OSError(f'no {id(self)}')\n"
                    "    def test_yes(self): pass\n",
                    "test_b.py": "import os\nos._exit(3)\n",
                },
            )
            with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
                outcomes = compare_upstream_tests.run_each(
                    sys.executable, Path(folder), ["test_a", "test_b"]
                )
        self.assertEqual(outcomes["test_a.T.test_yes"], "passed")
        self.assertEqual(outcomes["test_a.T.test_no"], "error: OSError: no #")
        self.assertTrue(outcomes["test_b"].startswith("ended: "))
        rows = compare_upstream_tests.compare({"a": "passed"}, {"b": "passed"})
        self.assertEqual(rows, [("a", "passed", "absent"), ("b", "absent", "passed")])


class TestChecks(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.folder = Path(scratch.name)

    def test_report_counts_findings(self):
        same = {"a": "passed", "b": "error: OSError: no #"}
        adapters = [("lora", "1" * 64, "1" * 64)]
        text, findings = check_exported.report(same, same, {"c": "passed"}, adapters)
        self.assertEqual(findings, 0)
        self.assertIn("1 x `error: OSError: no #`", text)
        for worse in (
            (same, same | {"a": "skipped"}, {}, adapters),
            (same, same, {"c": "failed: AssertionError"}, adapters),
            (same, same, {}, [("lora", "1" * 64, "2" * 64)]),
        ):
            self.assertEqual(check_exported.report(*worse)[1], 1)

    def test_a_release_has_one_row(self):
        readme = self.folder / "README.md"
        marks = "<!-- releases -->\n{}<!-- end of releases -->\n"
        readme.write_text("a\n" + marks.format(check_upstream.HEADER) + "z\n")
        with mock.patch.object(check_upstream, "README", readme):
            for version, row in (("2", "| 2 | x |"), ("1", "| 1 |"), ("2", "| 2 |")):
                check_upstream.replace_row(version, row)
        rows = check_upstream.HEADER + "| 1 |\n| 2 |\n"
        self.assertEqual(readme.read_text(), "a\n" + marks.format(rows) + "z\n")
        with self.assertRaisesRegex(ValueError, "needs <!-- other -->"):
            fresh_install.write_table("other", "", readme)

    def test_pin_is_one_line(self):
        text = (ROOT / "pyproject.toml").read_text()
        write(self.folder, {"pyproject.toml": text})
        check_upstream.pin(self.folder, "9.8")
        before, after = text.splitlines(), (self.folder / "pyproject.toml").read_text()
        changed = [i for i, x in enumerate(after.splitlines()) if x != before[i]]
        self.assertEqual(len(changed), 1)

    def test_an_installation_that_fails(self):
        with mock.patch.object(fresh_install.venv, "create"):
            (self.folder / "bin").mkdir()
            python = self.folder / "bin" / "python"
            python.write_text("#!/bin/sh\necho 'error: no such release' >&2; exit 1\n")
            python.chmod(0o755)
            with self.assertRaisesRegex(ValueError, "error: no such release"):
                fresh_install.make_environment(self.folder, "nothing")


if __name__ == "__main__":
    unittest.main()
