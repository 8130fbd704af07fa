# Copyright © 2026 MLX Contributors

import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from tiny import save_rows, save_tiny_model

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import series  # noqa: E402
from export_patch import build  # noqa: E402

PACKAGE = ROOT / build.PACKAGE
KERNELS = "mlx_lm/kernels/preference_logps"
IMPORT_ALL = """
import importlib, sys
for tree in sys.argv[1:]:
    for name in [n for n in sys.modules if n.split(".")[0] == "mlx_lm"]:
        del sys.modules[name]
    sys.path.insert(0, tree)
    for line in open(f"{tree}/modules"):
        module = importlib.import_module(line.strip())
        assert module.__file__.startswith(tree), module.__file__
    if "mlx_lm.preference.features" in sys.modules:
        sys.modules["mlx_lm.preference.features"].features()
"""

# Settings of layers behind the command.
LATER = (
    *("save_best", "criteria", "gamma", "resume", "pack", "sync_steps", "test"),
    *("token_cache", "reference_bits", "resume_adapter_file", "share_prompt"),
    *("debug_gradients", "train_head"),
)
REFUSED = """
import json, sys
from types import SimpleNamespace
from mlx_lm import dpo
found = []
for name in sys.argv[1:]:
    with open("given.yaml", "w") as file:
        json.dump({name: 1}, file)
    try:
        dpo.resolve_args(["--config", "given.yaml"])
    except dpo.InputError as e:
        try:
            dpo.run(SimpleNamespace(train=True, data="data", **{name: 1}))
        except dpo.InputError as again:
            if f"Unknown key {name!r}" in str(e) and str(e) == str(again):
                found.append(name)
print("found", *found)
"""


def own_files():
    paths = build.own_files(PACKAGE)
    return {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in paths}


def dotted(name):
    return name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


class TestLayers(unittest.TestCase):
    """The table of layers, and what a tree of the first of them imports."""

    @classmethod
    def setUpClass(cls):
        cls.files = own_files()
        cls.layers = {name: series.layer_of(name, cls.files) for name in cls.files}

    def test_the_table_names_what_there_is(self):
        for name in series.FILES:
            with self.subTest(name):
                self.assertTrue((ROOT / name).exists())
        for name in series.TESTS:
            self.assertTrue((ROOT / name).exists(), name)
        guide = (PACKAGE / "DPO.md").read_text("utf-8")
        for title in (title for layer in series.LAYERS for title in layer.sections):
            self.assertIn(f"\n## {title}\n", guide)
        self.assertEqual({*self.layers.values()}, {*range(1, series.LAST + 1)})

    def test_kernels_have_all_their_texts(self):
        found = {n: x for n, x in self.layers.items() if n.startswith(KERNELS)}
        self.assertEqual({*found.values()}, {self.layers[f"{KERNELS}.py"]})
        self.assertGreater(len(found), 4)

    def test_no_layer_imports_a_higher_one(self):
        modules = {dotted(n): n for n in self.files if n.endswith(".py")}
        higher = []
        for name in modules.values():
            text = self.files[name].decode()
            for found in series.imported(text, name):
                parts = found.split(".")
                # What is taken from a module, or the module.
                tried = (".".join(parts[:n]) for n in (len(parts), len(parts) - 1))
                other = next((modules[x] for x in tried if x in modules), name)
                if self.layers[other] > self.layers[name]:
                    higher.append(f"{name} imports {other}")
        self.assertEqual(higher, [])

    def test_each_prefix_can_be_imported_without_the_rest(self):
        with tempfile.TemporaryDirectory() as folder:
            trees = []
            for number in range(1, series.LAST + 1):
                tree = Path(folder).resolve() / str(number)
                self.lay(tree, number)
                trees.append(str(tree))
            command = [sys.executable, "-c", IMPORT_ALL, *trees]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])

    def test_the_command_alone_trains_with_the_numbers_of_the_whole(self):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder).resolve()
            model, data = folder / "model", folder / "data"
            save_tiny_model(model)
            save_rows(data)
            self.lay(folder / "alone", 3)
            off = ["--no-share-prompt", "--no-reference-cache", "--no-token-cache"]
            losses = {}
            # With OpenBLAS one of them may end in another last bit.
            env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
            for tree, more in ((folder / "alone", []), (ROOT, off)):
                out = folder / f"{tree.name} adapters"
                flags = [*("--model", model, "--data", data, "--train"), *more]
                flags += [*("--adapter-path", out, "--iters", 4, "--batch-size", 2)]
                flags += [*("--num-layers", 1, "--steps-per-report", 1)]
                command = [sys.executable, "-m", "mlx_lm.dpo", *map(str, flags)]
                given = {"PYTHONPATH": str(tree), "XDG_CACHE_HOME": str(folder / "x")}
                done = subprocess.run(
                    command,
                    cwd=folder,
                    env=env | given,
                    capture_output=True,
                    text=True,
                )
                self.assertEqual(done.returncode, 0, done.stderr[-2000:])
                text = (out / "metrics.jsonl").read_text("utf-8")
                lines = map(json.loads, text.splitlines())
                losses[tree.name] = [x["loss"] for x in lines if "loss" in x]
            alone, whole = losses.values()
            self.assertEqual((len(alone), alone), (4, whole))
            self.refuses(folder, env | {"PYTHONPATH": str(folder / "alone")})

    def refuses(self, folder, env):
        """What no layer of a prefix reads can't be set there."""
        done = subprocess.run(
            [sys.executable, "-c", REFUSED, *LATER],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
        )
        found = done.stdout.rpartition("found ")[2].split()
        self.assertEqual(found, [*LATER], done.stderr[-2000:])

    def lay(self, tree, number):
        """A tree of upstream's files and those of the first layers."""
        there = series.prefix(self.files, number)
        for path in PACKAGE.rglob("*"):
            name = path.relative_to(ROOT).as_posix()
            twin = path.with_name(series.TWIN + path.name)
            if not path.is_file() or "__pycache__" in name:
                continue
            if name in there:
                content = there[name]
            elif name in self.files and twin.is_file():
                content = twin.read_bytes()
            elif name in self.files:
                continue
            else:
                content = path.read_bytes()
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes(content)
        modules = [n for n in there if n.endswith(".py") and "/examples/" not in n]
        (tree / "modules").write_text("\n".join(map(dotted, sorted(modules))))


class TestCuts(unittest.TestCase):
    """What is left out inside of a file."""

    def test_rows_of_a_table_of_modules(self):
        text = b'A = 1\nPLUG_INS = (\n    "one.first",\n    "two",\n)\nload(PLUG_INS)\n'
        present = {"mlx_lm/preference/two.py"}
        found = series.cut("mlx_lm/preference/features.py", text, present, 3)
        self.assertEqual(found, b'A = 1\nPLUG_INS = ("two",)\nload(PLUG_INS)\n')
        found = series.cut("mlx_lm/preference/features.py", text, set(), 3)
        self.assertEqual(found, b"A = 1\nPLUG_INS = ()\nload(PLUG_INS)\n")

    def test_sections_and_the_contents(self):
        text = (
            "# Guide\n\n[Install](#install) · [Look at\nit](#look-at-it) · "
            "[Memory](#memory)\n\n## Install\na\n## Look at it\nb\n### More\nc\n"
            "## Memory\nd\n"
        )
        found = series.cut("mlx_lm/DPO.md", text.encode(), set(), 3).decode()
        contents = "[Install](#install)"
        self.assertEqual(found, f"# Guide\n\n{contents}\n\n## Install\na\n")
        shown = next(
            n for n, x in enumerate(series.LAYERS, 1) if "Look at it" in x.sections
        )
        found = series.cut("mlx_lm/DPO.md", text.encode(), set(), shown).decode()
        self.assertIn("[Look at it](#look-at-it)\n\n", found)
        self.assertIn("### More\nc\n", found)
        self.assertNotIn("Memory", found)

    def test_tests_are_of_the_layer_of_what_they_need(self):
        files = own_files() | {
            "tests/test_a.py": b"from mlx_lm.tuner import losses\nimport help_a\n",
            "tests/help_a.py": b"from mlx_lm.preference.forward.head import x\n",
            "tests/fixtures/rows_a.jsonl": b"",
            "tests/test_b.py": b"from mlx_lm.tuner.losses import dpo_loss\n",
            "tests/test_c.py": b'patch("mlx_lm.preference.memory.tape.x", "rows_a")\n',
        }
        found = {n: series.layer_of(n, files) for n in files if n.startswith("tests/")}
        last = series.layer_of("mlx_lm/preference/memory/tape.py", files)
        self.assertEqual([*found.values()], [3, 3, last, 1, last])

    def test_public_names(self):
        files = {
            "mlx_lm/tuner/losses.py": b"def a(): ...\ndef _b(): ...\nclass C: ...\n",
            "mlx_lm/preference/x.py": b"def d(): ...\n",
        }
        self.assertEqual(series.public_names(files), ["a", "C"])


if __name__ == "__main__":
    unittest.main()
