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


def missing_hints(function):
    """List the parameters, and "return", that have no type hint."""
    wanted = [p for p in inspect.signature(function).parameters if p != "self"]
    return sorted({*wanted, "return"} - {"cls"} - set(function.__annotations__))


class TestPublicAPI(unittest.TestCase):
    maxDiff = None

    @classmethod
    def setUpClass(cls):
        cls.modules = list(own_modules())
        cls.members = {
            f"{module.__name__}.{name}": value
            for module in cls.modules
            for name, value in public_members(module, module.__name__)
        }

    def test_modules_are_found_by_rule(self):
        names = {module.__name__ for module in self.modules}
        self.assertLessEqual({"mlx_lm.dpo", "mlx_lm.tuner.losses"}, names)
        self.assertFalse({"mlx_lm.lora", "mlx_lm.tuner._upstream_losses"} & names)
        self.assertIn("mlx_lm.tuner.losses.dpo_loss", self.members)
        self.assertNotIn("mlx_lm.tuner.losses.kl_div_loss", self.members)

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

    def test_every_one_has_a_docstring(self):
        bare = [n for n, v in self.members.items() if not (v.__doc__ or "").strip()]
        # A dataclass without a docstring shows its generated signature instead.
        bare += [
            name
            for name, value in self.members.items()
            if re.match(rf"{value.__name__}\(", value.__doc__ or "")
        ]
        self.assertEqual(bare, [])

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

    def test_every_signature_has_type_hints(self):
        bare = {}
        for name, value in self.members.items():
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
