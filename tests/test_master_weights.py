# Copyright © 2026 MLX Contributors

import unittest

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from tiny import random_pairs, tiny_model, weights_of

from mlx_lm.preference.batch.collate import collate_pairs
from mlx_lm.preference.forward.frozen import FrozenStart
from mlx_lm.preference.policy.masters import (
    JoinedWeights,
    MasterWeights,
    with_master_weights,
)
from mlx_lm.tuner.trainer import dpo_step


class TestMasterWeights(unittest.TestCase):
    def layer(self, dtype):
        layer = nn.Linear(4, 4, bias=False)
        layer.weight = mx.full((4, 4), 0.02, dtype=dtype)
        return layer

    def test_small_adam_steps_add_up(self):
        # Float64 Adam, written out: 100 steps of 1e-6 along a constant gradient.
        weight, m, v = 0.02, 0.0, 0.0
        for _ in range(100):
            m, v = 0.9 * m + 0.1 * 0.5, 0.999 * v + 0.001 * 0.25
            weight -= 1e-6 * m / (np.sqrt(v) + 1e-8)
        for dtype in (mx.bfloat16, mx.float16):
            with self.subTest(dtype=dtype):
                layer = self.layer(dtype)
                start = layer.weight[0, 0].item()
                expected = start + weight - 0.02
                optimizer = with_master_weights(optim.Adam(1e-6), layer)
                for _ in range(100):
                    optimizer.update(layer, {"weight": mx.full((4, 4), 0.5, dtype)})
                master = optimizer.state["weights"]["weight"]
                self.assertEqual(master.dtype, mx.float32)
                np.testing.assert_allclose(master, expected, rtol=1e-6)
                self.assertEqual(layer.weight.dtype, dtype)
                rounded = mx.array(expected).astype(dtype).item()
                self.assertEqual(layer.weight[0, 0].item(), rounded)

    def test_without_them_nothing_moves(self):
        layer = self.layer(mx.bfloat16)
        optimizer = optim.Adam(1e-6)
        for _ in range(100):
            optimizer.update(layer, {"weight": mx.full((4, 4), 0.5, mx.bfloat16)})
        self.assertEqual(
            layer.weight[0, 0].item(), self.layer(mx.bfloat16).weight[0, 0]
        )

    def test_float32_needs_none(self):
        layer, optimizer = self.layer(mx.float32), optim.Adam(1e-6)
        self.assertIs(with_master_weights(optimizer, layer), optimizer)
        wrapped = MasterWeights(optimizer, layer)
        self.assertAlmostEqual(wrapped.learning_rate.item(), 1e-6)


class TestJoinedWeights(unittest.TestCase):
    def run_steps(self, make, join, bad=False):
        """Five steps of dpo_step; the weights after it, and the last norm."""
        model = tiny_model("lora")
        start = FrozenStart(model)
        optimizer = with_master_weights(make(), model, join)
        self.assertEqual(isinstance(optimizer, JoinedWeights), join)
        batch = collate_pairs(random_pairs(4))
        if bad:
            batch["reference_logps"] = mx.full((8,), mx.nan)
            start = None
        for _ in range(5):
            _, metrics = dpo_step(model, start, batch, optimizer, max_grad_norm=1.0)
        return weights_of(model), metrics["grad_norm"].item()

    def test_the_same_numbers_as_array_by_array(self):
        for make in (
            lambda: optim.Adam(1e-2),
            lambda: optim.AdamW(1e-2, weight_decay=0.1),
            lambda: optim.SGD(0.1, momentum=0.9),
        ):
            (ours, norm), (plain, plain_norm) = (
                self.run_steps(make, join) for join in (True, False)
            )
            self.assertAlmostEqual(norm / plain_norm, 1, places=4)
            for name, x in plain.items():
                np.testing.assert_allclose(ours[name], x, rtol=1e-4, atol=5e-5)

    def test_a_step_that_is_not_finite_changes_nothing(self):
        before = weights_of(tiny_model("lora"))
        after, _ = self.run_steps(lambda: optim.Adam(1e-2), True, bad=True)
        for name, x in before.items():
            np.testing.assert_array_equal(after[name], x)

    def test_arrays_begin_where_products_want_them(self):
        model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
        optimizer = with_master_weights(optim.SGD(1.0), model, join=True)
        self.assertEqual(optimizer.state["weights"]["joined"].size, 4 * 64)
        before = weights_of(model)
        optimizer.write(model)
        for name, x in weights_of(model).items():
            np.testing.assert_array_equal(x, before[name])

    def test_what_is_not_joined(self):
        model = tiny_model("lora")
        for optimizer in (optim.Muon(1e-2), optim.Adafactor(1e-2)):
            self.assertIs(with_master_weights(optimizer, model, True), optimizer)
        layer = nn.Linear(2, 2)
        layer.set_dtype(mx.bfloat16)
        wrapped = with_master_weights(optim.SGD(1.0), layer, True)
        self.assertIsInstance(wrapped, MasterWeights)


if __name__ == "__main__":
    unittest.main()
