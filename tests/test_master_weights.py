# Copyright © 2026 MLX Contributors

import unittest
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map
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
        self.assertEqual(optimizer.state["weights"]["joined"].size, 4 * 128)
        before = weights_of(model)
        optimizer.write(model)
        for name, x in weights_of(model).items():
            np.testing.assert_array_equal(x, before[name])

    def low_model(self, dtype=mx.bfloat16, kind="lora"):
        """Weights of 16 bits, and adapters of 32 that are not zero."""
        model = tiny_model(kind)
        key = iter(mx.random.split(mx.random.key(1), 200))
        noisy = lambda x: x + 0.05 * mx.random.normal(x.shape, key=next(key))
        trained = tree_map(noisy, model.trainable_parameters())
        model.set_dtype(dtype)
        model.update(trained)
        return model

    def one_step(self, model, join, rate=1.0):
        """What dpo_step calls adapters with, and how far its step goes."""
        before, seen = weights_of(model), set()

        def call(module, x):
            seen.add((x.dtype, module.lora_a.dtype, module.lora_b.dtype))
            return original(module, x)

        cls = next(type(m) for m in model.modules() if "lora_a" in m)
        original = cls.__call__
        optimizer = with_master_weights(optim.SGD(rate), model, join)
        batch = collate_pairs(random_pairs(4))
        batch["reference_logps"] = mx.zeros((8,))
        with mock.patch.object(cls, "__call__", call):
            for _ in range(3):
                dpo_step(model, None, batch, optimizer)
        after = weights_of(model)
        self.assertEqual({x.dtype for x in after.values()}, {np.dtype("float32")})
        return seen, {k: after[k] - x for k, x in before.items()}

    def test_bfloat16_adapters_multiply_in_bfloat16(self):
        def off(step):
            """How far a step is off the one of the same weights in float32."""
            total = sum(np.linalg.norm(step[k] - x) ** 2 for k, x in exact.items())
            return (
                total**0.5 / sum(np.linalg.norm(x) ** 2 for x in exact.values()) ** 0.5
            )

        model = self.low_model()
        trained = model.trainable_parameters()
        model.set_dtype(mx.float32)
        model.update(trained)
        # Small enough to be a gradient, and too small for a weight of 16 bits.
        _, exact = self.one_step(model, False, rate=1e-4)
        ours, moved = self.one_step(self.low_model(), True, rate=1e-4)
        plain, others = self.one_step(self.low_model(), False, rate=1e-4)
        self.assertEqual(ours, {(mx.bfloat16,) * 3})
        self.assertEqual(plain, {(mx.bfloat16, mx.float32, mx.float32)})
        self.assertLess(off(moved), 1.5 * off(others))
        self.assertLess(off(moved), 0.03)

    def test_what_is_not_rounded(self):
        for dtype, kind in (
            (mx.float16, "lora"),
            (mx.float32, "lora"),
            (mx.bfloat16, "dora"),
        ):
            seen, _ = self.one_step(self.low_model(dtype, kind), True)
            self.assertEqual(seen, {(dtype, mx.float32, mx.float32)})

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
