# Copyright © 2026 MLX Contributors

"""Layers that keep less for the gradient: the same numbers, less memory."""

import inspect
import re
import sys
import unittest
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import model_zoo as zoo
from mlx.utils import tree_flatten, tree_map
from tiny import random_pairs, tiny_model, train

from mlx_lm.preference.forward.recompute import lean_layers, low_rank
from mlx_lm.preference.memory.predict import predict_peak
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.utils import linear_to_lora_layers


def adapted_model(dtype, kind="lora", dropout=0.0, **config):
    """A small Llama whose adapters do something."""
    model = tiny_model(None, **config)
    model.set_dtype(dtype)
    settings = {"rank": 2, "scale": 2.0, "dropout": dropout}
    linear_to_lora_layers(model, 8, settings, use_dora=kind == "dora")
    noise = lambda x: mx.random.normal(x.shape) * 0.1
    model.update(tree_map(noise, model.trainable_parameters()))
    return model.train()


def loss(model, tokens):
    mx.random.seed(7)
    return model(tokens).astype(mx.float32).square().mean()


class TestLeanLayers(unittest.TestCase):
    def setUp(self):
        self.tokens = mx.random.randint(0, 30, (2, 9), key=mx.random.key(1))

    def gradient(self, model):
        value, gradient = nn.value_and_grad(model, loss)(model, self.tokens)
        mx.eval(value, gradient)
        return [value, *(x for _, x in tree_flatten(gradient))]

    def test_values_and_gradients_stay_the_same(self):
        for dtype in (mx.bfloat16, mx.float16, mx.float32):
            for more in ({}, {"dropout": 0.3}, {"kind": "dora"}):
                model = adapted_model(dtype, **more)
                plain = self.gradient(model)
                with lean_layers(model):
                    lean = self.gradient(model)
                for x, y in zip(plain, lean):
                    self.assertTrue(mx.array_equal(x, y), (dtype, more))

    def test_the_gradient_is_that_of_float64(self):
        key = mx.random.split(mx.random.key(3), 2)
        x = mx.random.normal((2, 3, 8), key=key[0]).astype(mx.bfloat16)
        a = mx.random.normal((8, 2), key=key[1])
        weights = mx.arange(12).reshape(2, 3, 2) / 12
        f = lambda x, a: (low_rank(x, a) * weights).sum()
        dx, da = mx.grad(f, (0, 1))(x, a)
        with mx.stream(mx.cpu):
            wide = lambda x: x.astype(mx.float64)
            expected = wide(x).reshape(6, 8).T @ wide(weights).reshape(6, 2)
            self.assertLess(mx.abs(wide(da) - expected).max().item(), 1e-5)
            expected = wide(weights) @ wide(a).T
            self.assertLess(mx.abs(wide(dx) - expected).max().item(), 2e-2)
        self.assertEqual((dx.dtype, da.dtype), (mx.bfloat16, mx.float32))

    def test_a_step_needs_less_memory(self):
        tokens = mx.zeros((16, 8), mx.int32)
        sizes = {"intermediate_size": 256, "num_hidden_layers": 8}
        for dtype, share in ((mx.bfloat16, 0.7), (mx.float32, 0.8)):
            model = adapted_model(dtype, **sizes)

            def step(tokens):
                return nn.value_and_grad(model, loss)(model, tokens)

            plain = predict_peak(step, (tokens,), [model]).activations
            with lean_layers(model):
                lean = predict_peak(step, (tokens,), [model]).activations
            self.assertLess(lean / plain, share)

    def test_every_gated_layer_is_lean(self):
        tokens = mx.zeros((1, 3), mx.int32)
        for name in ("llama", "mamba", "jamba", "qwen2_moe"):
            model = zoo.build(name)
            gated = sum(
                bool(re.search(r"\bswiglu\(", inspect.getsource(type(m))))
                for m in model.modules()
            )
            with (
                mock.patch("mlx.core.checkpoint", wraps=mx.checkpoint) as lean,
                lean_layers(model),
            ):
                model(tokens)
            self.assertGreater(gated, 1)
            self.assertEqual(lean.call_count, gated, name)

    def test_everything_is_put_back(self):
        model = adapted_model(mx.bfloat16)
        classes = [type(m) for m in model.modules()]
        with self.assertRaises(KeyError), lean_layers(model):
            self.assertNotEqual([type(m) for m in model.modules()], classes)
            raise KeyError
        self.assertEqual([type(m) for m in model.modules()], classes)


def everything_of_others():
    """What upstream's and MLX's modules hold, and what the classes in them hold."""
    found = {}
    for name, module in [*sys.modules.items()]:
        if name.split(".")[0] in ("mlx", "mlx_lm") and "preference" not in name:
            for key, value in [*vars(module).items()]:
                found[name, key] = value
                if isinstance(value, type):
                    found |= {(name, key, k): v for k, v in vars(value).items()}
    return found


class TestOtherModels(unittest.TestCase):
    def test_a_callback_of_a_run_sees_upstream_as_it_is(self):
        other = tiny_model("lora", dropout=0.1)
        classes = [type(m) for m in other.modules()]
        before, seen = everything_of_others(), []

        class Look(TrainingCallback):
            def on_train_loss_report(self, train_info):
                now = everything_of_others()
                seen.append([k for k in before if now.get(k) is not before[k]])
                seen.append([type(m) for m in other.modules()] != classes)

            def on_val_loss_report(self, val_info):
                self.on_train_loss_report(val_info)

        model, pairs = tiny_model("lora", dropout=0.1), random_pairs(4)
        train(model, pairs, pairs, callback=Look(), iters=1, grad_checkpoint=True)
        self.assertEqual(seen, [[], False] * 3)


if __name__ == "__main__":
    unittest.main()
