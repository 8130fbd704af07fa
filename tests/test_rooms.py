# Copyright © 2026 MLX Contributors

import ast
import importlib
import pkgutil
import re
import runpy
import subprocess
import sys
import unittest
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")

build = SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


def read_rooms():
    """The table of rooms, lowest first: what each imports, at once and when called."""
    section = README.split("## How the tree works")[1].split("\n## ")[0]
    rooms = {}
    for name, imports in re.findall(r"^\| `([\w/]+)` \|.*\|(.*)\|$", section, re.M):
        at_once, _, later = imports.partition("; when called: ")
        above = set(rooms)
        rooms[name] = tuple(
            above if names == "all above" else set(filter(None, names.split(", ")))
            for names in (at_once.strip(), later.strip())
        )
    return rooms


def room_of(module):
    """The room that a module belongs to, None for upstream's."""
    parts = module.split(".")[1:]
    if parts[:1] == ["preference"]:
        return parts[1] if len(parts) > 1 else None
    if parts[:1] == ["tuner"] and len(parts) > 1:
        return f"tuner/{parts[1]}"
    return parts[0] if parts and parts[0] != "tuner" else None


def own_modules():
    """Yield (name, path) of every module that is ours."""
    for path in build.own_files(ROOT / build.PACKAGE):
        if path.suffix == ".py":
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts).removesuffix(".__init__"), path


def imports(module, path):
    """Yield (imported module, line, whether a function does it) of a file."""
    package = module.split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    tree = ast.parse(path.read_text("utf-8"))
    inner = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef)
        or (isinstance(outer, ast.If) and ast.unparse(outer.test) == "TYPE_CHECKING")
        for node in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        base = ""
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *filter(None, [node.module])]) + "."
        for alias in node.names:
            yield base + alias.name, node.lineno, id(node) in inner


class TestRooms(unittest.TestCase):
    def setUp(self):
        self.rooms = read_rooms()
        self.own = {room_of(name) for name, _ in own_modules()} - {None}

    def test_every_room_has_a_row(self):
        named = {*self.rooms} - {"kernels"}
        self.assertEqual(named, self.own - {"kernels"})

    def test_rooms_import_only_what_the_table_allows(self):
        order = list(self.rooms)
        for room, (at_once, later) in self.rooms.items():
            self.assertLessEqual(at_once | later, set(order), room)
            above = set(order[: order.index(room)])
            self.assertLessEqual(at_once, above, f"{room} imports a room below it")
        arrows = {}
        for module, path in own_modules():
            room = room_of(module)
            if room is None:
                continue
            for name, line, inner in imports(module, path):
                target = room_of(name) if name.startswith("mlx_lm.") else None
                if target in (None, room) or target not in self.own:
                    continue
                at_once, later = self.rooms[room]
                if target not in (at_once | later if inner else at_once):
                    arrows[f"{path.relative_to(ROOT)}:{line}"] = f"{room} -> {target}"
        self.assertEqual(arrows, {})

    def test_nothing_but_the_three_upstream_rooms_reads_a_twin(self):
        for module, path in own_modules():
            if room_of(module) not in (None, "tuner/losses", "tuner/datasets"):
                if room_of(module) != "tuner/trainer":
                    self.assertNotIn("_upstream_", path.read_text("utf-8"), module)


class TestMarkdown(unittest.TestCase):
    """Files and modules that are named in Markdown exist."""

    FILES = (
        "README.md",
        "benchmarks/README.md",
        "mlx_lm/DPO.md",
        "mlx_lm/DPO_REFERENCE.md",
    )
    # Folders of the user's cache, and what a row is folded into on another release.
    ELSEWHERE = {"mlx_lm/references", "mlx_lm/tokens"}

    def missing(self, pattern, exists):
        texts = [(file, (ROOT / file).read_text("utf-8")) for file in self.FILES]
        named = {
            (file, name) for file, text in texts for name in re.findall(pattern, text)
        }
        self.assertGreater(len(named), 10)
        return sorted(pair for pair in named if not exists(pair[1]))

    def test_paths(self):
        def exists(name):
            places = (ROOT / name, ROOT / "mlx_lm" / name)
            return name in self.ELSEWHERE or any(p.exists() for p in places)

        pattern = r"(?<![\w/.-])(?:mlx_lm|tests|benchmarks|examples|\.ci)/[\w./-]*\w"
        self.assertEqual(self.missing(pattern, exists), [])

    def test_scripts(self):
        folders = (".", "tests", "benchmarks")
        known = {path.name for f in folders for path in (ROOT / f).glob("*.py")}
        known |= {path.name for _, path in own_modules()}
        self.assertEqual(
            self.missing(r"(?<![\w/.*])(\w+\.py)\b", known.__contains__), []
        )

    def test_functions_of_rooms(self):
        def exists(name):
            path, _, function = name.partition(".")
            place = "" if path == "dpo" or path.startswith("tuner/") else "preference."
            module = f"mlx_lm.{place}{path.replace('/', '.')}"
            found = getattr(importlib.import_module(module), function, None)
            return found is not None and getattr(found, "__module__", module) == module

        pattern = (
            r"`((?:dpo|step|update|files|ranks|[a-z]+/[a-z_]+)\.(?!py\b)[A-Za-z_]\w+)`"
        )
        self.assertEqual(self.missing(pattern, exists), [])

    def test_dotted_names(self):
        def exists(name):
            try:
                return pkgutil.resolve_name(name)
            except (ImportError, AttributeError):
                return None

        pattern = r"\bmlx_lm(?:\.[A-Za-z_]\w*)+"
        self.assertEqual(self.missing(pattern, exists), [])


class TestSettingsStayAbove(unittest.TestCase):
    """The command's settings go no further than dpo, settings, setup and features."""

    ABOVE: tuple[str, ...] = ("mlx_lm.dpo", "mlx_lm.preference.settings")
    ABOVE += ("mlx_lm.preference.run.setup",)
    # What a feature of the command is made of.
    ABOVE += ("mlx_lm.preference.features", "mlx_lm.preference.run.job")
    ABOVE += ("mlx_lm.preference.run.layouts", "mlx_lm.preference.run.resume")
    ABOVE += ("mlx_lm.preference.run.forecast", "mlx_lm.preference.report.testing")

    def test_no_function_below_takes_them(self):
        taking = []
        for module, path in own_modules():
            # There it is what a function is called with.
            if module.startswith(self.ABOVE) or module.endswith(".feature"):
                continue
            if room_of(module) in ("forward", "memory"):
                continue
            tree = ast.parse(path.read_text("utf-8"))
            features = [
                method
                for node in ast.walk(tree)
                if isinstance(node, ast.ClassDef)
                and "Feature" in map(ast.unparse, node.bases)
                for method in node.body
            ]
            for node in ast.walk(tree):
                if not isinstance(node, ast.FunctionDef) or node in features:
                    continue
                for one in (*node.args.args, *node.args.kwonlyargs):
                    hint = ast.unparse(one.annotation) if one.annotation else ""
                    if one.arg == "args" and "DPOTrainingArgs" not in hint:
                        taking.append(f"{module}.{node.name}({one.arg})")
                    elif "SimpleNamespace" in hint:
                        taking.append(f"{module}.{node.name}({one.arg})")
        self.assertEqual(taking, [])


class TestLight(unittest.TestCase):
    """What everybody imports who trains with mlx_lm.lora or loads an adapter."""

    ROOMS = {
        "errors",
        "setting",
        "plug_ins",
        "features",
        "digest",
        "files",
        "terminal",
        "ranks",
        "device",
        "training",
        "kernels",
        "objective",
        "batch",
    }
    ROOMS |= {"data", "forward", "step", "coupled", "update"}

    def loaded(self, code):
        code += "\nimport sys; print(*sorted(sys.modules))"
        run = [sys.executable, "-c", code]
        done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.split()

    def test_upstreams_rooms_load_no_run(self):
        modules = self.loaded("from mlx_lm.tuner import losses, datasets, trainer")
        rooms = {m.split(".")[2] for m in modules if m.startswith("mlx_lm.preference.")}
        self.assertLessEqual(rooms, self.ROOMS)

    def test_what_tuner_exports_may_be_imported_first(self):
        for module in ("preference.forward.frozen", "preference.training"):
            self.assertIn(f"mlx_lm.{module}", self.loaded(f"import mlx_lm.{module}"))

    def test_imports_change_nothing_of_upstreams(self):
        code = """
import mlx_lm, mlx_lm.utils, mlx_lm.tuner.utils
from mlx_lm.models import gpt2, llama, qwen2, switch_layers, activations
from mlx_lm.tuner import callbacks, lora, dora
import mlx.nn as nn, mlx.core as mx, mlx.optimizers as optim
watched = [gpt2, llama, qwen2, switch_layers, activations, callbacks, lora, dora]
watched += [mlx_lm.utils, mlx_lm.tuner.utils, nn, mx, mx.fast, optim]
watched += [c for m in watched for c in vars(m).values() if isinstance(c, type)]
before = [(o, dict(vars(o))) for o in watched]
tables = [(t, dict(t)) for t in (callbacks.SUPPORT_CALLBACK, mlx_lm.utils.MODEL_REMAPPING)]
import mlx_lm.dpo
changed = [
    f"{o.__name__}.{k}"
    for o, old in before
    for k in {*old, *vars(o)}
    if old.get(k) is not vars(o).get(k) and not k.startswith("__")
]
changed += [str(t) for t, old in tables if t != old]
print("CHANGED", changed)
"""
        out = self.loaded(code)
        self.assertEqual(out[out.index("CHANGED") + 1], "[]")


if __name__ == "__main__":
    unittest.main()
