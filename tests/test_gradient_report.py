# Copyright © 2026 MLX Contributors

import math
import unittest

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from tiny import Recorder, random_pairs, tiny_model, train, weights_of

from mlx_lm.preference.measure.window import gradient_report


class TestGradientReport(unittest.TestCase):
    def test_numbers_by_hand(self):
        gradients = {"a": {"x": mx.array([0.0, -3.0]), "y": mx.array([[4.0, 0.0]])}}
        before = {"a": {"x": mx.array([1.0, 0.0]), "y": mx.array([[0.0, 0.0]])}}
        after = {"a": {"x": mx.array([1.0, 0.3]), "y": mx.array([[-0.4, 0.0]])}}
        (row,) = gradient_report(gradients, before, after).values()
        expected = {"norm": 5, "largest": 4, "median": 1.5, "zeros": 0.5}
        for key, value in expected.items():
            self.assertAlmostEqual(row[key], value)
        self.assertAlmostEqual(row["update_ratio"], 0.5, places=6)
        self.assertAlmostEqual(row["p99"], np.percentile([0, 3, 4, 0], 99))

    def test_a_run_reports_every_module(self):
        model, recorder = tiny_model("lora"), Recorder()
        start = weights_of(model)
        train(
            model,
            random_pairs(4),
            optimizer=optim.SGD(0.5),
            callback=recorder,
            iters=2,
            steps_per_report=1,
            max_grad_norm=None,
            debug_gradients=True,
        )
        for info in recorder.train:
            modules = info["gradients"]
            self.assertEqual(set(modules), {name.rpartition(".")[0] for name in start})
            total = math.sqrt(sum(m["norm"] ** 2 for m in modules.values()))
            self.assertAlmostEqual(total, info["grad_norm"], places=5)
        # A fresh adapter's first matrix has no gradient, its second one has.
        first = recorder.train[0]["gradients"]
        self.assertTrue(all(m["zeros"] >= 0.2 for m in first.values()))
        self.assertGreater(max(m["update_ratio"] for m in first.values()), 0)

    def test_without_the_flag_nothing_is_added(self):
        recorder = Recorder()
        train(tiny_model("lora"), random_pairs(4), callback=recorder, iters=1)
        self.assertNotIn("gradients", recorder.train[0])


if __name__ == "__main__":
    unittest.main()
