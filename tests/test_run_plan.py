# Copyright © 2026 MLX Contributors

import contextlib
import gc
import io
import os
import re
import tempfile
import unittest
from dataclasses import replace
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from tiny import ROWS, Pairs, random_pairs, save_rows, save_tiny_model, tiny_model

from mlx_lm import dpo
from mlx_lm.preference.batch.collate import iterate_preference_batches
from mlx_lm.preference.forward.frozen import FrozenStart
from mlx_lm.preference.memory import replay
from mlx_lm.preference.memory.predict import MemoryEstimate
from mlx_lm.preference.policy.masters import with_master_weights
from mlx_lm.preference.policy.model import read_weights
from mlx_lm.preference.reference.remembered import RememberedReference
from mlx_lm.preference.run import forecast
from mlx_lm.preference.run.forecast import check_memory, describe_memory, predict_run
from mlx_lm.preference.run.plan import describe_plan, training_plan
from mlx_lm.preference.step import scoring_step
from mlx_lm.tuner.trainer import DPOTrainingArgs, training_step

WIDE = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 512}


def long_pairs():
    return random_pairs(6, vocab=512, longest=60)


def measured_peak(model, reference, args, pairs):
    """The peak of some steps over all batches, in bytes."""
    optimizer = with_master_weights(optim.Adam(1e-3), model)
    step, state = training_step(model, optimizer, args)
    step = RememberedReference(reference).compiled(step, state, state, False)
    mx.eval(state)
    model.train()
    peak = 0
    for _ in range(2):
        for batch in iterate_preference_batches(
            pairs, args.batch_size, training_plan(pairs, args)
        ):
            gc.collect()
            mx.reset_peak_memory()
            values = step(batch.arrays, True)
            mx.eval(state, values)
            peak = max(peak, mx.get_peak_memory())
    return peak


class TestPrediction(unittest.TestCase):
    def test_the_peak_is_that_of_the_worst_batch(self):
        for sharing in ("equal", "plain"):
            with self.subTest(sharing=sharing):
                predicted, measured = self.peaks(sharing)
                self.assertLess(abs(predicted / measured - 1), 0.15)

    def peaks(self, sharing):
        """Predicted and measured, with no model of an earlier call alive."""
        gc.collect()
        before = mx.get_active_memory()
        model = tiny_model("lora", **WIDE)
        pairs, reference = long_pairs(), FrozenStart(model)
        args = DPOTrainingArgs(batch_size=2, sharing=sharing, compile=False)
        optimizer = with_master_weights(optim.Adam(1e-3), model)
        mx.eval(model.parameters())
        estimate = predict_run(model, reference, optimizer, pairs, args)
        return estimate.total, measured_peak(model, reference, args, pairs) - before

    def test_nothing_is_allocated(self):
        model = tiny_model("lora", **WIDE)
        args = DPOTrainingArgs(batch_size=2, compile=False)
        pairs, optimizer = long_pairs(), optim.Adam(1e-3)
        before = mx.get_active_memory()
        predict_run(model, FrozenStart(model), optimizer, pairs, args)
        self.assertLess(mx.get_active_memory() - before, 100_000)

    def test_more_than_there_is_names_what_would_fit(self):
        model = tiny_model("lora", **WIDE)
        args = DPOTrainingArgs(batch_size=4, compile=False)
        given = (model, FrozenStart(model), optim.Adam(1e-3), long_pairs(), args)
        needed = check_memory(*given).total
        # On the CPU a tenth of the memory stays free.
        too_little = (0.8, 1.05) if mx.default_device() == mx.cpu else (0.8,)
        for share in too_little:
            limit = int(needed * share)
            with mock.patch.object(forecast, "device_memory", lambda: limit):
                with self.assertRaisesRegex(ValueError, "fit with .*batch_size: "):
                    check_memory(*given)
        with mock.patch.object(forecast, "device_memory", lambda: int(needed * 1.12)):
            check_memory(*given)

    def test_adapters_that_the_start_does_not_run_are_held_all_the_same(self):
        args, pairs = DPOTrainingArgs(batch_size=4, compile=False), long_pairs()
        for moved in (0.0, 0.1):
            model = tiny_model("lora", **WIDE)
            for module in model.modules():
                if "lora_b" in module:
                    module.lora_b = module.lora_b + moved
            start = FrozenStart(model)
            self.assertEqual(bool(start.idle), not moved)
            estimate = predict_run(model, start, optim.Adam(1e-3), pairs, args)
            trained = tree_flatten(model.trainable_parameters())
            held = sum(x.nbytes for _, x in trained)
            self.assertEqual((estimate.trained, estimate.reference), (held, held))

    def test_a_gpu_that_takes_less_at_once_may_have_enough(self):
        def limits():
            return int(os.environ.get("MLX_MAX_OPS_PER_BUFFER", 20)), 1 << 40

        model = tiny_model("lora", **WIDE)
        args = DPOTrainingArgs(batch_size=4, compile=False)
        given = (model, FrozenStart(model), optim.Adam(1e-3), long_pairs(), args)
        least = r"fit with .* or MLX_MAX_OPS_PER_BUFFER=2 in the environment\."
        for module in (replay, forecast):
            patch = mock.patch.object(module, "task_limits", limits)
            self.enterContext(patch)
        self.enterContext(mock.patch.dict(os.environ))
        os.environ.pop("MLX_MAX_OPS_PER_BUFFER", None)
        needed = predict_run(*given).total
        os.environ["MLX_MAX_OPS_PER_BUFFER"] = "2"
        few = predict_run(*given).total
        os.environ["MLX_MAX_OPS_PER_BUFFER"] = "20"
        self.assertLess(few, 0.9 * needed)
        for limit, is_told in ((few * 1.12, True), (few * 0.98, False)):
            with mock.patch.object(forecast, "device_memory", lambda x=limit: int(x)):
                with self.assertRaisesRegex(ValueError, "fit with") as caught:
                    check_memory(*given)
            told = re.search(least, str(caught.exception))
            self.assertEqual(bool(told), is_told, caught.exception)
        self.assertEqual(os.environ["MLX_MAX_OPS_PER_BUFFER"], "20")

    def test_a_validation_may_take_more_than_a_step(self):
        model = tiny_model("lora", **WIDE)
        args = DPOTrainingArgs(batch_size=4, compile=False, val_batches=-1)
        model.freeze()
        model.layers[-1].mlp.down_proj.unfreeze()
        short, long = random_pairs(8, vocab=64), long_pairs()
        given = model, FrozenStart(model), optim.SGD(1e-3), short, args
        step, whole = check_memory(*given), check_memory(*given, long)
        self.assertGreater(whole.total, 1.5 * step.total)
        self.assertEqual(check_memory(*given, short), step)
        limit = int(1.2 * step.total)
        with mock.patch.object(forecast, "device_memory", lambda: limit):
            check_memory(*given)
            with self.assertRaisesRegex(ValueError, "The run needs about"):
                check_memory(*given, long)
        # Only batches that are validated count.
        few = replace(args, val_batches=1)
        mixed = Pairs([*short, *long])
        self.assertLess(check_memory(*given[:-1], few, mixed).total, whole.total)

    def test_an_optimizer_takes_no_step(self):
        for dtype in (mx.float32, mx.bfloat16):
            states = []
            for predicts in (False, True):
                model = tiny_model("lora", **WIDE)
                model.set_dtype(dtype)
                args = DPOTrainingArgs(batch_size=2, compile=False)
                optimizer = optim.Adam(1e-3)
                if predicts:
                    masters = with_master_weights(optimizer, model)
                    predict_run(model, None, masters, long_pairs(), args)
                training_step(model, with_master_weights(optimizer, model), args)
                states.append(dict(tree_flatten(optimizer.state)))
            self.assertEqual(states[0].keys(), states[1].keys())
            for name, x in states[0].items():
                self.assertEqual(x.dtype, states[1][name].dtype)
                np.testing.assert_array_equal(x, states[1][name])

    def test_it_is_said_in_gigabytes(self):
        text = describe_memory(MemoryEstimate(10**9, 0, 0, 0, 5 * 10**8))
        self.assertEqual(text, "1.50 GB: weights 1.00 · activations 0.50")
        text = describe_memory(MemoryEstimate(40000, 0, 0, 1000, 10**6))
        self.assertEqual(text, "1.04 MB: weights 0.04 · activations 1.00")


class TestPlan(unittest.TestCase):
    def test_the_table_has_every_batch(self):
        pairs = random_pairs(40)
        args = DPOTrainingArgs(batch_size=4, sharing="equal", compile=True)
        plan = training_plan(pairs, args)
        lines = describe_plan(plan, 4)[1:]
        self.assertEqual(len(lines), len(plan))
        self.assertEqual(sum(int(line.split()[1]) for line in lines), 40)

    def test_scoring_is_the_step_without_its_gradient(self):
        model = tiny_model("lora")
        reference, args = FrozenStart(model), DPOTrainingArgs(batch_size=3)
        (batch,) = iterate_preference_batches(random_pairs(3), 3)
        model.eval()
        scored = scoring_step(model, args.objective)(reference, batch.arrays)
        step, _ = training_step(model, optim.SGD(0.0), args)
        stepped = step(reference, batch.arrays, True)
        for key, value in scored.items():
            np.testing.assert_allclose(value, stepped[key], atol=1e-6)


class TestCommand(unittest.TestCase):
    def run_command(self, folder, *options):
        model = save_tiny_model(f"{folder}/model")
        data = save_rows(f"{folder}/data", ROWS)
        argv = ["--train", "--model", str(model), "--data", str(data)]
        argv += ["--adapter-path", f"{folder}/adapters", "--iters", "2", *options]
        screen = io.StringIO()
        with contextlib.redirect_stdout(screen):
            dpo.run(dpo.resolve_args([*argv, "--no-reference-cache"]))
        return screen.getvalue()

    def test_a_dry_run_shows_the_plan_and_trains_nothing(self):
        with tempfile.TemporaryDirectory() as folder:
            text = self.run_command(folder, "--dry-run")
            self.assertRegex(text, r"peak memory .*\d\.\d\d MB: weights \d")
            self.assertIn("batches   pairs  prompt", text)
            self.assertIn("Dry run: nothing was trained.", text)
            self.assertFalse(Path(folder, "adapters").exists())

    def test_a_run_that_does_not_fit_is_refused_first(self):
        with tempfile.TemporaryDirectory() as folder:
            with mock.patch.object(forecast, "device_memory", lambda: 1000):
                with self.assertRaisesRegex(ValueError, "The run needs about"):
                    self.run_command(folder)
            self.assertFalse(Path(folder, "adapters").exists())

    def test_a_damaged_model_is_one_line(self):
        with tempfile.TemporaryDirectory() as folder:
            model = save_tiny_model(f"{folder}/model")
            file = model / "model.safetensors"
            file.write_bytes(file.read_bytes()[:-100])
            with self.assertRaisesRegex(ValueError, "Can't read the weights of"):
                loaded = dpo.models.load_model(str(model))[0]
                read_weights(loaded, str(model))


if __name__ == "__main__":
    unittest.main()
