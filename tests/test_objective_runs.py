# Copyright © 2026 MLX Contributors

"""Every loss and modifier through the real command, as sigmoid goes through it."""

import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map
from resuming import copy_at, result
from test_ranks import APART, HAS_RING, LAUNCHER, free_port
from tiny import ROWS, random_pairs, save_rows, save_tiny_model, tiny_model, train

from mlx_lm import dpo
from mlx_lm.preference import step, update
from mlx_lm.preference.batch.collate import collate_pairs, count_tokens
from mlx_lm.preference.forward.frozen import FrozenStart
from mlx_lm.preference.memory.predict import MemoryEstimate
from mlx_lm.preference.objective.losses import LOSSES
from mlx_lm.preference.objective.objective import Objective, objective_of
from mlx_lm.preference.reference.cache import ReferenceCache
from mlx_lm.preference.reference.remembered import RememberedReference
from mlx_lm.preference.run import forecast
from mlx_lm.preference.step import reference_pass, scoring_step
from mlx_lm.tuner.trainer import dpo_step

MODIFIERS: dict[str, dict[str, Any]] = {
    "cdpo": {"label_smoothing": 0.1},
    "divergence": {"f_divergence": "alpha", "f_alpha": 0.3},
    "ld_alpha": {"ld_alpha": 0.5},
    "use_weighting": {"use_weighting": True},
    "reference_free": {"reference_free": True, "beta": 0.02},
    "sync_reference": {
        **{"sync_reference": True, "sync_steps": 2, "iters": 7, "save_every": 5}
    },
    "margin_feature": {"margin_feature": "gap"},
    "weight_feature": {"weight_feature": "sure"},
    "criteria": {"criteria": {"kind": 0.7, "short": 0.2}},
    "list": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [1, 0.5, 2]},
    "rpo": {"loss_type": ["sigmoid", "sft"]},
    # Rankings with a loss of pairs.
    "all pairs": {"loss_type": "hinge", "rows": "rankings"},
}
CASES: dict[str, dict[str, Any]] = {name: {"loss_type": name} for name in LOSSES}
CASES |= MODIFIERS
CASES["exo_pair"] |= {"label_smoothing": 0.1}
# So steep that rounding shows.
CASES["discopop"] |= {"discopop_tau": 0.5}
CASES["dpop"] |= {"dpop_lambda": 5.0}
RESUMED = (
    *("sigmoid", "kto", "plackett_luce", "aot", "sync_reference", "rpo", "simpo"),
    *("use_weighting", "weight_feature", "ld_alpha"),
)
RANKED = (
    *("aot", "aot_unpaired", "sft", "orpo", "cpo", "kto", "plackett_luce"),
    *("weight_feature", "sync_reference"),
)


def of_words(start, words):
    """Pairs with numbers of their own, labelled answers, rankings or criteria."""
    pairs, labels, rankings, criteria = [], [], [], []
    for i, word in enumerate(words, start):
        content = f"Say {word}{' now' * (i % 3)}."
        prompt = [{"role": "user", "content": content}]
        right, wrong, worst = word, f"no {word}, ever", f"{'oh ' * (i % 4)}what"
        pair = {"prompt": prompt, "chosen": right, "rejected": wrong}
        pairs.append({**pair, "gap": 0.1 * (i % 5 - 1), "sure": 0.05 * (1 + i % 7)})
        label = {"prompt": prompt, "completion": right if i % 3 else wrong}
        # Most are desirable, so that kto's baseline rises above 0.
        labels.append({**label, "label": i % 3 > 0})
        ranking = [right, wrong, worst, f"{word}?"][: 2 + i % 3]
        rankings.append({"prompt": prompt, "ranking": ranking})
        kinds = {"kind": {"chosen": right, "rejected": wrong}}
        if i % 2:
            kinds["short"] = {"chosen": right, "rejected": worst}
        criteria.append({"prompt": prompt, "criteria": kinds})
    return {
        "pairs": pairs,
        "labels": labels,
        "rankings": rankings,
        "criteria": criteria,
    }


class Runs:
    """The command with what all runs have in common."""

    def __init__(self, root):
        self.root = Path(root)
        self.model = self.root / "model"

    def make(self):
        save_tiny_model(self.model, num_hidden_layers=2)
        words = [row["chosen"][0]["content"] for row in ROWS]
        # Batches of 4 leave some behind: of one, a rank has nothing but filling.
        for name, count in (("train", 10), ("valid", 5), ("test", 3)):
            for kind, rows in of_words(count, words[:count]).items():
                # Of the rankings' pairs there would be batches of two shapes.
                rows = rows[: {"rankings": 5, "labels": 9}.get(kind, 10)]
                save_rows(self.root / kind, rows, (name,))
        return self

    def settings(self, name, folder, **more):
        settings = dict(CASES[name])
        kind = (
            "criteria"
            if "criteria" in settings
            else objective_of(SimpleNamespace(**settings)).data
        )
        return {
            **{"model": str(self.model), "train": True, "adapter_path": str(folder)},
            **{"data": str(self.root / settings.pop("rows", kind)), "num_layers": 2},
            **{"max_seq_length": 64, "iters": 5, "batch_size": 4, "beta": 0.3},
            **{"optimizer": "sgd", "learning_rate": 0.01, "steps_per_report": 2},
            **{"steps_per_eval": 5, "save_every": 3, "val_batches": -1},
            **{"grad_accumulation_steps": 2, "reference_cache": False},
            **{"token_cache": False, "keep_checkpoints": 99},
            **settings,
            **more,
        }

    def run(self, name, folder, **more):
        """Returns how often the reference was run."""
        out = io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(out),
            mock.patch.object(step, "running", wraps=step.running) as running,
        ):
            dpo.run(SimpleNamespace(**self.settings(name, folder, **more)))
        return running.call_count


def lines_of(folder):
    return list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))


class RunCase(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.root = Path(folder.name)
        cls.runs = Runs(cls.root).make()

    def assert_alike(self, folder, expected):
        """Metrics and weights within 1e-5."""
        lines, right = lines_of(folder), lines_of(expected)
        self.assertEqual(len(lines), len(right))
        for line, other in zip(lines, right):
            self.assertEqual(line.keys(), other.keys())
            for key in other.keys() - {*APART, "padding"}:
                scale = max(1.0, abs(other[key]))
                self.assertLess(abs(line[key] - other[key]) / scale, 1e-5, key)
        weights, right = (
            mx.load(str(f / "adapters.safetensors")) for f in (folder, expected)
        )
        self.assertEqual(weights.keys(), right.keys())
        for key, x in right.items():
            self.assertLess(mx.abs(weights[key] - x).max().item(), 1e-5, key)


# One rank, run after run.
RANKS = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_objective_runs import RANKED, Runs

runs = Runs(sys.argv[2])
for name in RANKED:
    runs.run(name, Path(sys.argv[2]) / f"{name} on 2")
"""


class TestCommand(RunCase):
    folders: dict[str, tuple] = {}

    def shared(self, name):
        """The folder of the run that others are compared with, and its calls."""
        if name not in self.folders:
            folder = self.root / f"{name} shared"
            self.folders[name] = folder, self.runs.run(name, folder)
        return self.folders[name]

    def go_through(self, name):
        (folder, calls), plain = self.shared(name), self.root / f"{name} plain"
        # What it needs was found out by the other one.
        estimate = mock.Mock(return_value=MemoryEstimate(0, 0, 0, 0, 0))
        with mock.patch.object(forecast, "check_memory", estimate):
            self.runs.run(name, plain, share_prompt=False, test=True)
        self.assert_alike(plain, folder)
        objective = objective_of(SimpleNamespace(**CASES[name]))
        self.assertEqual(calls > 0, objective.needs_reference)
        lines = lines_of(folder)
        for line in lines:
            for key, value in line.items():
                self.assertTrue(math.isfinite(value), (key, value))
            seen = {"kl_estimate", "val_kl_estimate"} & line.keys()
            self.assertEqual(bool(seen), objective.needs_reference)
            self.assertTrue(0 <= line.get("padding", 0) < 1, line)
        self.assertEqual(lines[-1].get("skipped_steps", 0), 0)
        self.assertGreater(max(line.get("grad_norm", 0) for line in lines), 1e-3)
        metrics = json.loads((plain / "test_metrics.json").read_text())
        for key in ("loss", "kl", "rewards/accuracies", "perplexity/reference"):
            self.assertTrue(math.isfinite(metrics[key]), key)
        self.assertGreater(metrics["kl"], 0)
        if name in RESUMED:
            self.resume(name, folder)

    def resume(self, name, folder):
        expected = result(folder)
        # A gradient of half an update is in it.
        step = CASES[name].get("save_every", 3)
        broken = copy_at(folder, self.root / f"{name} resumed", step)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            dpo.run(SimpleNamespace(resume=str(broken)))
        self.assertIn(f"Going on after step {step} of", out.getvalue())
        self.assertEqual(result(broken), expected)
        self.assertTrue(any("accumulator" in key for key in expected["state"]))

    @unittest.skipUnless(HAS_RING, "mlx.launch or its ring backend is not there")
    def test_ranks_equal_one(self):
        script = self.root / "script.py"
        script.write_text(RANKS)
        ring = ["-n", "2", "--backend", "ring", "--starting-port", str(free_port())]
        words = [sys.executable, LAUNCHER, *ring, sys.executable, script]
        ended = subprocess.run(
            list(map(str, [*words, Path(__file__).parent, self.root])),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            text=True,
            timeout=120,
        )
        for name in RANKED:
            with self.subTest(name):
                folder = self.root / f"{name} on 2"
                self.assertTrue((folder / "metrics.jsonl").exists(), ended.stdout)
                self.assert_alike(folder, self.shared(name)[0])


def _add_tests():
    for name in CASES:
        test = lambda self, name=name: self.go_through(name)
        setattr(TestCommand, f"test_{name.replace(' ', '_')}", test)


_add_tests()


class TestRememberedNumbers(RunCase):
    def files(self, folder):
        return {p.name: p.read_bytes() for p in folder.glob("*.sqlite")}

    def assert_not_mixed_up(self, name, cache, **more):
        """With what others left in the cache the run is what it is without."""
        alone, beside = self.root / f"{name} alone", self.root / f"{name} beside"
        self.runs.run(name, alone, **more)
        self.runs.run(name, beside, reference_cache=str(cache), **more)
        self.assert_alike(beside, alone)

    def test_ld_alpha(self):
        cache = self.root / "lengths"
        self.runs.run("sigmoid", self.root / "fill", reference_cache=str(cache))
        before = self.files(cache)
        self.assertEqual(len(before), 1)
        self.assert_not_mixed_up("ld_alpha", cache)
        after = self.files(cache)
        self.assertEqual(len(after), 2)
        self.assertEqual({k: after[k] for k in before}, before)
        self.assert_not_mixed_up("ld_alpha", cache, ld_alpha=0.25)
        self.assertEqual(len(self.files(cache)), 3)

    def test_mismatched_answers(self):
        cache, other = self.root / "mismatched", self.root / "other labels"
        self.runs.run("kto", self.root / "first", reference_cache=str(cache))
        # The same prompts and answers but for one: its neighbour has another partner.
        shutil.copytree(self.root / "labels", other)
        rows = list(map(json.loads, (other / "train.jsonl").read_text().splitlines()))
        # A likelier one, so that a mistaken baseline is above 0.
        rows[2]["completion"] = "x"
        save_rows(other, rows, ("train",))
        (file,) = cache.iterdir()
        known = len(ReferenceCache(cache, file.stem))
        self.assert_not_mixed_up("kto", cache, data=str(other))
        self.assertEqual(list(cache.iterdir()), [file])
        grown = len(ReferenceCache(cache, file.stem))
        self.assertGreater(grown, known)
        self.assertLess(grown, 2 * known)

    def test_a_moving_reference_stays_off_the_disk(self):
        cache = self.root / "moving"
        self.runs.run("sigmoid", self.root / "still", reference_cache=str(cache))
        before = self.files(cache)
        self.assert_not_mixed_up("sync_reference", cache)
        self.assertEqual(self.files(cache), before)
        shutil.rmtree(cache)
        again = self.root / "moved again"
        self.runs.run("sync_reference", again, reference_cache=str(cache))
        self.assertEqual(self.files(cache), {})

    def test_without_a_reference_the_model_is_checked(self):
        folder, model = self.root / "simpo run", self.root / "changed model"
        shutil.copytree(self.runs.model, model)
        self.runs.run("simpo", folder, model=str(model), iters=3)
        weights = mx.load(str(model / "model.safetensors"))
        name = "model.embed_tokens.weight"
        weights[name] = weights[name] + 0.5
        mx.save_safetensors(str(model / "model.safetensors"), weights)
        with contextlib.redirect_stdout(io.StringIO()):
            with self.assertRaisesRegex(ValueError, "the model .* is not what the run"):
                dpo.run(SimpleNamespace(resume=str(folder), iters=5))


class TestOneStep(unittest.TestCase):
    def setUp(self):
        self.batch = collate_pairs(random_pairs(3))

    def gradient(self, reference_model=None, objective=None, **batch):
        model = tiny_model()
        reference_model = reference_model or FrozenStart(model)
        options = {"objective": objective or Objective(), "keep_gradients": True}
        optimizer = optim.SGD(0.1)
        arrays = self.batch | batch
        loss, metrics = dpo_step(model, reference_model, arrays, optimizer, **options)
        return loss.item(), tree_flatten(metrics["gradients"])

    def test_no_reference_is_asked_for_or_run(self):
        never = mock.Mock(side_effect=AssertionError)
        for objective in (Objective(loss_type="simpo"), Objective(reference_free=True)):
            model = tiny_model()
            logps = reference_pass(model, None, self.batch, objective)[0]
            self.assertEqual(logps.tolist(), [0.0] * 6)
            losses = [
                dpo_step(model, r, self.batch, optim.SGD(0), objective=objective)[0]
                for r in (None, never)
            ]
            self.assertEqual(losses[0].item(), losses[1].item())
            score = scoring_step(model, objective)
            self.assertEqual(score(never, self.batch)["losses"].shape, (3,))
        with self.assertRaisesRegex(ValueError, "needs 'reference_logps'"):
            dpo_step(model, None, self.batch, optim.SGD(0))

    def test_zeros_are_never_remembered(self):
        with tempfile.TemporaryDirectory() as folder:
            cache = ReferenceCache(Path(folder), "0" * 64)
            never = mock.Mock(side_effect=AssertionError)
            remembered = RememberedReference(never, cache)
            pairs = random_pairs(4)
            model = tiny_model("lora")
            options = {"reference_model": remembered, "loss_type": "cpo"}
            metrics = train(model, pairs, pairs, iters=3, **options)
            self.assertEqual(metrics["trained_pairs"], 6)
            self.assertEqual((len(cache), list(Path(folder).iterdir())), (0, []))

    def test_an_update_grows_with_the_weights(self):
        for loss_type in ("sigmoid", "orpo"):
            objective = Objective(loss_type=loss_type)
            weights = mx.array([0.25, 0.5, 1.0])
            loss, gradients = self.gradient(objective=objective, weights=weights)
            for scale in (0.1, 10.0):
                other, found = self.gradient(
                    objective=objective, weights=scale * weights
                )
                self.assertAlmostEqual(other / scale, loss, places=5)
                for (name, x), (_, y) in zip(gradients, found):
                    np.testing.assert_allclose(
                        scale * x, y, rtol=1e-4, atol=1e-6, err_msg=name
                    )

    def test_one_pair_on_two_ranks(self):
        pair = collate_pairs(random_pairs(1))
        _, alone = self.gradient(**pair)
        # The other rank has nothing but filling.
        average = lambda tree: tree_map(lambda x: x / 2, tree)
        with mock.patch.object(update, "average_over_ranks", average):
            _, together = self.gradient(**pair)
        for (name, x), (_, y) in zip(alone, together):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-8, err_msg=name)

    def test_weights_leave_the_count_of_tokens(self):
        expected = count_tokens(self.batch)
        weighted = self.batch | {"weights": mx.array([0.5, 3.0, 0.1])}
        self.assertEqual(count_tokens(weighted), expected)


if __name__ == "__main__":
    unittest.main()
