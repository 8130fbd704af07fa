# Copyright © 2026 MLX Contributors

import doctest
import sys
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import export_facts  # noqa: E402
import fold_class  # noqa: E402
import fold_upstream  # noqa: E402
from fold_upstream import fold, point_home  # noqa: E402


class TestFolding(unittest.TestCase):
    def refused(self, message, upstream, ours):
        with self.assertRaisesRegex(ValueError, message):
            fold(upstream, f"from ._upstream_x import y\n{ours}", "x")

    def test_name_of_two_things(self):
        self.refused(
            "q is math:exp here", "from os import q\n", "from math import exp as q\n"
        )
        self.refused("_f is a definition", "def _f(): pass\n", "def _f(): pass\n")

    def test_class_that_is_not_one(self):
        theirs = "class A:\n    def f(self, a):\n        return 1\n"
        alias = "from ._upstream_x import A as _A\n"
        for ours, message in (
            ("class A(_A, B):\n    pass\n", "its one base"),
            ("@d\nclass A(_A):\n    pass\n", "its one base"),
            (
                "class A(_A):\n    def f(self, a):\n        return 1 + super().f(a)\n",
                r"can only end with super\(\)\.f\(a\)",
            ),
        ):
            with self.subTest(ours=ours):
                self.refused(message, theirs, alias + ours)

    def test_main_stays_last(self):
        main = '\n\nif __name__ == "__main__":\n    f()\n'
        text = fold(f"def f():\n    g()\n{main}", "def g():\n    pass\n", "x")
        self.assertLess(text.index("def g"), text.index("if __name__"))

    def test_modules_that_need_the_folded_one_come_late(self):
        ours = "from ._upstream_x import A\nfrom .y import B\nfrom .z import C\n\nb = B, C\n"
        text = fold("import os\n\n\nclass A:\n    pass\n", ours, "x", frozenset("y"))
        order = [text.index(s) for s in ("import C", "class A", "import B", "b = B")]
        self.assertEqual(order, sorted(order))
        for use, needed in (
            ("class B(A):\n    pass\n", True),
            ("def f(a: A):\n    pass\n", True),
            ("def f():\n    return A\n", False),
        ):
            use = "from ._upstream_x import A\n" + use
            self.assertIs(fold_upstream.reads_while_imported(use, "x"), needed)

    def test_its_own_twin(self):
        ours = (
            "from . import _upstream_x\n\n\n"
            "def f(name):\n    return _upstream_x.g(), getattr(_upstream_x, name)\n"
        )
        text = fold("def g():\n    pass\n", ours, "x")
        self.assertTrue(text.endswith("return g(), globals()[name]\n"), text)

    def test_name_in_the_way(self):
        text = "from ._upstream_x import f\n\n\ndef g(x):\n    return f(x)\n"
        with self.assertRaisesRegex(ValueError, "'x' is taken"):
            point_home(text, {"x"})

    def test_examples(self):
        for module in (fold_class, fold_upstream, export_facts):
            self.assertEqual(doctest.testmod(module).failed, 0)


if __name__ == "__main__":
    unittest.main()
