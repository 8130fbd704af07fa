# Copyright © 2026 MLX Contributors

import math
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.optimizers as optim
from folders import FolderCase
from mlx.utils import tree_flatten
from resuming import Setup, bits, copy_at, lines_of, result, signals
from test_dpo_command import CommandCase, metrics_of
from tiny import Pairs, pair, random_pairs, tiny_model, train

from mlx_lm.preference.errors import InputError
from mlx_lm.preference.run.best import BestAdapter
from mlx_lm.preference.run.checkpoint import newest_state, numbered
from mlx_lm.preference.run.resume import Stoppable

ADAPTER = "adapters.safetensors"
# Of pairs learned by heart others are worth less and less.
SETUP = Setup(
    **{"save_best": "loss", "early_stopping": 2, "load_best": True, "iters": 40},
    **{"steps_per_eval": 2, "steps_per_report": 5, "val_batches": -1},
    **{"grad_accumulation_steps": 3, "dropout": 0.2},
)


def expected_stop(lines, patience, name="val_loss", sign=-1):
    """The step after which a run stops, and its best one, from its metrics."""
    values = [(x["iteration"], sign * x[name]) for x in lines if name in x][1:]
    best, since = (0, -math.inf), 0
    for it, value in values:
        best, since = ((it, value), 0) if value > best[1] else (best, since + 1)
        if since == patience:
            break
    return it, best[0]


class TestEarlyStopping(FolderCase):
    def test_stopped_at_the_same_step_wherever_it_was_broken_off(self):
        whole = self.folder / "whole"
        out = SETUP.start(whole)
        lines = lines_of(whole)
        stop, best = expected_stop(lines, 2)
        self.assertTrue(2 < best < stop < 40, (best, stop))
        self.assertEqual(newest_state(whole).iteration, stop)
        # What was trained since the last line is reported too.
        self.assertEqual(max(x["iteration"] for x in lines if "loss" in x), stop)
        self.assertRegex(
            " ".join(out.split()),
            f"Stopped early after step {stop} of 40: 2 validations without gain "
            rf"in loss, best 0\.\d+ at step {best}\.",
        )
        kept = bits(whole / ADAPTER)
        self.assertTrue(kept == bits(whole / "best" / ADAPTER))
        self.assertTrue(kept == bits(numbered(whole, best, "adapters")))
        expected = result(whole)
        for step in range(1, stop + 1):
            broken = copy_at(whole, self.folder / str(step), step)
            SETUP.go_on(broken)
            found = result(broken)
            for part in expected:
                with self.subTest(step=step, part=part):
                    self.assertTrue(found[part] == expected[part])

    def test_interrupted_in_the_validation_that_ends_it(self):
        whole, broken = self.folder / "whole", self.folder / "broken"
        SETUP.start(whole)
        stop = newest_state(whole).iteration
        # Three batches each, and a first validation before the first step.
        at = 3 * (stop // 2) + 1
        with signals("after_validation_batch", at, owner=Stoppable):
            with self.assertRaises(SystemExit):
                SETUP.start(broken)
        state = newest_state(broken)
        self.assertEqual((state.iteration, state.info["pending"]), (stop, True))
        SETUP.go_on(broken)
        expected, found = result(whole), result(broken)
        for part in expected:
            with self.subTest(part=part):
                self.assertTrue(found[part] == expected[part])

    def test_a_larger_number_goes_on_with_the_last_step(self):
        SETUP.start(self.folder)
        stop = newest_state(self.folder).iteration
        SETUP.go_on(self.folder, early_stopping=4)
        whole = self.folder / "whole"
        SETUP.start(whole, early_stopping=4)
        self.assertGreater(newest_state(whole).iteration, stop)
        for name in ("adapter", "best"):
            found, expected = result(self.folder), result(whole)
            self.assertTrue(found[name] == expected[name])

    def test_accuracy_is_the_measure_of_itself(self):
        setup = Setup(iters=40, early_stopping=1, steps_per_eval=1, val_batches=-1)
        setup.start(self.folder)
        stop, _ = expected_stop(lines_of(self.folder), 1, "val_rewards/accuracies", 1)
        self.assertEqual(newest_state(self.folder).iteration, stop)
        self.assertFalse((self.folder / "best").exists())

    def test_numbers_that_are_not_finite_are_no_gain(self):
        args = SimpleNamespace(
            **{"early_stopping": 2, "load_best": False, "save_best": "loss"},
            **{"adapter_file": "x/y", "iters": 9},
        )
        best = BestAdapter(args)
        nan, inf = math.nan, math.inf
        for it, (loss, since) in enumerate(
            [(nan, 1), (0.5, 0), (nan, 1), (0.4, 0), (0.4, 1), (-inf, 2)]
        ):
            best.judge({"loss": loss}, it, None)
            self.assertEqual((best.held["since"], best.is_past), (since, since == 2))


class TestLoadBest(FolderCase):
    # What training makes better is worse for the pairs the other way round.
    pairs = Pairs([pair([1, 2], [3, 4], [5, 6]), pair([7], [8, 9], [10])])
    turned = Pairs([pair(p, rejected, chosen) for p, chosen, rejected, _ in pairs])

    def train(self, model, **more):
        train(
            *(model, self.pairs, self.turned, optim.Adam(1e-3)),
            adapter_file=f"{self.folder}/{ADAPTER}",
            **{"iters": 4, "steps_per_eval": 1, "steps_per_save": 1},
            **{"save_best": "loss", "load_best": True, **more},
        )

    def test_the_model_is_the_best_one_too(self):
        for dtype in (mx.float32, mx.bfloat16):
            model = tiny_model("lora")
            model.set_dtype(dtype)
            self.train(model)
            best = mx.load(str(numbered(self.folder, 1, "adapters")))
            files = (ADAPTER, f"best/{ADAPTER}")
            for kept in (
                *(mx.load(str(self.folder / name)) for name in files),
                dict(tree_flatten(model.trainable_parameters())),
            ):
                self.assertEqual(kept.keys(), best.keys())
                self.assertTrue(all(mx.array_equal(kept[k], best[k]) for k in best))
                self.assertEqual({x.dtype for x in kept.values()}, {dtype})

    def test_a_best_of_another_run_is_not_taken(self):
        def spoil(model):
            other = {k: x + 1 for k, x in mx.load(str(path)).items()}
            mx.save_safetensors(str(path), other)

        path = self.folder / "best" / ADAPTER
        setup = Setup(iters=6, load_best=True, steps_per_eval=3)
        setup.start(self.folder)
        spoil(path)
        state = newest_state(self.folder)
        out = setup.start(self.folder, state)
        self.assertIn("[WARNING] load_best: ", out)
        last = numbered(self.folder, 6, "adapters")
        self.assertTrue(bits(self.folder / ADAPTER) == bits(last))


class TestCommand(CommandCase):
    def test_a_run_that_stopped_early_says_so_when_it_is_resumed(self):
        every = ("--steps-per-eval", 1, "--save-every", 1, "--early-stopping", 1)
        flags = self.flags("--learning-rate", 1e-2, "--iters", 9, *every)
        out = self.succeed(*flags, "--load-best", "--test")
        stop = max(x["iteration"] for x in metrics_of(self.adapters))
        self.assertIn(f"Stopped early after step {stop} of 9", out)
        self.assertIn(f"{ADAPTER} is the best one: rewards/accuracies", out)
        kept = (self.adapters / ADAPTER).read_bytes()
        out = self.succeed("--resume", self.adapters)
        self.assertIn(f"stopped early after step {stop}: it takes no more", out)
        self.assertEqual((self.adapters / ADAPTER).read_bytes(), kept)
        out = self.succeed("--resume", self.adapters, "--early-stopping", 99)
        self.assertIn(f"Going on after step {stop} of 9", out)
        self.assertEqual(metrics_of(self.adapters)[-1]["iteration"], 9)

    def test_without_validation(self):
        for name in ("early_stopping", "load_best", "save_best"):
            values = {"early_stopping": 1, "load_best": True, "save_best": "loss"}
            with tempfile.TemporaryDirectory() as folder:
                with self.assertRaisesRegex(InputError, f"{name} needs validation"):
                    train(
                        *(tiny_model("lora"), random_pairs(4)),
                        adapter_file=str(Path(folder) / ADAPTER),
                        **{name: values[name]},
                    )


if __name__ == "__main__":
    unittest.main()
