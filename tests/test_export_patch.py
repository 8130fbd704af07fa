# Copyright © 2026 MLX Contributors

import importlib.util
import io
import subprocess
import sys
import tempfile
import unittest
from contextlib import redirect_stderr
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import export_facts  # noqa: E402
import export_patch  # noqa: E402

build = export_patch.build
TOOLS = all(importlib.util.find_spec(t) for t in ("black", "isort", "ruff"))

UPSTREAM = {
    "PKG-INFO": "Name: mlx-lm\nVersion: 1.0\n",
    "README.md": "* [Tuning](https://x/mlx_lm/LORA.md)\n  of models.\n* Other\n",
    "pyproject.toml": """\
[project.optional-dependencies]
test = ["Pillow"]

[project.scripts]
"mlx_lm.lora" = "mlx_lm.lora:main"

[tool.setuptools.packages.find]
namespaces = false

[tool.ruff.lint]
select = ["F"]
per-file-ignores = { "**/__init__.py" = ["F401"] }
""",
    "mlx_lm/README.md": "see the [LoRA documentation](LORA.md).\n",
    "mlx_lm/__init__.py": "# Copyright © 2024 A\n",
    "mlx_lm/cli.py": '# Copyright © 2024 A\n\nCOMMANDS = (\n    "lora",\n)\n',
    "mlx_lm/loss.py": """\
# Copyright © 2024 A

import os
from math import exp


def area(x):
    # Upstream's own reason.
    return exp(x)


class Model:
    def __init__(self, n):
        self.n = n

    def clean(self, weights):
        return {k: v for k, v in weights.items() if k != os.sep}


def last():
    return area(0)
""",
}
OURS = {
    "pyproject.toml": '[build-system]\nrequires = ["mlx-lm==1.0"]\n',
    "mlx_lm/DPO.md": "The guide.\n",
    "mlx_lm/dpo.py": """\
# Copyright © 2026 B

from ._upstream_loss import area


def run():
    return area(1)
""",
    "mlx_lm/loss.py": """\
# Copyright © 2026 B

\"\"\"Losses.\"\"\"

from math import exp, log

from ._upstream_loss import Model as _Model, area as _area, last, os
from .dpo import run


def half(x):
    return log(exp(x)) / 2


class Model(_Model):
    \"\"\"A model.\"\"\"

    def clean(self, weights: dict) -> dict:
        weights = {k.upper(): v for k, v in weights.items()}
        return super().clean(weights)


def area(x):
    # Ours has another.
    return half(x)
""",
    "tests/test_ours.py": """\
# Copyright © 2026 B

from mlx_lm import _upstream_loss

PATCHED = (_upstream_loss, "mlx_lm._upstream_loss.area")
""",
    "tests/test_tree.py": "import setup_reader  # reads setup.py\n",
    "tests/test_more.py": "import test_tree\n",
    "benchmarks/README.md": "| `speed.py` |\n| `test_tree.py` |\n\n## Numbers\n1\n",
}
FOLDED = """\
# Copyright © 2024 A

\"\"\"Losses.\"\"\"

import os
from math import exp, log

from .dpo import run as run


def area(x):
    # Ours has another.
    return half(x)


class Model:
    \"\"\"A model.\"\"\"

    def __init__(self, n):
        self.n = n

    def clean(self, weights: dict) -> dict:
        weights = {k.upper(): v for k, v in weights.items()}
        return {k: v for k, v in weights.items() if k != os.sep}


def last():
    return area(0)


def half(x):
    return log(exp(x)) / 2
"""


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


class Export(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.folder = Path(scratch.name)
        self.root, self.source = self.folder / "root", self.folder / "mlx_lm-1.0"
        write(self.source, UPSTREAM)
        write(self.root, OURS)
        release = {
            path.relative_to(self.source / "mlx_lm").as_posix(): path
            for path in (self.source / "mlx_lm").rglob("*.*")
        }
        build.compose(self.root, release, "1.0+dpo.1")

    def patch(self, clean=False):
        self.count = getattr(self, "count", 0) + 1
        scratch = self.folder / f"scratch{self.count}"
        patch = export_patch.make_patch(self.root, self.source, scratch, clean)
        self.exported = scratch / "exported"
        return patch

    def read(self, name):
        return (self.exported / name).read_text("utf-8")


class TestMadeUpUpstream(Export):
    def test_applies_to_the_release(self):
        patch = self.patch()
        copy = export_patch.unpack(self.source, self.folder / "copy")
        subprocess.run(["git", "apply", "-"], cwd=copy, input=patch, check=True)
        files = {p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file()}
        new = {"mlx_lm/DPO.md", "mlx_lm/dpo.py", "benchmarks/README.md"}
        self.assertEqual(files, set(UPSTREAM) | new | {"tests/test_ours.py"})
        for name in files:
            self.assertEqual((copy / name).read_text("utf-8"), self.read(name))
        self.assertNotIn(b"_upstream_", patch)
        script = "from mlx_lm import dpo, loss; print(dpo.run(), loss.last())"
        result = subprocess.run(
            [sys.executable, "-c", f"import mlx_lm.loss; {script}"],
            cwd=copy,
            capture_output=True,
            text=True,
        )
        self.assertEqual(result.stdout, "0.5 0.0\n", result.stderr)

    def test_pictures_arrive_as_they_are(self):
        picture = bytes(range(256)) * 4
        (self.root / "mlx_lm/curve.png").write_bytes(picture)
        patch = self.patch()
        copy = export_patch.unpack(self.source, self.folder / "copy")
        subprocess.run(["git", "apply", "-"], cwd=copy, input=patch, check=True)
        self.assertEqual((copy / "mlx_lm/curve.png").read_bytes(), picture)

    @unittest.skipUnless(TOOLS, "needs black, isort and ruff")
    def test_folded_and_formatted(self):
        self.patch(clean=True)
        self.assertEqual(self.read("mlx_lm/loss.py"), FOLDED)
        self.assertIn("from . import loss\n", self.read("mlx_lm/dpo.py"))
        self.assertIn("return loss.area(1)", self.read("mlx_lm/dpo.py"))

    def test_shared_files(self):
        self.patch()
        self.assertIn(
            '"lora",\n    "dpo",\n    "dpo_collect",\n', self.read("mlx_lm/cli.py")
        )
        project = self.read("pyproject.toml")
        for name in ("mlx_lm.dpo", "mlx_lm.dpo_collect"):
            self.assertIn(f'"{name}" = "{name}:main"\n', project)
        self.assertIn('test = ["hypothesis", "Pillow", "selenium"]\n', project)
        self.assertIn('    "*.md",\n', project)
        self.assertEqual(
            self.read("README.md").splitlines()[2],
            "* [Preference training with DPO](https://x/mlx_lm/DPO.md)",
        )
        self.assertIn("(DPO.md)", self.read("mlx_lm/README.md"))
        self.assertEqual(
            self.read("benchmarks/README.md"), "| `speed.py` |\n\n## Numbers\n1\n"
        )
        self.assertIn('"mlx_lm.loss.area"', self.read("tests/test_ours.py"))

    def test_tools_of_this_tree_stay(self):
        self.assertEqual(export_patch.left_out(self.root), {"test_tree", "test_more"})
        for name in ("export_patch", "fold_upstream", "check_upstream", "test_build"):
            self.assertIn(name, export_patch.left_out(ROOT))
        self.assertNotIn("dpo_benchmark", export_patch.left_out(ROOT))

    def refused(self, message, name=None, text=None, folder=None):
        if name:
            write(folder or self.source, {name: text})
        screen = io.StringIO()
        with mock.patch.object(export_patch, "ROOT", self.root):
            with mock.patch.object(sys, "argv", ["export_patch", str(self.source)]):
                with redirect_stderr(screen), self.assertRaises(SystemExit) as end:
                    export_patch.main()
        self.assertEqual(end.exception.code, 2)
        self.assertIn(message, screen.getvalue())
        self.assertEqual(screen.getvalue().count("\n"), 1)

    def test_refuses_another_version(self):
        self.refused("has moved to 1.1, expected 1.0", "PKG-INFO", "Version: 1.1\n")

    def test_refuses_a_changed_file(self):
        text = UPSTREAM["mlx_lm/loss.py"] + "\n"
        self.refused("mlx_lm/loss.py: upstream has moved", "mlx_lm/loss.py", text)

    def test_refuses_a_changed_command_table(self):
        text = UPSTREAM["mlx_lm/cli.py"] + "\n"
        self.refused("mlx_lm/cli.py: upstream has moved", "mlx_lm/cli.py", text)

    def test_refuses_what_upstream_has_by_now(self):
        self.refused("mlx_lm/DPO.md: upstream has a file", "mlx_lm/DPO.md", "")

    def test_refuses_another_readme(self):
        self.refused("README.md: needs one item", "README.md", "")

    def test_refuses_another_project_file(self):
        self.refused("pyproject.toml: needs", "pyproject.toml", "")

    def test_refuses_a_tree_that_was_not_built(self):
        (self.root / "mlx_lm" / "_upstream_loss.py").unlink()
        self.refused("mlx_lm/loss.py: not built yet")

    def test_refuses_what_is_not_there(self):
        self.source = self.folder / "nowhere"
        self.refused("no such file or folder")

    @unittest.skipUnless(TOOLS, "needs black, isort and ruff")
    def test_refuses_what_ruff_finds(self):
        text = OURS["mlx_lm/dpo.py"].replace("\n\n\n", "\nimport os\n\n\n", 1)
        self.refused("ruff: mlx_lm/dpo.py", "mlx_lm/dpo.py", text, self.root)

    def test_branch_in_a_clone(self):
        patch = self.patch()
        repo = self.source
        (repo / "PKG-INFO").unlink()
        for command in (
            ["init", "--quiet"],
            ["config", "user.email", "a@example.com"],
            ["config", "user.name", "A"],
            ["add", "--all"],
            ["commit", "--quiet", "--message", "release"],
            ["tag", "v1.0"],
        ):
            export_patch.git(repo, *command)
        self.assertEqual(export_patch.release_of(repo), "1.0")
        export_patch.make_branch(repo, patch)
        log = export_patch.git(repo, "log", "--format=%s", export_patch.BRANCH)
        self.assertEqual(log.decode().splitlines(), [export_patch.MESSAGE, "release"])
        self.assertEqual(export_patch.git(repo, "status", "--porcelain"), b"")
        (repo / "README.md").write_text("changed")
        with self.assertRaisesRegex(ValueError, "has changes of its own"):
            export_patch.make_branch(repo, patch)

    def test_facts(self):
        patch = self.patch().decode()
        rows = {name: rest for name, *rest in export_facts.changes(patch)}
        self.assertEqual(rows["mlx_lm/DPO.md"], [True, 1, 0])
        self.assertEqual(rows["mlx_lm/cli.py"], [False, 2, 0])
        text = export_facts.facts(self.root, patch)
        self.assertIn("9 files, 4 of them new", text)
        self.assertIn("0 tests in 1 files", text)
        self.assertIn("not measured", text)
        (self.root / "coverage.json").write_text('{"totals": {"percent_covered": 93}}')
        self.assertIn("93.0 %", export_facts.facts(self.root, patch))


class TestThisTree(unittest.TestCase):
    """The real patch, on what the build laid around this tree."""

    @classmethod
    def setUpClass(cls):
        if not build.read_manifest(ROOT / "mlx_lm"):
            raise unittest.SkipTest("needs the built tree")
        scratch = tempfile.TemporaryDirectory()
        cls.addClassCleanup(scratch.cleanup)
        cls.source, cls.target = Path(scratch.name, "a"), Path(scratch.name, "b")
        package = ROOT / build.PACKAGE
        for name in build.read_manifest(package):
            text = (package / name).read_bytes()
            name = name.replace("_upstream_", "")
            if name == "cli.py":
                for command in build.COMMANDS:
                    text = text.replace(f'        "{command}",\n'.encode(), b"")
            path = cls.source / build.PACKAGE / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)
        (cls.source / build.PACKAGE / "LICENSE").unlink()
        write(cls.source, {n: UPSTREAM[n] for n in ("pyproject.toml", "README.md")})
        write(cls.source, {"mlx_lm/README.md": UPSTREAM["mlx_lm/README.md"]})
        version = build.pinned_version(ROOT / "pyproject.toml")
        write(cls.source, {"PKG-INFO": f"Version: {version}\n"})
        export_patch.unpack(cls.source, Path(scratch.name))
        Path(scratch.name, "upstream").rename(cls.target)
        cls.names = export_patch.export(ROOT, cls.source, cls.target)

    def test_imports_and_trains_nothing_of_this_tree(self):
        script = (
            "from mlx_lm.tuner.losses import dpo_loss, kl_div_loss\n"
            "import mlx_lm.dpo, mlx_lm.lora\n"
            "from mlx_lm.tuner import train, train_dpo\n"
            "print(mlx_lm.dpo.__file__, dpo_loss.__module__, kl_div_loss.__module__)"
        )
        result = subprocess.run(
            [sys.executable, "-c", script],
            cwd=self.target,
            capture_output=True,
            text=True,
        )
        path, *modules = result.stdout.split() or [result.stderr]
        self.assertEqual(Path(path), self.target.resolve() / "mlx_lm" / "dpo.py")
        self.assertEqual(modules, ["mlx_lm.tuner.losses"] * 2)

    def test_no_twin_is_left(self):
        twins = {p.stem for p in (ROOT / "mlx_lm").rglob("_upstream_*.py")}
        self.assertTrue(twins)
        for name in self.names:
            text = (self.target / name).read_bytes().decode(errors="ignore")
            for twin in twins:
                self.assertNotIn(twin, text, name)

    @unittest.skipUnless(TOOLS, "needs black, isort and ruff")
    def test_what_was_written_is_clean(self):
        changed = [
            name
            for name in self.names
            if name.endswith(".py")
            and (self.target / name).read_bytes() != (ROOT / name).read_bytes()
        ]
        self.assertIn("mlx_lm/tuner/trainer.py", changed)
        export_patch.tidy(self.target, changed)


if __name__ == "__main__":
    unittest.main()
