# Copyright © 2026 MLX Contributors

import contextlib
import io
import json
import math
import tempfile
import unittest
import unittest.mock
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
from tiny import Pairs, Recorder, pair, random_pairs, tiny_model

from mlx_lm.dpo import resolve_args
from mlx_lm.preference.batch.buckets import length_buckets
from mlx_lm.preference.batch.shape import pair_lengths
from mlx_lm.preference.data.notes import RowNotes
from mlx_lm.preference.device import cache_limit, device_memory, trim_cache
from mlx_lm.preference.features import features
from mlx_lm.preference.forward.frozen import FrozenStart
from mlx_lm.preference.forward.probe import Sharing
from mlx_lm.preference.measure.evaluation import evaluate_pairs
from mlx_lm.preference.memory.predict import MemoryEstimate
from mlx_lm.preference.reference.feature import remember_reference
from mlx_lm.preference.reference.live import NoReference
from mlx_lm.preference.reference.remembered import RememberedReference
from mlx_lm.preference.run.checkpoint import numbered, save_state
from mlx_lm.preference.run.folder import open_folder
from mlx_lm.preference.run.identity import run_identity
from mlx_lm.preference.run.job import Job
from mlx_lm.preference.run.layouts import find_sharing, likely_sharing
from mlx_lm.preference.run.plan import training_plan
from mlx_lm.preference.run.resume import find_checkpoint
from mlx_lm.preference.run.setup import header_rows, make_optimizer
from mlx_lm.preference.watch.watchers import WatchedRun
from mlx_lm.tuner.trainer import DPOTrainingArgs

# The command finds one for what is trained.
RATE = ("--learning-rate", "1e-4")
# What a state says of the run that it is of.
INFO = {"identity": {}, "pending": False, "parts": {}}
INFO |= {"updates": 0, "metrics_bytes": 0}


class TestSetup(unittest.TestCase):
    def test_epochs_decide_the_steps_and_the_schedule(self):
        args = resolve_args(["--epochs", "3", "--learning-rate", "0.5"])
        args.lr_schedule, args.batch_size = "linear", 2
        optimizer, _ = make_optimizer(args, 9)
        self.assertEqual(args.iters, 15)
        layer, rates = nn.Linear(1, 1), []
        for _ in range(15):
            optimizer.update(layer, layer.parameters())
            rates.append(optimizer.learning_rate.item())
        self.assertEqual(rates[0], 0.5)
        # Linear to 0 in so many steps.
        self.assertAlmostEqual(rates[-1], 0.5 / 15, places=5)

    def test_a_reference_can_lower_the_grade(self):
        args = resolve_args([])
        model, reference = tiny_model(), tiny_model(seed=1)
        self.assertEqual(find_sharing(args, model, reference).grade, "ragged")
        grades = {id(model): "ragged", id(reference): "plain"}
        found = lambda m: Sharing(grades[id(m)], "why")
        with unittest.mock.patch("mlx_lm.preference.run.layouts.check_sharing", found):
            self.assertEqual(find_sharing(args, model, reference).grade, "plain")
            self.assertEqual(find_sharing(args, model, None).grade, "ragged")
            args.share_prompt = False
            self.assertEqual(find_sharing(args, model, None).grade, "plain")

    def test_the_newest_checkpoint_is_found(self):
        with tempfile.TemporaryDirectory() as folder:
            args = SimpleNamespace(
                early_stopping=None,
                adapter_path=folder,
                resume=folder,
                resume_anyway=False,
                restart=False,
                iters=9,
            )
            with contextlib.redirect_stdout(io.StringIO()) as screen:
                self.assertIsNone(find_checkpoint(args, {}))
                for it in (2, 4):
                    info = INFO | {"identity": {"train": "x"}}
                    numbered(folder, it, "adapters").write_bytes(b"x")
                    save_state(folder, it, {"a": mx.ones((it,))}, info)
                state = find_checkpoint(args, {"train": "x"})
            self.assertEqual((state.iteration, state.arrays["a"].size), (4, 4))
            self.assertIn("Going on after step 4 of 9.", screen.getvalue())
            with self.assertRaisesRegex(ValueError, "training pairs"):
                find_checkpoint(args, {"train": "y"})

    def test_fewer_steps_than_were_taken(self):
        with tempfile.TemporaryDirectory() as folder:
            args = SimpleNamespace(
                adapter_path=folder,
                resume=folder,
                resume_anyway=False,
                restart=False,
                iters=3,
            )
            for pending in (False, True):
                numbered(folder, 4, "adapters").write_bytes(b"x")
                save_state(folder, 4, {}, INFO | {"pending": pending})
                with contextlib.redirect_stdout(io.StringIO()) as screen:
                    state = find_checkpoint(args, {})
                self.assertEqual(state.iteration, 4)
                self.assertIn(
                    "has already taken 4 steps, more than the 3 asked for",
                    screen.getvalue(),
                )
                self.assertEqual(screen.getvalue().count("\n"), 1)

    def test_what_a_run_starts_with(self):
        args = resolve_args(["--no-reference-cache"])
        pairs, valid = random_pairs(3), random_pairs(2, seed=1)
        model, other = tiny_model(), tiny_model(seed=1)
        alone = remember_reference(args, model, None, pairs, valid)
        beside = remember_reference(args, model, other, pairs, valid)
        first = run_identity(model, None, alone, pairs, valid)
        second = run_identity(model, other, beside, pairs, valid)
        self.assertEqual(first["model"], first["reference"])
        self.assertEqual(second["model"], first["model"])
        self.assertNotEqual(second["reference"], first["reference"])
        self.assertEqual(second["train"], first["train"])
        self.assertNotEqual(first["valid"], first["train"])

    def test_sharing_before_the_model_is_asked(self):
        for flags, grade in (
            ([], "equal"),
            (["--no-share-prompt"], "plain"),
            (["--pack"], "packed"),
        ):
            self.assertEqual(likely_sharing(resolve_args(flags)), grade)

    def test_the_folder_of_a_new_run(self):
        with tempfile.TemporaryDirectory() as folder:
            args = resolve_args(["--adapter-path", folder, "--beta", "0.3"])
            Path(folder, "metrics.jsonl").write_text("of an earlier run\n")
            numbered(folder, 4, "adapters").write_bytes(b"x")
            old = save_state(folder, 4, {}, {})
            recorder = Recorder()
            job = Job(args, nn.Module(), None)
            for feature in features():
                feature.after_loading(job)
            job.kept["watched"] = WatchedRun(Path(folder), None, None, [], True)
            opened = open_folder(job, recorder)
            opened.on_train_loss_report({"iteration": 1})
            self.assertFalse(Path(old).exists())
            text = Path(folder, "metrics.jsonl").read_text()
            self.assertEqual(text, '{"iteration": 1}\n')
            config = json.loads(Path(folder, "adapter_config.json").read_text())
            self.assertEqual(config["beta"], 0.3)
        self.assertEqual(recorder.train, [{"iteration": 1}])

    def test_the_header_counts_what_is_known(self):
        args = resolve_args(
            ["--batch-size", "2", "--iters", "5", "--data", "[x]", *RATE]
        )
        pairs = random_pairs(4)
        pairs.shape, pairs.format = "text", "text"
        pairs.notes = RowNotes(
            4, columns={"prompt": ["[q]"], "answers": ["a"]}, unread=["note"]
        )
        reference = RememberedReference(FrozenStart(tiny_model()))
        plan = training_plan(pairs, DPOTrainingArgs(batch_size=2))
        estimate = MemoryEstimate(10**9, 0, 0, 0, 0)

        def all_rows(args, reference, plan):
            job = Job(args, None, None, pairs, [], reference=reference)
            job.kept["memory"] = estimate
            rows = header_rows(args, pairs, [], plan)
            for feature in features():
                feature.header_rows(job, rows)
            return {label: text for label, text in rows.items() if text}

        rows = all_rows(args, reference, plan)
        self.assertEqual(rows["data"], "[x]")
        self.assertEqual(rows["type"], "lora · 16 layers · rank 8")
        self.assertEqual(rows["loss"], "sigmoid · beta 0.1")
        self.assertEqual(rows["an epoch"], "2 iters · 2.5 epochs")
        self.assertEqual(rows["reference"], "the frozen start")
        self.assertEqual(rows["columns"], "prompt: [q] · answers: a · not read: note")
        self.assertRegex(rows["prompts"], r"· 1 batch shape · \d+% padding")
        plan = length_buckets(pair_lengths(pairs), 2, min_batches=1)
        self.assertEqual(len(plan), 2)
        rows = all_rows(args, reference, plan)
        self.assertIn("· 2 batch shapes ·", rows["prompts"])
        self.assertIn("1.00 GB", rows["peak memory"])
        self.assertNotIn("loss has", rows)

        def header(*flags, reference=reference):
            given = ["--iters", "5", "--data", "d", *RATE, *map(str, flags)]
            args = resolve_args(given)
            return all_rows(args, reference, plan)

        rows = header("--reference-free", reference=NoReference())
        self.assertEqual(rows["reference"], "none")
        self.assertEqual(rows["loss has"], "reference_free")
        moving = "the start · follows the policy every 512 updates"
        self.assertEqual(header("--sync-reference")["reference"], moving)
        each = header("--sync-reference", "--sync-steps", 1)["reference"]
        self.assertEqual(each, "the start · follows the policy every update")
        smooth = ["--label-smoothing", "0.1", "--margin-feature", "gap"]
        shown = "label_smoothing 0.1 · margin_feature gap"
        self.assertEqual(header(*smooth)["loss has"], shown)
        self.assertEqual(header("--iters", 3000)["an epoch"], "2 iters · 1,500 epochs")
        rows = header("--loss-type", "kto")
        self.assertEqual(rows["answers"], "4 train · 0 valid")


class TestParts(unittest.TestCase):
    def test_the_cache_keeps_an_eighth(self):
        self.assertEqual(cache_limit(7), 7)
        share = 3 / 4 if mx.cuda.is_available() else 1 / 8
        self.assertAlmostEqual(cache_limit(None) / device_memory(), share, places=2)

    def test_a_cuda_card_keeps_three_quarters(self):
        with (
            unittest.mock.patch(
                "mlx_lm.preference.device.device_memory", return_value=800
            ),
            unittest.mock.patch.object(mx.cuda, "is_available", return_value=True),
            unittest.mock.patch.object(mx, "default_device", return_value=mx.gpu),
        ):
            self.assertEqual(cache_limit(None), 600)

    def test_the_cache_is_emptied_beyond_its_limit(self):
        mx.eval(mx.zeros((1000, 1000)))
        held = mx.get_cache_memory()
        self.assertGreater(held, 0)
        trim_cache(held)
        self.assertEqual(mx.get_cache_memory(), held)
        trim_cache(held - 1)
        self.assertEqual(mx.get_cache_memory(), 0)

    def test_every_pair_is_evaluated_once(self):
        pairs = Pairs(pair([1], [i + 1], [9]) for i in range(5))

        def score(batch):
            size = batch.arrays["weights"].size
            values = {"losses": mx.array([float(i) for i in batch.indices])}
            for name in ("chosen_rewards", "rejected_rewards"):
                values[name] = mx.zeros((size,))
            for name in ("policy_logps", "reference_logps"):
                values[name] = mx.zeros((2 * size,))
            return values, batch.arrays

        metrics = evaluate_pairs(score, tiny_model(), pairs, 2, -1, None, 0, None)
        self.assertEqual((metrics["pairs"], metrics["loss"]), (5, 2))
        self.assertFalse(any(map(math.isnan, metrics.values())))


if __name__ == "__main__":
    unittest.main()
