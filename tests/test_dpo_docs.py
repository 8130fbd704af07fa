# Copyright © 2026 MLX Contributors

import ast
import contextlib
import importlib
import inspect
import io
import json
import math
import os
import re
import shlex
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import mlx.optimizers as optim
import yaml
from tiny import random_pairs, save_rows, save_tiny_model, tiny_model
from tokenizers_for_tests import bos_tokenizer

import mlx_lm
from mlx_lm import lora
from mlx_lm.dpo import resolve_args
from mlx_lm.preference.data import pairs as preference_rows
from mlx_lm.preference.data import rankings as labelled_rows
from mlx_lm.preference.objective.losses import LOSSES
from mlx_lm.preference.objective.objective import DIVERGENCES
from mlx_lm.preference.policy.optimizer import OPTIMIZERS
from mlx_lm.preference.settings.checks import check_args, check_keys
from mlx_lm.preference.settings.parser import build_parser
from mlx_lm.preference.settings.table import CONFIG_DEFAULTS, UNUSED_KEYS
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.datasets import PreferenceDataset
from mlx_lm.tuner.trainer import DPOTrainingArgs, evaluate_dpo, train_dpo

PACKAGE = Path(mlx_lm.__file__).parent
DOC = (PACKAGE / "DPO.md").read_text("utf-8")


def blocks(language, text=DOC):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def section(title):
    """The text below a heading, up to the next one of its level or above."""
    head = re.search(rf"^(#+) {re.escape(title)}\n", DOC, re.M)
    rest = DOC[head.end() :]
    end = re.search(rf"^#{{1,{len(head[1])}}} ", rest, re.M)
    return rest[: end.start()] if end else rest


def table(text):
    """The cells of all table rows, without heads."""
    rows = re.findall(r"^\| (?!name |key |message |column )(.*) \|$", text, re.M)
    return [[c.strip() for c in re.split(r"(?<!\\)\|", row)] for row in rows]


def load_yaml(text):
    return yaml.load(text, lora.yaml_loader)


class Names(TrainingCallback):
    """Collects the names of all metrics."""

    def __init__(self):
        self.train, self.val = set(), set()

    def on_train_loss_report(self, train_info):
        self.train |= set(train_info)

    def on_val_loss_report(self, val_info):
        self.val |= set(val_info)


class TestSettings(unittest.TestCase):
    def setUp(self):
        self.rows = {row[0].strip("`"): row for row in table(section("Settings"))}

    def test_every_key_with_its_default(self):
        self.assertEqual(set(self.rows), set(CONFIG_DEFAULTS))
        for key, row in self.rows.items():
            with self.subTest(key=key):
                default = load_yaml(re.fullmatch("`(.*)`", row[2])[1])
                self.assertEqual(default, CONFIG_DEFAULTS[key])
                self.assertEqual(type(default), type(CONFIG_DEFAULTS[key]))
                self.assertTrue(row[3])
        for key in UNUSED_KEYS:
            self.assertIn(f"`{key}`", section("Settings"))

    def test_every_flag_beside_its_key(self):
        flags = {key: re.findall("`(-.*?)`", row[1]) for key, row in self.rows.items()}
        expected = {}
        for action in build_parser()._actions:
            if action.dest != "help":
                expected.setdefault(action.dest, []).extend(action.option_strings)
        self.assertEqual({k: f for k, f in flags.items() if f}, expected)

    def test_example_file_has_every_key_and_the_defaults(self):
        text = (PACKAGE / "examples" / "dpo_config.yaml").read_text("utf-8")
        config = load_yaml(text)
        self.assertEqual(set(config), set(CONFIG_DEFAULTS) - {"config"})
        changed = {k for k, v in config.items() if v != CONFIG_DEFAULTS[k]}
        self.assertEqual(changed, {"train", "data"})
        # The commented examples are right as well.
        for example in re.findall(r"^# (lr_schedule: \{.*?\})", text, re.M):
            args = resolve_args(["--train", "--data", "d"])
            args.lr_schedule = load_yaml(example)["lr_schedule"]
            check_args(args)

    def test_yaml_blocks_are_accepted(self):
        found = blocks("yaml")
        self.assertGreaterEqual(len(found), 6)
        for text in found:
            with self.subTest(text=text), tempfile.TemporaryDirectory() as folder:
                config = load_yaml(text)
                check_keys(config, CONFIG_DEFAULTS)
                file = Path(folder) / "dpo.yaml"
                file.write_text(text)
                with contextlib.redirect_stdout(io.StringIO()):
                    args = resolve_args(["-c", str(file), "--train", "--data", "d"])
                check_args(args)
                for name, kwargs in args.optimizer_config.items():
                    OPTIMIZERS[name](learning_rate=1e-5, **kwargs)

    def test_commands_have_only_known_flags(self):
        commands = re.findall(r"^mlx_lm\.(\w+) (.*)$", self._shell(), re.M)
        names = {name for name, _ in commands}
        self.assertLessEqual({"dpo", "generate", "fuse", "server"}, names)
        for name, rest in commands:
            with self.subTest(command=name, rest=rest):
                if name == "dpo":
                    build_parser().parse_args(shlex.split(rest))
                source = inspect.getsource(importlib.import_module(f"mlx_lm.{name}"))
                if name != "dpo":
                    for flag in re.findall(r"--[\w-]+", rest):
                        self.assertIn(f'"{flag}"', source)

    def _shell(self):
        text = "".join(blocks("shell")) + "\n".join(re.findall("`(mlx_lm.*?)`", DOC))
        return text.replace("\\\n", " ")


class TestShapes(unittest.TestCase):
    def test_every_example_loads_as_the_shape_it_is_listed_under(self):
        parts = re.split(r"^#### (.*)\n", section("Shapes"), flags=re.M)[1:]
        names = parts[::2]
        for name, text in zip(names, parts[1::2]):
            with self.subTest(shape=name):
                (example,) = blocks("json", text)
                tokenizer = bos_tokenizer()
                dataset = PreferenceDataset([json.loads(example)], tokenizer)
                self.assertEqual(dataset.shape, name)
                is_text = name in ("text", "shared text")
                self.assertEqual(dataset.format, "text" if is_text else "chat")
                prompt, chosen, rejected, _ = dataset[0]
                self.assertGreater(len(prompt), 1)
                self.assertRegex(tokenizer.decode(chosen), "blue|Hello!")
                self.assertNotRegex(tokenizer.decode(rejected), "blue|Hello!")
        listed = re.findall(r"^\|.*\| ([^|]*) \|$", preference_rows.__doc__, re.M)
        known = {re.split(r":| \(", shape)[0] for shape in listed} - {"shape"}
        self.assertEqual(set(names), known)

    def test_rows_that_are_not_one_pair(self):
        title = "Rankings, criteria and labels"
        parts = re.split(r"^#### (.*)\n", section(title), flags=re.M)[1:]
        names = parts[::2]
        for name, text in zip(names, parts[1::2]):
            weights = re.search(r"criteria: (\{.*?\})", text)
            options = {"criteria": load_yaml(weights[1])} if weights else {}
            for example in map(json.loads, blocks("json", text)):
                rows = [example]
                if name == "labelled":
                    # The estimate of the KL divergence needs another prompt.
                    rows = [example, {**example, "prompt": "Grass is"}]
                    options["kind"] = "labels"
                with self.subTest(shape=name, example=example):
                    tokenizer = bos_tokenizer()
                    dataset = PreferenceDataset(rows, tokenizer, **options)
                    self.assertEqual(dataset.shape, name)
                    decoded = [tokenizer.decode(pair[1]) for pair in dataset]
                    self.assertRegex(decoded[0], "blue|Hello!")
                    self.assertTrue(dataset.values)
        listed = re.findall(r"^\|.*\| ([^|]*) \|$", labelled_rows.__doc__, re.M)
        self.assertEqual(set(names), set(listed) - {"shape"})
        (example,) = blocks("json", section("Weights and margins"))
        dataset = PreferenceDataset(
            [json.loads(example)],
            bos_tokenizer(),
            weight_feature="certainty",
            margin_feature="gap",
        )
        found = {name: values.tolist() for name, values in dataset.values.items()}
        self.assertEqual(found["margins"], [1.5])
        self.assertAlmostEqual(found["weights"][0], 0.8, places=6)

    def test_features_can_be_set_for_one_dataset(self):
        (text,) = [b for b in blocks("yaml") if "hf_dataset" in b]
        datasets = load_yaml(text)["hf_dataset"]
        known = set(re.findall(r"`(\w+)`", section("Hugging Face data")))
        known |= {"path", "config", "valid_split"}
        for dataset in datasets:
            self.assertLessEqual(set(dataset), known)


class TestMetrics(unittest.TestCase):
    def test_every_name_that_a_run_reports(self):
        text = section("Metrics")
        both, train, val = (
            {row[0].strip("`") for row in table(part)}
            for part in re.split(r"^Only in .* lines:$", text, flags=re.M)
        )
        names = Names()
        with tempfile.TemporaryDirectory() as folder:
            args = DPOTrainingArgs(batch_size=2, iters=2, steps_per_report=1)
            args.adapter_file = f"{folder}/adapters.safetensors"
            with contextlib.redirect_stdout(io.StringIO()):
                train_dpo(
                    tiny_model("lora"),
                    optim.Adam(1e-3),
                    random_pairs(4),
                    random_pairs(2),
                    args,
                    training_callback=names,
                )
        # Training remembers what the reference gave, a test compares everything.
        exact = {"kl"}
        self.assertEqual(names.train, (both - exact) | train)
        expected = {f"val_{name}" for name in both - exact} | val | {"iteration"}
        self.assertEqual(names.val, expected)
        test = evaluate_dpo(tiny_model(), tiny_model(seed=1), random_pairs(2))
        self.assertEqual(set(test) - {"pairs"}, both - {"kl_estimate"})


class TestText(unittest.TestCase):
    def test_python_blocks_run(self):
        found = blocks("python")
        self.assertEqual(len(found), 3)
        here = os.getcwd()
        with tempfile.TemporaryDirectory() as folder:
            save_tiny_model(Path(folder) / "path/to/model")
            save_rows(Path(folder) / "path/to/preference/data")
            try:
                os.chdir(folder)
                for code in found:
                    with self.subTest(code=code[:60]):
                        out = io.StringIO()
                        with contextlib.redirect_stdout(out), mock.patch("sys.stderr"):
                            exec(compile(code, "DPO.md", "exec"), {})
                        if "adapters" in code:
                            mlx_lm.load("path/to/model", adapter_path="adapters")
                self.assertAlmostEqual(float(out.getvalue()), math.log(2), places=6)
            finally:
                os.chdir(here)

    def test_links_lead_somewhere(self):
        def anchor(title):
            return re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")

        anchors = {anchor(t) for t in re.findall(r"^#+ (.*)$", DOC, re.M)}
        links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", DOC)
        self.assertGreater(len(links), 20)
        # An installed package has no neighbours, the tree of these tests has.
        places = (PACKAGE, Path(__file__).resolve().parents[1] / PACKAGE.name)
        for file, target in links:
            with self.subTest(file=file, target=target):
                if file:
                    self.assertTrue(any((p / file).exists() for p in places))
                else:
                    self.assertIn(target, anchors)

    def test_headings_are_in_the_contents(self):
        wanted = re.findall(r"^###? (.*)$", DOC, re.M)
        listed = re.findall(r"^ *- \[(.*)\]", section("Contents"), re.M)
        self.assertEqual(listed, [title for title in wanted if title != "Contents"])

    def test_messages_are_those_of_the_code(self):
        texts = []
        for path in [PACKAGE / "dpo.py", *(PACKAGE / "tuner").glob("*.py")]:
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
        rows = table(section("Troubleshooting"))
        self.assertGreater(len(rows), 15)
        for message, remedy in rows:
            with self.subTest(message=message):
                self.assertTrue(remedy)
                # Values and the names of settings are filled in at run time.
                value = r"\.\.\.|'\w+'|[\d.]*\d|^(?:\w*_\w* is|iters) "
                parts = re.split(value, message.strip("`"))
                parts = [p.strip() for p in parts if len(p.split()) > 1]
                self.assertTrue(parts)
                for part in parts:
                    self.assertTrue(any(part in text for text in texts), part)


class TestObjectives(unittest.TestCase):
    """The manual's table of losses is the registry."""

    def test_losses(self):
        rows = {
            row[0].strip("`"): row
            for row in table(section("Objectives"))
            if row[0].strip("`") in LOSSES
        }
        self.assertEqual(list(rows), list(LOSSES))
        for name, spec in LOSSES.items():
            _, formula, paper, needs = rows[name]
            with self.subTest(loss=name):
                self.assertEqual(formula.strip("`").replace("\\|", "|"), spec.formula)
                self.assertIn(f"/{spec.paper})", paper)
                self.assertEqual("no reference" in needs, not spec.reference)
                self.assertEqual("couples" in needs, spec.couples)
                self.assertEqual("tokens" in needs, spec.per_token)
                self.assertEqual("may be smoothed" in needs, spec.smoothing == "may")
                self.assertEqual("above 0" in needs, spec.smoothing == "must")
                if spec.data != "pairs":
                    self.assertIn(f"data: {spec.data}", needs)
                for option in spec.options:
                    self.assertIn(f"`{option}`", needs)

    def test_divergences(self):
        text = section("Objectives")
        for name in DIVERGENCES:
            self.assertIn(f"`{name}`", text)


if __name__ == "__main__":
    unittest.main()
