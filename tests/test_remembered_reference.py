# Copyright © 2026 MLX Contributors

import gc
import json
import shutil
import unittest
import weakref
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from resuming import signals
from test_dpo_command import CommandCase, command, metrics_of
from tiny import (
    ROWS,
    VOCAB,
    Pairs,
    Recorder,
    pair,
    random_pairs,
    save_rows,
    save_tiny_model,
    tiny_model,
    train,
)

from mlx_lm import dpo
from mlx_lm.models import llama
from mlx_lm.preference import step as preference_step
from mlx_lm.preference.batch.collate import PairBatch, collate_pairs
from mlx_lm.preference.files import user_cache_folder
from mlx_lm.preference.forward.answers import sequence_logps
from mlx_lm.preference.forward.frozen import FrozenStart, running
from mlx_lm.preference.objective.objective import Objective
from mlx_lm.preference.reference import fingerprint
from mlx_lm.preference.reference.cache import ReferenceCache
from mlx_lm.preference.reference.remembered import RememberedReference
from mlx_lm.preference.run import compressed, forecast
from mlx_lm.preference.step import loss_and_values, reference_pass


class CountingRuns:
    """Counts forward passes of the reference in training and validation."""

    def __init__(self, test):
        self.count = 0

        def counted(model):
            self.count += 1
            return running(model)

        patch = mock.patch.object(preference_step, "running", counted)
        patch.start()
        test.addCleanup(patch.stop)

    def taken(self):
        count, self.count = self.count, 0
        return count


class TestRememberedReference(unittest.TestCase):
    def setUp(self):
        self.pairs = Pairs(random_pairs(5))
        self.runs = CountingRuns(self)

    def batch(self, *indices, size=None):
        pairs = [self.pairs[i] for i in indices]
        filling = [indices[0]] * ((size or len(indices)) - len(indices))
        return PairBatch([*indices, *filling], collate_pairs(pairs, size))

    def test_numbers_come_back_in_any_other_batch(self):
        model = tiny_model()
        reference = RememberedReference(model)
        self.assertEqual(reference.unknown(self.pairs, None), 5)
        self.assertEqual(reference.unknown(self.pairs, self.pairs[:2]), 7)
        for batch in (self.batch(0, 3), self.batch(1, 2, 4, size=6)):
            logps = sequence_logps(model, batch.arrays)
            reference.remember(self.pairs, batch, logps)
        self.assertEqual(reference.unknown(self.pairs), 0)
        for batch in (self.batch(4, 0), self.batch(3, size=3), self.batch(0, 0, 1)):
            known = reference.recall(self.pairs, batch)["reference_logps"]
            count = len(batch.indices)
            for row, index in enumerate(batch.indices):
                alone = sequence_logps(model, self.batch(index).arrays)
                both = known[row], known[count + row]
                np.testing.assert_allclose(both, alone, rtol=1e-5)

    def test_a_batch_with_one_unknown_pair_is_computed_whole(self):
        reference = RememberedReference(tiny_model())
        reference.remember(self.pairs, self.batch(0, 1), mx.zeros((4,)))
        batch = self.batch(0, 2)
        self.assertIs(reference.recall(self.pairs, batch), batch.arrays)

    def test_the_pass_is_live_or_known(self):
        policy = tiny_model("lora")
        batch = self.batch(0, 1).arrays
        with self.assertRaisesRegex(ValueError, "needs 'reference_logps'"):
            reference_pass(policy, None, batch)
        live, _ = reference_pass(policy, FrozenStart(policy), batch)
        np.testing.assert_allclose(live, sequence_logps(policy, batch), rtol=1e-6)
        known, _ = reference_pass(policy, None, batch | {"reference_logps": live})
        self.assertIs(known, live)
        loss, values = loss_and_values(live, known, batch, Objective())
        self.assertAlmostEqual(loss.item(), 2 * np.log(2), places=5)
        self.assertAlmostEqual(values["losses"].sum().item(), loss.item(), places=5)

    def test_each_pair_is_asked_once_in_a_run(self):
        for compiled in (False, True):
            reference = RememberedReference(tiny_model(seed=3))
            recorder = Recorder()
            train(
                tiny_model("lora"),
                self.pairs,
                Pairs(random_pairs(3, seed=9)),
                callback=recorder,
                reference_model=reference,
                compile=compiled,
                steps_per_eval=5,
            )
            # Three training batches an epoch, two of validation; each compiled form
            # runs Python once.
            count = self.runs.taken()
            self.assertLessEqual(count, 5)
            self.assertEqual(reference.unknown(self.pairs), 0)
            if not compiled:
                self.assertEqual(count, 5)

    def test_known_numbers_train_as_live_ones(self):
        results = []
        cache = ReferenceCache(None, "")
        for _ in range(2):
            recorder = Recorder()
            reference = RememberedReference(tiny_model(seed=3), cache)
            optimizer = optim.SGD(0.05)
            train(
                tiny_model("lora"),
                self.pairs,
                optimizer=optimizer,
                reference_model=reference,
                callback=recorder,
                iters=3,
                steps_per_report=1,
            )
            results.append(recorder.train)
        self.assertEqual(self.runs.taken(), 3)
        for live, known in zip(*results, strict=True):
            for key in ("loss", "rewards/margins", "grad_norm", "kl_estimate"):
                self.assertAlmostEqual(live[key], known[key], places=5, msg=key)

    def test_a_separate_model_is_freed_when_its_numbers_are_complete(self):
        for compiled in (False, True):
            for keep in (False, True):
                model = tiny_model(seed=3)
                model.eval()
                gone, alive = weakref.ref(model), []
                reference = RememberedReference(model, keep=keep)
                del model
                recorder = Recorder()

                def look(info, gone=gone, alive=alive):
                    gc.collect()
                    alive.append(gone() is not None)

                recorder.on_train_loss_report = look
                train(
                    tiny_model("lora"),
                    self.pairs,
                    Pairs(random_pairs(8, seed=9)),
                    reference_model=reference,
                    callback=recorder,
                    compile=compiled,
                    # A sample: the other pairs are never asked for.
                    val_batches=1,
                    iters=6,
                    steps_per_report=1,
                )
                with self.subTest(compiled=compiled, keep=keep):
                    # An epoch has three batches.
                    expected = [True] * 6 if keep else [True] * 2 + [False] * 4
                    self.assertEqual(alive, expected)
                    self.assertEqual(reference.release(self.pairs), False)

    def test_a_validation_pair_without_a_finite_number_is_asked_again(self):
        model, recorder = tiny_model(seed=3, tie_word_embeddings=False), Recorder()
        table = model.model.embed_tokens
        table.weight = mx.where(mx.arange(VOCAB)[:, None] == 1, mx.nan, table.weight)
        # Token 1 is in one validation pair alone.
        valid = Pairs([pair([2, 3], [4, 5], [6]), pair([2, 1], [4], [5])])
        pairs = Pairs([pair([2, i], [3, i], [4]) for i in range(5, 10)])
        reference = RememberedReference(model, keep=False)
        more = {
            "steps_per_eval": 2,
            "steps_per_report": 1,
            "reference_model": reference,
        }
        train(tiny_model("lora"), pairs, valid, callback=recorder, **more)
        self.assertEqual(len(recorder.val), 11)
        self.assertIsNotNone(reference.model)
        self.assertEqual(reference.unknown(pairs, valid), 1)


class TestThroughTheCommand(CommandCase):
    def setUp(self):
        super().setUp()
        self.runs = CountingRuns(self)
        self.kept = self.folder / "references"
        check_memory = forecast.check_memory

        def not_counted(*args):
            # The prediction follows a step without computing it.
            count = self.runs.count
            estimate = check_memory(*args)
            self.runs.count = count
            return estimate

        patch = mock.patch.object(forecast, "check_memory", not_counted)
        patch.start()
        self.addCleanup(patch.stop)

    def flags(self, *more, adapters=None, train=True):
        flags = super().flags("--reference-cache", self.kept, *more, train=train)
        if adapters is not None:
            flags[flags.index("--adapter-path") + 1] = adapters
        return flags

    def losses(self, folder):
        lines = metrics_of(folder)
        return [line.get("val_loss", line.get("loss")) for line in lines]

    def test_a_second_run_asks_the_reference_nothing(self):
        out = self.succeed(*self.flags())
        self.assertGreater(self.runs.taken(), 0)
        self.assertNotIn("pairs known", out)
        other = self.folder / "other"
        out = self.succeed(*self.flags("--beta", 0.7, adapters=other))
        self.assertEqual(self.runs.taken(), 0)
        self.assertRegex(out, "the frozen start · 11 of 11 pairs known")
        first, second = metrics_of(self.adapters)[0], metrics_of(other)[0]
        for key in ("perplexity/reference", "reference_logps/accuracies"):
            self.assertAlmostEqual(
                first[f"val_{key}"],
                second[f"val_{key}"],
                delta=1e-4 * first[f"val_{key}"],
            )
        again = self.folder / "again"
        self.succeed(*self.flags(adapters=again))
        np.testing.assert_allclose(
            self.losses(again), self.losses(self.adapters), rtol=1e-6
        )
        # The numbers in the file are those of the model itself.
        (file,) = self.kept.glob("*.sqlite")
        self.assertEqual(len(ReferenceCache(self.kept, file.stem)), 11)

    def test_what_the_numbers_depend_on_makes_others(self):
        self.succeed(*self.flags())
        self.runs.taken()
        other = save_tiny_model(self.folder / "other", max_position_embeddings=2049)
        head = dict(mx.load(str(other / "model.safetensors")))
        name = "model.norm.weight"
        mx.save_safetensors(
            str(other / "model.safetensors"), head | {name: 1.001 * head[name]}
        )
        swapped = [
            {**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in ROWS
        ]
        data = save_rows(self.folder / "swapped", swapped)
        for more in (["--model", other], ["--data", data]):
            self.succeed(*self.flags(*more))
            self.assertGreater(self.runs.taken(), 0)
        self.succeed(*self.flags())
        self.assertEqual(self.runs.taken(), 0)

    def test_numbers_of_a_model_that_computes_another_function(self):
        self.succeed(*self.flags())
        first, val_loss = (
            self.adapters,
            lambda: metrics_of(self.adapters)[0]["val_loss"],
        )
        (file,) = self.kept.glob("*.sqlite")
        # A change that no name of the model tells of.
        attend, name = (
            llama.scaled_dot_product_attention,
            "scaled_dot_product_attention",
        )
        times = lambda factor: lambda *args, **more: factor * attend(*args, **more)
        with mock.patch.object(llama, name, times(1.5)):
            self.runs.taken()
            out = " ".join(self.succeed(*self.flags()).split())
            self.assertIn("log-probs that were kept are not what the model gives", out)
            self.assertAlmostEqual(val_loss(), np.log(2), places=5)
            self.assertGreater(self.runs.taken(), 0)
            # They took the place of the others.
            self.assertNotIn("WARNING] The reference's", self.succeed(*self.flags()))
            self.assertEqual(self.runs.taken(), 0)
        with signals("_take_step", 2):
            self.assertEqual(command(*self.flags("--beta", 0.2))[0], 143)
        with mock.patch.object(llama, name, times(0.5)):
            file.unlink()
            out = " ".join(self.succeed("--resume", first).split())
            self.assertIn("log-probs that were kept are not what the model gives", out)

    def test_code_and_version_name_the_numbers(self):
        own = shutil.copytree(self.model, self.folder / "own")
        code = Path(llama.__file__).read_text().replace("from .", "from mlx_lm.models.")
        config = json.loads((own / "config.json").read_text())
        (own / "config.json").write_text(json.dumps({**config, "model_file": "own.py"}))
        more = ["--model", own, "--trust-remote-code", "--grad-checkpoint"]
        for factor in ("", " * 1.5"):
            (own / "own.py").write_text(
                code.replace(
                    "return self.down_proj(", f"return self.down_proj(1{factor} * "
                )
            )
            for known in (False, True):
                out = self.succeed(*self.flags(*more))
                with self.subTest(factor=factor, known=known):
                    self.assertEqual("11 of 11 pairs known" in out, known)
                    first = metrics_of(self.adapters)[0]
                    self.assertAlmostEqual(first["val_loss"], np.log(2), places=5)
        with mock.patch.object(fingerprint, "__version__", "0.99+dpo.1"):
            self.assertNotIn("pairs known", self.succeed(*self.flags(*more)))
        resumed = ["--resume", self.adapters, "--iters", 9, "--trust-remote-code"]
        _, _, err = command(*resumed)
        self.assertRegex(err, r"model \(its weights or code, a version")
        # One line where its code may not run.
        code, _, err = command(*self.flags("--model", own))
        self.assertEqual(code, 2)
        self.assertRegex(err, r"\AError: .*own\.py.*trust.remote.code.*\n\Z")

    def test_damaged_numbers_are_computed_again_with_one_warning(self):
        self.succeed(*self.flags())
        first = self.losses(self.adapters)
        (file,) = self.kept.glob("*.sqlite")
        raw = bytearray(file.read_bytes())
        raw[-3] ^= 64
        for damaged in (bytes(raw), file.read_bytes()[:-5], b""):
            file.write_bytes(damaged)
            self.runs.taken()
            out = " ".join(self.succeed(*self.flags()).split())
            self.assertEqual(out.count("is damaged"), 1)
            self.assertGreater(self.runs.taken(), 0)
            np.testing.assert_allclose(self.losses(self.adapters), first, rtol=1e-6)
            self.succeed(*self.flags())
            self.assertEqual(self.runs.taken(), 0)

    def test_nothing_is_kept_if_not_wanted(self):
        home = self.folder / "home"
        with mock.patch.dict("os.environ", XDG_CACHE_HOME=str(home)):
            self.succeed(*super().flags("--no-reference-cache"))
            self.assertEqual([p for p in home.rglob("*") if p.is_file()], [])
            self.succeed(*super().flags())
            self.assertEqual(
                {p.parent for p in home.rglob("*") if p.is_file()},
                {user_cache_folder("references")},
            )
        self.assertFalse(self.kept.exists())

    def test_a_reference_model_is_not_kept_in_memory(self):
        other = save_tiny_model(self.folder / "other", quantize=True)
        data = save_rows(self.folder / "data", ROWS[:8], ("train",))
        save_rows(data, ROWS[8:], ("valid",))
        more = [
            "--data",
            data,
            "--reference-model",
            other,
            "--iters",
            6,
            "--steps-per-report",
            1,
        ]
        for known in (False, True):
            seen, alive, train_dpo = [], [], dpo.train_dpo

            def watch(*args, seen=seen, load_reference=compressed.load_reference_model):
                model = load_reference(*args)
                seen.append(weakref.ref(model))
                return model

            def train(*args, seen=seen, alive=alive, train_dpo=train_dpo, **last):
                report = args[-1].on_train_loss_report

                def look(info):
                    report(info)
                    gc.collect()
                    alive.append(seen[0]() is not None)

                args[-1].on_train_loss_report = look
                return train_dpo(*args, **last)

            with mock.patch.object(compressed, "load_reference_model", watch):
                with mock.patch.object(dpo, "train_dpo", train):
                    self.succeed(*self.flags(*more))
            # 8 pairs in batches of 4.
            expected = [False] * 6 if known else [True] + [False] * 5
            self.assertEqual(alive, expected)

    def test_a_test_after_the_run_still_has_its_reference(self):
        for _ in range(2):
            out = self.succeed(*self.flags("--test"))
            self.assertRegex(out, r"test · 11 pairs")


if __name__ == "__main__":
    unittest.main()
