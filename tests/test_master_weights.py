# Copyright © 2026 MLX Contributors

import unittest

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_lm.preference.policy.optimizer import MasterWeights, with_master_weights


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


if __name__ == "__main__":
    unittest.main()
