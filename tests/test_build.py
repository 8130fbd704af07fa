# Copyright © 2026 MLX Contributors

import ast
import importlib
import io
import runpy
import subprocess
import sys
import tempfile
import unittest
from contextlib import redirect_stdout
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]

build = SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))

CLI = 'subcommands = (\n    "lora",\n    "share",\n)\n'
UPSTREAM = {
    "__init__.py": "from ._version import __version__\n",
    "_version.py": "__version__ = '1.0'\n",
    "cli.py": CLI,
    "py.typed": "",
    "tuner/__init__.py": "",
    "tuner/losses.py": "import math\n\ndef kl(): pass\n\n_private = 1\n",
}
LOSSES = "from ._upstream_losses import _private, kl\n"


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


class FakeDistribution(metadata.Distribution):
    """An installed distribution made of texts."""

    def __init__(self, folder, version="1.0", fields="", scripts=""):
        self.folder = folder
        names = [f"mlx_lm/{name}" for name in UPSTREAM]
        names += ["mlx_lm/__pycache__/cli.pyc", "../../bin/mlx_lm"]
        names += [f"mlx_lm-{version}.dist-info/{n}" for n in ("RECORD", "LICENSE")]
        self.texts = {
            "METADATA": f"Name: mlx-lm\nVersion: {version}\n{fields}\n",
            "RECORD": "".join(f"{name},,\n" for name in names),
            "entry_points.txt": scripts,
        }

    def read_text(self, filename):
        return self.texts.get(filename)

    def locate_file(self, path):
        return self.folder / path


class TestCompose(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.site = Path(scratch.name) / "site"
        self.root = Path(scratch.name) / "root"
        self.package = self.root / "mlx_lm"
        write(self.site / "mlx_lm", UPSTREAM)
        write(self.site, {"mlx_lm-1.0.dist-info/LICENSE": "terms"})
        write(self.package, {"dpo.py": "", "tuner/losses.py": LOSSES})

    def compose(self, **changes):
        """Compose with upstream files changed or, if None, taken away."""
        write(self.site / "mlx_lm", {k: v for k, v in changes.items() if v})
        release = build.upstream_files(FakeDistribution(self.site))
        for name in changes:
            path = self.site / "mlx_lm" / name
            release[name] = path
            if changes[name] is None:
                del release[name]
        return build.compose(self.root, release, "1.0+dpo.1")

    def read(self, name):
        return (self.package / name).read_text()

    def files(self):
        paths = self.package.rglob("*")
        return {p.relative_to(self.package).as_posix() for p in paths if p.is_file()}

    def test_lays_upstream_around_ours(self):
        composed = self.compose()
        self.assertEqual(
            self.files(), composed | {"dpo.py", "tuner/losses.py"} | {".gitignore"}
        )
        self.assertEqual(self.read("tuner/losses.py"), LOSSES)
        self.assertEqual(
            self.read("tuner/_upstream_losses.py"), UPSTREAM["tuner/losses.py"]
        )
        self.assertEqual(self.read("_upstream_LICENSE"), "terms")
        self.assertEqual(self.read("_version.py"), "__version__ = '1.0+dpo.1'\n")
        self.assertEqual(
            ast.literal_eval(self.read("cli.py").partition("= ")[2]),
            ("lora", "dpo", "dpo_collect", "share"),
        )

    def test_second_build_changes_nothing(self):
        first = self.compose()
        times = {name: (self.package / name).stat().st_mtime_ns for name in first}
        self.assertEqual(self.compose(), first)
        for name, time in times.items():
            self.assertEqual((self.package / name).stat().st_mtime_ns, time, name)

    def test_lost_manifest_doubles_nothing(self):
        first = self.compose()
        before = self.files()
        (self.package / ".gitignore").unlink()
        self.assertEqual(self.compose(), first)
        self.assertEqual(self.files(), before)

    def test_own_files(self):
        self.compose()
        write(self.package, {"__pycache__/dpo.pyc": "", "examples/pairs.jsonl": "{}"})
        ours = {
            p.relative_to(self.package).as_posix()
            for p in build.own_files(self.package)
        }
        self.assertEqual(ours, {"dpo.py", "tuner/losses.py", "examples/pairs.jsonl"})

    def test_git_ignores_exactly_what_was_laid(self):
        composed = self.compose()
        self.assertEqual(build.read_manifest(self.package), composed)
        self.assertIn("/.gitignore\n", self.read(".gitignore"))

    def test_stale_files_go(self):
        write(self.site / "mlx_lm", {"old/gone.py": ""})
        self.compose(**{"old/gone.py": "x = 1\n"})
        self.assertIn("old/gone.py", self.files())
        write(self.root, {"build/lib/mlx_lm/deleted.py": ""})
        self.compose()
        self.assertFalse((self.package / "old").exists())
        self.assertFalse((self.root / "build" / "lib").exists())

    def test_twin_goes_when_the_extension_goes(self):
        self.compose()
        (self.package / "tuner/losses.py").unlink()
        self.compose()
        self.assertEqual(self.read("tuner/losses.py"), UPSTREAM["tuner/losses.py"])
        self.assertNotIn("tuner/_upstream_losses.py", self.files())

    def test_copied_file_may_become_an_extension(self):
        (self.package / "tuner/losses.py").unlink()
        self.compose()
        write(self.package, {"tuner/losses.py": LOSSES})
        self.compose()
        self.assertEqual(self.read("tuner/losses.py"), LOSSES)
        self.assertNotIn("tuner/losses.py", build.read_manifest(self.package))

    def refused(self, *words, **changes):
        before = self.files()
        with self.assertRaises(SystemExit) as caught:
            self.compose(**changes)
        message = str(caught.exception)
        self.assertNotIn("\n", message)
        for word in words:
            self.assertIn(word, message)
        self.assertEqual(self.files(), before, "wrote before it refused")

    def test_refuses_a_file_that_hides_upstreams(self):
        write(self.package, {"tuner/losses.py": "mine = 1\n"})
        self.refused("mlx_lm/tuner/losses.py", "_upstream_losses")

    def test_refuses_an_extension_of_nothing(self):
        self.refused("tuner/losses.py", **{"tuner/losses.py": None})

    def test_refuses_a_name_that_upstream_dropped(self):
        self.refused("'_private'", **{"tuner/losses.py": "def kl(): pass\n"})

    def test_refuses_a_broken_extension(self):
        write(self.package, {"tuner/losses.py": LOSSES + "def\n"})
        self.refused("losses.py:2")

    def test_refuses_a_command_table_without_its_line(self):
        for text in (CLI.replace("lora", "sft"), CLI + '"lora",\n'):
            with self.subTest(text=text):
                self.refused("mlx_lm/cli.py", "lora", **{"cli.py": text})


class TestRelease(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.site = Path(scratch.name)
        write(self.site / "mlx_lm", UPSTREAM)
        write(self.site, {"mlx_lm-1.0.dist-info/LICENSE": ""})

    def test_finds_the_pinned_release_only(self):
        plain = FakeDistribution(self.site)
        patched = FakeDistribution(self.site, "1.0+dpo.1")
        self.assertIs(build.find_release("1.0", [patched, plain]), plain)
        for installed in ([patched], [], [FakeDistribution(self.site, "1.0.0")]):
            with self.subTest(n=len(installed)):
                with self.assertRaisesRegex(SystemExit, "needs plain mlx-lm 1.0"):
                    build.find_release("1.0", installed)

    def test_refuses_a_release_with_a_lost_file(self):
        (self.site / "mlx_lm" / "cli.py").unlink()
        with self.assertRaisesRegex(SystemExit, "cli.py is missing"):
            build.find_release("1.0", [FakeDistribution(self.site)])

    def test_upstream_files(self):
        files = build.upstream_files(FakeDistribution(self.site))
        self.assertEqual(set(files), set(UPSTREAM) | {"_upstream_LICENSE"})

    def test_reads_the_pin(self):
        path = self.site / "pyproject.toml"
        for pins, ok in (([], False), (["mlx-lm==1.0"], True), (["mlx-lm>=1"], False)):
            path.write_text(f"[build-system]\nrequires = {['setuptools', *pins]}\n")
            with self.subTest(pins=pins):
                if ok:
                    self.assertEqual(build.pinned_version(path), "1.0")
                else:
                    with self.assertRaisesRegex(SystemExit, "mlx-lm==VERSION"):
                        build.pinned_version(path)


class TestMetadata(unittest.TestCase):
    def test_splits_mixed_markers(self):
        base, extras = build.split_requirements(
            [
                'mlx>=1; platform_system == "Darwin"',
                "numpy",
                'tqdm; extra == "train"',
                'tomli>=2; python_version < "3.12" and extra == "train"',
                'a[b]; extra == "x" and sys_platform == "linux"',
                'c; (sys_platform == "linux" or python_version < "3.12") '
                'and extra == "x"',
            ]
        )
        self.assertEqual(base, ['mlx>=1; platform_system == "Darwin"', "numpy"])
        self.assertEqual(
            extras["train"], ["tqdm", 'tomli>=2 ; python_version < "3.12"']
        )
        self.assertEqual(extras["x"][0], 'a[b] ; sys_platform == "linux"')
        self.assertIn("or python_version", extras["x"][1])

    def test_takes_upstreams_metadata(self):
        fields = (
            "Summary: Models\nLicense-Expression: MIT\nRequires-Python: >=3.11\n"
            "Classifier: A\nClassifier: B\nProject-URL: Issues, https://x.org/a,b\n"
            "Provides-Extra: cpu\nProvides-Extra: bare\nProvides-Extra: test\n"
            "Requires-Dist: numpy\n"
            'Requires-Dist: mlx[cpu]; extra == "cpu"\n'
        )
        scripts = "[console_scripts]\nmlx_lm = mlx_lm.cli:main\n[other]\na = b:c\n"
        got = build.describe(FakeDistribution(Path(), "1.0", fields, scripts))
        self.assertEqual(got["version"], f"1.0+dpo.{build.PATCH}")
        self.assertEqual(got["description"], "Models")
        self.assertEqual(got["license_expression"], "MIT")
        self.assertEqual(got["python_requires"], ">=3.11")
        self.assertEqual(got["classifiers"], ["A", "B"])
        self.assertEqual(got["project_urls"], {"Issues": "https://x.org/a,b"})
        self.assertEqual(got["install_requires"], ["numpy"])
        extras = {"cpu": ["mlx[cpu]"], "bare": [], "report": ["matplotlib"]}
        extras["test"] = [
            "hypothesis",
            "selenium",
            "pytest>=9",
            "pytest-xdist",
            "nvidia-cuda-nvrtc; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "matplotlib",
        ]
        self.assertEqual(got["extras_require"], extras)
        self.assertEqual(
            got["entry_points"],
            {
                "console_scripts": [
                    "mlx_lm = mlx_lm.cli:main",
                    "mlx_lm.dpo = mlx_lm.dpo:main",
                    "mlx_lm.dpo_collect = mlx_lm.dpo_collect:main",
                ],
                "other": ["a = b:c"],
            },
        )

    def test_package_data(self):
        with tempfile.TemporaryDirectory() as folder:
            package = Path(folder) / "mlx_lm"
            names = ("__init__.py", "DPO.md", "examples/run.py", "examples/a/b.jsonl")
            write(package, dict.fromkeys(names, ""))
            write(package, {".gitignore": "", "examples/__pycache__/run.pyc": ""})
            self.assertEqual(
                build.package_data(package, ["mlx_lm"]),
                ["DPO.md", "examples/a/b.jsonl", "examples/run.py"],
            )


class TestInstalled(unittest.TestCase):
    """What the build made of the real release."""

    @classmethod
    def setUpClass(cls):
        cls.package = Path(importlib.import_module("mlx_lm").__file__).parent
        cls.version = build.pinned_version(ROOT / "pyproject.toml")
        cls.version += f"+dpo.{build.PATCH}"

    def test_every_name_of_an_extended_module_stays(self):
        twins = sorted(self.package.rglob(f"{build.TWIN}*.py"))
        self.assertIn("_upstream_losses.py", [path.name for path in twins])
        for path in twins:
            parts = path.relative_to(self.package.parent).with_suffix("").parts
            twin = importlib.import_module(".".join(parts))
            name = parts[-1].removeprefix(build.TWIN)
            rest = () if name == "__init__" else (name,)
            ours = importlib.import_module(".".join(parts[:-1] + rest))
            with self.subTest(module=ours.__name__):
                self.assertEqual(set(dir(twin)) - set(dir(ours)), set())

    def test_command_line(self):
        cli = importlib.import_module("mlx_lm.cli")
        for flag, expected in (
            ("--version", self.version),
            ("--help", "'lora', 'dpo', 'dpo_collect'"),
        ):
            out = io.StringIO()
            with patch.object(sys, "argv", ["mlx_lm", flag]), redirect_stdout(out):
                cli.main()
            self.assertIn(expected, out.getvalue())

    def test_python_m_mlx_lm(self):
        command = [sys.executable, "-m", "mlx_lm", "--version"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        self.assertEqual(result.stdout.strip(), self.version)

    def test_scripts(self):
        dist = metadata.distribution("mlx-lm")
        scripts = {e.name: e for e in dist.entry_points.select(group="console_scripts")}
        self.assertEqual(dist.version, self.version)
        self.assertLessEqual({"mlx_lm", "mlx_lm.lora"}, set(scripts))
        for command in build.COMMANDS:
            self.assertTrue(callable(scripts[f"mlx_lm.{command}"].load()))


if __name__ == "__main__":
    unittest.main()
