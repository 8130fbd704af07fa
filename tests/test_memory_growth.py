# Copyright © 2026 MLX Contributors

import gc
import unittest
from unittest import mock

import mlx.core as mx
from tiny import random_pairs, tiny_model, train

from mlx_lm.preference.forward.frozen import FrozenStart
from mlx_lm.preference.run.loop import PreferenceRun
from mlx_lm.tuner.trainer import evaluate_dpo

# Batches are not all of one length. Two dozen numbers a step that are never let go
# would be more than this.
SLACK = 8192


class TestNoGrowth(unittest.TestCase):
    """Active memory is flat after the first epoch."""

    def check(self, sizes, warm_up):
        self.assertGreaterEqual(len(sizes), 300)
        first = max(sizes[:warm_up])
        for start in range(warm_up, len(sizes), 50):
            self.assertLessEqual(max(sizes[start : start + 50]), first + SLACK)

    def measured(self, method, sizes):
        original = getattr(PreferenceRun, method)

        def function(*args):
            result = original(*args)
            gc.collect(0)
            # A batch that is still computed holds more, for as long as it takes.
            mx.synchronize()
            sizes.append(mx.get_active_memory())
            return result

        return mock.patch.object(PreferenceRun, method, function)

    def test_steps(self):
        pairs = random_pairs(20)
        for more in ({}, {"grad_accumulation_steps": 3, "grad_checkpoint": True}):
            sizes = []
            with self.subTest(**more), self.measured("_after_step", sizes):
                train(
                    tiny_model("lora", dropout=0.1),
                    pairs,
                    iters=300,
                    **{"max_grad_norm": 1.0, "steps_per_report": 50, **more},
                )
                self.check(sizes, 50)

    def test_validations(self):
        sizes = []
        with self.measured("_score_batch", sizes):
            train(
                tiny_model("lora"),
                random_pairs(8),
                random_pairs(60, seed=1),
                **{"iters": 10, "steps_per_eval": 1, "val_batches": -1},
            )
        self.check(sizes, 90)

    def test_evaluation(self):
        model, sizes = tiny_model("lora"), []
        reference = FrozenStart(model)
        evaluate_dpo(
            *(model, reference, random_pairs(620), 2),
            progress_callback=lambda: sizes.append(mx.get_active_memory()),
        )
        self.check(sizes, 60)


if __name__ == "__main__":
    unittest.main()
