# Copyright © 2026 MLX Contributors

import ast
import doctest
import importlib
import inspect
import re
import runpy
import unittest
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]

build = SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


def own_modules():
    """Import every module of the package that is not upstream's."""
    for path in build.own_files(ROOT / build.PACKAGE):
        if path.suffix == ".py":
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            yield importlib.import_module(".".join(parts))


def public_members(owner, module):
    """
    Yield (qualified name, object) of public functions, classes and methods.

    A method that overrides another is described where that one is.
    """
    inherited = {
        name for base in getattr(owner, "__mro__", ())[1:] for name in vars(base)
    }
    for name, value in vars(owner).items():
        value = getattr(value, "__func__", value)
        if isinstance(value, property):
            value = value.fget
        value = inspect.unwrap(value) if callable(value) else value
        if name.startswith("_") or name in inherited:
            continue
        if getattr(value, "__module__", "") != module:
            continue
        if inspect.isclass(value):
            yield value.__qualname__, value
            yield from public_members(value, module)
        elif inspect.isfunction(value):
            yield value.__qualname__, value


def functions_and_classes(tree, owner=""):
    """Yield (qualified name, node) of a module's functions, classes and methods."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield owner + node.name, node
            yield from functions_and_classes(node, f"{owner}{node.name}.")


def missing_hints(function):
    """List the parameters, and "return", that have no type hint."""
    wanted = [p for p in inspect.signature(function).parameters if p != "self"]
    return sorted({*wanted, "return"} - {"cls"} - set(function.__annotations__))


# The modules whose names people import, and what else the guide and they name.
ROOMS = ["mlx_lm.dpo", "mlx_lm.tuner.losses", "mlx_lm.tuner.datasets"]
ROOMS += ["mlx_lm.tuner.trainer"]
CLASSES = (
    "mlx_lm.preference.forward.frozen.FrozenStart",
    "mlx_lm.preference.objective.objective.Objective",
    "mlx_lm.preference.data.options.RowOptions",
    "mlx_lm.preference.training.DPOTrainingArgs",
    "mlx_lm.preference.policy.peft.save_peft",
)
# Public by their spelling alone: the command, the loop and the tests share them.
INNER = ["mlx_lm.dpo.train_model", "mlx_lm.tuner.trainer.training_step"]


def is_public(name):
    """Whether a name has a full docstring, not one line."""
    if name in INNER:
        return False
    return name.startswith(CLASSES) or any(name.startswith(f"{r}.") for r in ROOMS)


class TestPublicAPI(unittest.TestCase):
    maxDiff = None

    @classmethod
    def setUpClass(cls):
        cls.modules = list(own_modules())
        cls.all = {
            f"{module.__name__}.{name}": value
            for module in cls.modules
            for name, value in public_members(module, module.__name__)
        }
        cls.members = {n: v for n, v in cls.all.items() if is_public(n)}

    def test_modules_are_found_by_rule(self):
        names = {module.__name__ for module in self.modules}
        self.assertLessEqual({"mlx_lm.dpo", "mlx_lm.tuner.losses"}, names)
        self.assertFalse({"mlx_lm.lora", "mlx_lm.tuner._upstream_losses"} & names)
        self.assertIn("mlx_lm.tuner.losses.dpo_loss", self.members)
        self.assertNotIn("mlx_lm.tuner.losses.kl_div_loss", self.members)
        for name in (*CLASSES, *INNER):
            self.assertIn(name, self.all)

    def test_every_one_is_named_by_a_test(self):
        used = set()
        for path in (ROOT / "tests").glob("test_*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute):
                    used.add(node.attr)
                elif isinstance(node, ast.Name):
                    used.add(node.id)
                elif isinstance(node, ast.alias):
                    used.add(node.name)
        untested = [n for n in self.members if n.rpartition(".")[2] not in used]
        self.assertEqual(untested, [])

    def test_every_one_has_a_full_docstring(self):
        bare = {}
        for name, value in self.members.items():
            text = value.__doc__ or ""
            lacks = [] if text.strip() else ["docstring"]
            if inspect.isfunction(value):
                parameters = {*inspect.signature(value).parameters} - {"self"}
                lacks += [p for p in parameters if not re.search(rf"\b{p}\b", text)]
                returns = value.__annotations__.get("return", "None")
                # A property is a word for what it returns.
                if parameters and str(returns) != "None" and "Returns:" not in text:
                    lacks.append("Returns")
            # A dataclass without a docstring shows its generated signature instead.
            elif re.match(rf"{value.__name__}\(", text):
                lacks.append("docstring")
            bare |= {name: lacks} if lacks else {}
        self.assertEqual(bare, {})

    def test_every_function_and_class_has_an_example(self):
        def has_example(name, value):
            if ">>>" in (value.__doc__ or ""):
                return True
            # A method may be shown by its class.
            owner = self.members.get(name.rpartition(".")[0])
            call = rf">>>.*\.{value.__name__}\b|\.\.\..*\.{value.__name__}\b"
            return owner is not None and re.search(call, owner.__doc__ or "")

        bare = [n for n, v in self.members.items() if not has_example(n, v)]
        self.assertEqual(bare, [])

    def test_everything_else_is_said_in_a_line(self):
        long = []
        for path in build.own_files(ROOT / build.PACKAGE):
            if path.suffix != ".py":
                continue
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for name, node in functions_and_classes(ast.parse(path.read_text())):
                text = ast.get_docstring(node, clean=False) or ""
                private = name.rpartition(".")[2].startswith("_")
                if private or not is_public(f"{module}.{name}"):
                    # Two where one would be too wide.
                    if text.count("\n") > 1:
                        long.append(f"{module}.{name}")
        self.assertEqual(long, [])

    def test_every_signature_has_type_hints(self):
        bare = {}
        for name, value in self.all.items():
            if inspect.isfunction(value):
                bare[name] = missing_hints(value)
            elif inspect.isfunction(vars(value).get("__init__")):
                missing = missing_hints(value.__init__)
                bare[f"{name}.__init__"] = [m for m in missing if m != "return"]
        self.assertEqual({k: v for k, v in bare.items() if v}, {})

    def test_examples_run(self):
        for module in self.modules:
            with self.subTest(module=module.__name__):
                options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
                result = doctest.testmod(module, optionflags=options)
                self.assertEqual(result.failed, 0)


if __name__ == "__main__":
    unittest.main()
