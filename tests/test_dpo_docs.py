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
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import mlx.optimizers as optim
import yaml
from tiny import random_pairs, save_rows, save_tiny_model, tiny_model
from tokenizers_for_tests import bos_tokenizer

import mlx_lm
from mlx_lm import dpo_collect, lora
from mlx_lm.dpo import resolve_args
from mlx_lm.preference.data import cache as token_cache
from mlx_lm.preference.data.shapes import SHAPES
from mlx_lm.preference.measure.metrics import OVER
from mlx_lm.preference.objective.losses import LOSSES
from mlx_lm.preference.objective.pairs import DIVERGENCES
from mlx_lm.preference.policy.optimizer import OPTIMIZERS
from mlx_lm.preference.reference import cache as reference_cache
from mlx_lm.preference.report.shown import METRICS
from mlx_lm.preference.settings.checks import check_args, check_keys
from mlx_lm.preference.settings.datasets import DATASET_KEYS
from mlx_lm.preference.settings.parser import build_parser
from mlx_lm.preference.settings.table import (
    CONFIG_DEFAULTS,
    UNUSED_KEYS,
    names,
)
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.datasets import PreferenceDataset
from mlx_lm.tuner.trainer import DPOTrainingArgs, evaluate_dpo, train_dpo

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import write_reference  # noqa: E402
from write_reference import outside_code  # noqa: E402

PACKAGE = Path(mlx_lm.__file__).parent
NAMES = ("DPO.md", "DPO_REFERENCE.md", "DPO_COLLECT.md")
DOCS = {name: (PACKAGE / name).read_text("utf-8") for name in NAMES}
GUIDE, REFERENCE, COLLECT = DOCS.values()


def blocks(language, text=GUIDE + REFERENCE):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def section(title):
    """The reference below a heading, up to the next one of its level or above."""
    head = re.search(rf"^(#+) {re.escape(title)}\n", REFERENCE, re.M)
    rest = REFERENCE[head.end() :]
    end = re.search(rf"^#{{1,{len(head[1])}}} ", rest, re.M)
    return rest[: end.start()] if end else rest


def anchor(title):
    return re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")


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


class TestWritten(unittest.TestCase):
    """What benchmarks/write_reference.py writes is up to date."""

    HOW = "run: python benchmarks/write_reference.py"

    def test_reference(self):
        self.assertTrue(write_reference.reference(REFERENCE) == REFERENCE, self.HOW)
        for row in table(section("Metrics")):
            self.assertTrue(row[2], f"{row[0]} needs a formula")
        shown = " ".join(metric.name for metric in METRICS).split()
        for name in {*shown, *OVER, "perplexity/reference"}:
            name = re.sub("/(chosen_|equal_|rejected_).*", "/GROUP", name)
            self.assertIn(f"`{name}`", REFERENCE)

    def test_example(self):
        text = (PACKAGE / "examples" / "dpo_config.yaml").read_text("utf-8")
        self.assertTrue(write_reference.example(text) == text, self.HOW)

    def test_changes_are_noticed(self):
        text = REFERENCE.replace("Pairs a batch, two", "Pairs a batch, three")
        text = text.replace("| `loss` | nats |", "| `loss` | bits |")
        renewed = write_reference.reference(text)
        self.assertIn("| `loss` | bits |", renewed)
        self.assertEqual(
            renewed.replace("bits", "nats"), REFERENCE.replace("bits", "nats")
        )
        row = "| `logps/rejected` | nats | mean of `p(l)` |\n"
        self.assertIn(
            "| `logps/rejected` |  |  |\n",
            write_reference.reference(REFERENCE.replace(row, "")),
        )
        with self.assertRaisesRegex(ValueError, "no marks of losses"):
            write_reference.reference(REFERENCE.replace("<!-- end of losses", ""))


class TestSettings(unittest.TestCase):
    def test_every_setting_has_a_row_with_flag_and_default(self):
        rows = {
            re.search(r"`(\w+)`", row[0])[1]: row for row in table(section("Settings"))
        }
        self.assertEqual(set(rows), set(CONFIG_DEFAULTS))
        flags = {}
        for action in build_parser()._actions:
            flags.setdefault(action.dest, []).extend(action.option_strings)
        for key, (_, flag, default, *_) in rows.items():
            with self.subTest(key=key):
                default = load_yaml(re.fullmatch("`(.*)`", default)[1])
                self.assertEqual(default, CONFIG_DEFAULTS[key])
                self.assertEqual(type(default), type(CONFIG_DEFAULTS[key]))
                self.assertEqual(re.findall("`(-.*?)`", flag), flags.get(key, []))
        for key in UNUSED_KEYS:
            self.assertIn(f"`{key}`", section("Settings"))

    def test_example_file_has_every_key_and_the_defaults(self):
        text = (PACKAGE / "examples" / "dpo_config.yaml").read_text("utf-8")
        config = load_yaml(text)
        self.assertEqual(set(config), set(CONFIG_DEFAULTS) - {"config"})
        changed = {k for k, v in config.items() if v != CONFIG_DEFAULTS[k]}
        self.assertEqual(changed, {"train", "data"})
        # The examples in comments are right as well.
        for shown in write_reference.SHOWN.values():
            for part in re.split(r"^(?=\w)", shown, flags=re.M)[1:]:
                args = resolve_args(["--train", "--data", "d"])
                given = load_yaml(part)
                if "adamw" in given:
                    given = {"optimizer_config": given}
                vars(args).update(given)
                check_keys(given, CONFIG_DEFAULTS)
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
        known = {"dpo", "dpo_collect", "generate", "fuse", "server"}
        self.assertLessEqual(known, names)
        for name, rest in commands:
            with self.subTest(command=name, rest=rest):
                if name in ("dpo", "dpo_collect"):
                    parser = build_parser if name == "dpo" else dpo_collect.build_parser
                    parser().parse_args(shlex.split(rest))
                    continue
                source = inspect.getsource(importlib.import_module(f"mlx_lm.{name}"))
                for flag in re.findall(r"--[\w-]+", rest):
                    self.assertIn(f'"{flag}"', source)

    def _shell(self):
        text = "".join(blocks("shell", "".join(DOCS.values())))
        text += "\n".join(re.findall("`(mlx_lm.*?)`", GUIDE + REFERENCE))
        return text.replace("\\\n", " ")


class TestShapes(unittest.TestCase):
    def examples(self, title):
        """The name, text and rows of every example below a heading."""
        parts = re.split(r"^#### (.*)\n", section(title), flags=re.M)[1:]
        for name, text in zip(parts[::2], parts[1::2]):
            for block in blocks("json", text):
                yield name, text, [json.loads(line) for line in block.splitlines()]

    def test_every_example_loads_as_the_shape_it_is_listed_under(self):
        names = set()
        for name, _, rows in self.examples("Shapes"):
            names.add(name)
            with self.subTest(shape=name):
                tokenizer = bos_tokenizer()
                dataset = PreferenceDataset(rows, tokenizer)
                self.assertEqual(dataset.shape, name)
                is_text = name in ("text", "shared text")
                self.assertEqual(dataset.format, "text" if is_text else "chat")
                prompt, chosen, rejected, _ = dataset[0]
                self.assertGreater(len(prompt), 1)
                self.assertRegex(tokenizer.decode(chosen), "blue|Hello!")
                self.assertNotRegex(tokenizer.decode(rejected), "blue|Hello!")
        self.assertEqual(names, {s.name for s in SHAPES if not s.several})

    def test_rows_that_are_not_one_pair(self):
        names = set()
        for name, text, rows in self.examples("Rankings, criteria and labels"):
            names.add(name)
            weights = re.search(r"^`?criteria: (\{.*?\})", text, re.M)
            options = {"criteria": load_yaml(weights[1])} if weights else {}
            if name == "labelled":
                # The estimate of the KL divergence needs another prompt.
                other = {"prompt": "Grass is", "completion": " green.", "label": True}
                rows, options = [*rows, other], {"kind": "labels"}
            with self.subTest(shape=name, rows=rows):
                tokenizer = bos_tokenizer()
                dataset = PreferenceDataset(rows, tokenizer, max_bad_rows=0, **options)
                self.assertEqual(dataset.shape, name)
                chosen = [tokenizer.decode(pair[1]) for pair in dataset]
                self.assertRegex(chosen[0], "blue|Hello!")
        self.assertEqual(names, {s.name for s in SHAPES if s.several})

    def test_weights_and_margins(self):
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
        for dataset in datasets:
            own = set(dataset) - set(names(per_dataset=True))
            self.assertLessEqual(own, set(DATASET_KEYS))


class TestMetrics(unittest.TestCase):
    def test_every_name_that_a_run_reports(self):
        text = section("Metrics")
        both, train, val = (
            {row[0].strip("`") for row in table(part)}
            for part in re.split(r"^Only in .* lines:$", text, flags=re.M)
        )
        names = Names()
        with tempfile.TemporaryDirectory() as folder:
            args = DPOTrainingArgs(
                batch_size=2,
                iters=2,
                steps_per_report=1,
                adapter_file=f"{folder}/adapters.safetensors",
            )
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
        self.assertEqual(len(found), 4)
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
                            exec(compile(code, "a block", "exec"), {})
                        if "adapters" in code:
                            mlx_lm.load("path/to/model", adapter_path="adapters")
                self.assertAlmostEqual(float(out.getvalue()), math.log(2), places=6)
            finally:
                os.chdir(here)

    def test_links_lead_somewhere(self):
        anchors = {
            name: {
                anchor(t) for t in re.findall(r"^#+ (.*)$", outside_code(text), re.M)
            }
            for name, text in DOCS.items()
        }
        # An installed package has no neighbours, the tree of these tests has.
        places = (PACKAGE, Path(__file__).resolve().parents[1] / PACKAGE.name)
        for name, text in DOCS.items():
            links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text)
            self.assertGreater(len(links), 10)
            for file, target in links:
                with self.subTest(document=name, file=file, target=target):
                    if file:
                        self.assertTrue(any((p / file).exists() for p in places))
                    if target and file in ("", *DOCS):
                        self.assertIn(target, anchors[file or name])

    def test_headings_have_their_own_names_and_are_listed(self):
        for name, text in DOCS.items():
            titles = re.findall(r"^##+ (.*)$", outside_code(text), re.M)
            self.assertEqual(len(set(map(anchor, titles))), len(titles), name)
        for text in (GUIDE, COLLECT):
            listed = re.findall(r"\[([^\]]*)\]\(#", text[: text.index("\n## ")])
            titles = re.findall(r"^## (.*)$", outside_code(text), re.M)
            self.assertEqual([" ".join(title.split()) for title in listed], titles)

    def test_the_guide_is_short_and_nothing_is_said_twice(self):
        self.assertLessEqual(len(GUIDE.splitlines()), 500)
        said = {}
        for name, text in DOCS.items():
            text = re.sub(r"^(\||#|<!).*$", "", outside_code(text), flags=re.M)
            for sentence in re.split(r"(?<=[.:?])\s+|\n\n|^- ", text, flags=re.M):
                words = re.findall(r"\w+", sentence.lower())
                if len(words) > 5:
                    said.setdefault(" ".join(words), []).append(name)
        self.assertEqual({s: n for s, n in said.items() if len(n) > 1}, {})

    def test_caches_are_as_large_as_said(self):
        for most in (reference_cache.MAX_FOLDER_BYTES, token_cache.MAX_BYTES):
            text = f"Beyond {most / 2**30:g} GiB the files unused for longest go"
            self.assertIn(text, " ".join(REFERENCE.split()))

    def test_messages_are_those_of_the_code(self):
        texts = []
        for path in PACKAGE.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
        rows = table(section("Error messages"))
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
    def test_what_a_loss_needs_is_told(self):
        rows = {row[0].strip("`"): row for row in table(section("Objectives"))}
        self.assertLessEqual(set(LOSSES), set(rows))
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
