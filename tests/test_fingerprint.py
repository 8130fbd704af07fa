# Copyright © 2026 MLX Contributors

import unittest
from types import SimpleNamespace
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tiny import LORA, tiny_model

from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.preference.digest import digest
from mlx_lm.preference.forward.recompute import keyed_layers
from mlx_lm.preference.reference.fingerprint import model_fingerprint
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers


class Holder(nn.Module):
    """A module around one array, or one layer."""

    def __init__(self, value):
        super().__init__()
        self.value = value


def print_of(value):
    return model_fingerprint(Holder(value))


def adapted(layer=None, **settings):
    mx.random.seed(settings.pop("seed", 0))
    cls = settings.pop("cls", LoRALinear)
    return cls.from_base(layer or base_layer(), **settings)


def base_layer():
    mx.random.seed(5)
    return nn.Linear(8, 6)


# Sums are tested where a few numbers show that each counts.
@mock.patch("mlx_lm.preference.digest.SMALL_BYTES", 0)
class TestModelFingerprint(unittest.TestCase):
    def test_every_element_counts(self):
        # 8 * 2**16 words are one step of the device, 2**16 words one checksum.
        big = 2 * 8 * 2**16 * 8 + 3
        for dtype, size in [
            (mx.float32, 5),
            (mx.bfloat16, 7),
            (mx.uint8, 1),
            (mx.bool_, 3),
            (mx.int64, 4),
            (mx.complex64, 3),
            (mx.uint8, big),
            (mx.bfloat16, 2**18 + 1),
        ]:
            x = mx.zeros((size,), dtype=dtype)
            seen = {print_of(x)}
            places = sorted({0, size // 2, size - 1, min(size - 1, 2**19)})
            for i in places:
                y = mx.array(x)
                y[i] = mx.array(1, dtype=dtype)
                seen.add(print_of(y))
            with self.subTest(dtype=dtype, size=size):
                self.assertEqual(len(seen), 1 + len(places))

    def test_every_bit_counts(self):
        bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
        words = np.random.default_rng(0).integers(0, 2**32, 3, dtype=np.uint32)
        seen = {print_of(mx.array(words))}
        for i in range(3):
            for bit in bits:
                changed = words.copy()
                changed[i] ^= bit
                seen.add(print_of(mx.array(changed)))
        self.assertEqual(len(seen), 1 + 3 * 32)

    def test_changes_that_sums_of_odd_multiples_would_miss(self):
        x = mx.random.normal((64, 32))
        flipped = mx.array(x)
        flipped[3] = -flipped[3]
        # Top bits of an even number of 64-bit words.
        tops = x * mx.array([1, -1] * 16)
        turned = [x[::-1], x[:, ::-1], x.T, x.reshape(32, 64)]
        changes = [x, -x, 2 * x, flipped, tops, *turned]
        self.assertEqual(len({print_of(v) for v in changes}), len(changes))

    def test_layout_in_memory_does_not_count(self):
        x = mx.arange(60).astype(mx.float16)
        for view in (x[1:], x[3:55], x.reshape(6, 10).T, x[::-1], x[::2]):
            copy = mx.array(np.array(view))
            self.assertEqual(print_of(view), print_of(copy))

    def test_type_shape_and_place_count(self):
        zeros = mx.zeros((4, 2))
        kinds = [zeros, mx.zeros((2, 4)), mx.zeros((8,)), mx.zeros((0, 4))]
        kinds += [zeros.astype(mx.float16), zeros.astype(mx.int32)]
        kinds += [{"a": zeros}, {"b": zeros}, [zeros], [zeros, zeros]]
        self.assertEqual(len({print_of(v) for v in kinds}), len(kinds))

    def test_steps_do_not_count(self):
        x = mx.random.normal((2**21 + 11,))
        name = digest(x)
        with mock.patch.object(mx, "default_device", return_value=mx.gpu):
            self.assertEqual(digest(x), name)

    def test_memory_does_not_grow_with_the_tensor(self):
        x = mx.zeros((2**25,), dtype=mx.uint8)
        print_of(mx.zeros((2**22,), dtype=mx.uint8))
        mx.eval(x)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        print_of(x)
        self.assertLess(mx.get_peak_memory() - before, 2**25)

    def test_settings_of_the_model_count(self):
        seen = [
            model_fingerprint(tiny_model(**config))
            for config in (
                {},
                {"rope_theta": 1e6},
                {"rms_norm_eps": 1e-6},
                {"rope_traditional": True},
                {"rope_scaling": {"type": "linear", "factor": 2.0}},
                {"seed": 1},
            )
        ]
        self.assertEqual(len(set(seen)), len(seen))

    def test_quantization_counts(self):
        seen = {model_fingerprint(tiny_model())}
        for settings in (
            {"bits": 4, "group_size": 32},
            {"bits": 8, "group_size": 32},
            {"bits": 4, "group_size": 16, "mode": "nvfp4"},
            {"bits": 4, "group_size": 32, "mode": "mxfp4"},
        ):
            model = tiny_model()
            nn.quantize(model, **settings)
            seen.add(model_fingerprint(model))
        self.assertEqual(len(seen), 5)
        # The same arrays, read in another way.
        layer = nn.QuantizedLinear(64, 8, bits=4, group_size=32)
        before = print_of(layer)
        layer.bits = 8
        self.assertNotEqual(print_of(layer), before)

    def test_where_it_runs_counts(self):
        x = mx.ones((3,))
        seen = {print_of(x)}
        with mock.patch.object(mx, "__version__", "0"):
            seen.add(print_of(x))
        with mock.patch.object(mx, "default_device", return_value=mx.gpu):
            seen.add(print_of(x))
            with mock.patch.object(mx.metal, "is_available", return_value=True):
                seen.add(print_of(x))
        self.assertEqual(len(seen), 4)

    def test_states_that_compute_the_same_are_one(self):
        model = tiny_model()
        expected = model_fingerprint(model)
        model(mx.array([[1, 2]]))
        self.assertEqual(model_fingerprint(model), expected)
        model.train()
        self.assertEqual(model_fingerprint(model), expected)
        model.unfreeze()
        self.assertEqual(model_fingerprint(model), expected)
        with keyed_layers(model, checkpoint=True):
            self.assertEqual(model_fingerprint(model), expected)

    def test_fresh_adapters_are_their_base(self):
        expected = model_fingerprint(tiny_model())
        for kind, layers, settings in [
            ("lora", 2, {"rank": 4}),
            ("lora", 3, {"rank": 8}),
            ("lora", 2, {"scale": 1.0}),
            ("lora", 2, {"dropout": 0.3}),
            ("lora", 2, {"keys": ["self_attn.q_proj", "model.embed_tokens"]}),
            ("dora", 1, {"rank": 4}),
            ("dora", 3, {"rank": 8, "dropout": 0.3}),
            ("dora", 2, {"keys": ["mlp.up_proj", "model.embed_tokens"]}),
        ]:
            for seed in (1, 2):
                model = tiny_model()
                mx.random.seed(seed)
                linear_to_lora_layers(
                    model, layers, LORA | settings, use_dora=kind == "dora"
                )
                with self.subTest(kind=kind, settings=settings, seed=seed):
                    self.assertEqual(model_fingerprint(model), expected)
                    with keyed_layers(model, checkpoint=False):
                        self.assertEqual(model_fingerprint(model), expected)

    def test_fresh_adapters_of_other_layers(self):
        quantized = nn.QuantizedLinear(64, 8, bits=4, group_size=32)
        embedding = nn.Embedding(7, 4)
        for cls, base in [
            (LoRALinear, quantized),
            (DoRALinear, quantized),
            (LoRAEmbedding, embedding),
            (DoRAEmbedding, embedding),
            (LoRASwitchLinear, SwitchLinear(8, 4, 3)),
        ]:
            with self.subTest(cls=cls.__name__):
                layer = adapted(base, cls=cls)
                self.assertEqual(print_of(layer), print_of(base))
                layer.lora_b = mx.array(layer.lora_b)
                layer.lora_b[(0,) * layer.lora_b.ndim] = 1e-30
                self.assertNotEqual(print_of(layer), print_of(base))

    def test_a_trained_adapter_counts_with_all_it_has(self):
        def trained(dropout=0.0, **changes):
            layer = adapted(r=2, scale=10.0, dropout=dropout)
            layer.lora_b = mx.ones_like(layer.lora_b)
            for name, value in changes.items():
                setattr(layer, name, value)
            return print_of(layer)

        a = adapted(r=2, scale=10.0).lora_a
        kinds = [
            print_of(base_layer()),
            trained(),
            trained(scale=11.0),
            trained(lora_a=a + 1),
            trained(lora_b=mx.ones((2, 6)) * 2),
            trained(linear=nn.Linear(8, 6)),
        ]
        self.assertEqual(len(set(kinds)), len(kinds))
        self.assertEqual(trained(dropout=0.5), trained())

    def test_a_magnitude_that_was_trained_counts(self):
        layer = adapted(cls=DoRALinear)
        layer.m = layer.m * 1.001
        self.assertNotEqual(print_of(layer), print_of(base_layer()))

    def test_a_magnitude_that_was_rounded_counts(self):
        # The layer divides by a norm in float32: it is not quite its base.
        mx.random.seed(0)
        embedding = nn.Embedding(7, 16)
        embedding.weight = embedding.weight.astype(mx.bfloat16)
        layer = adapted(embedding, cls=DoRAEmbedding)
        self.assertFalse(mx.array_equal(layer(mx.arange(7)), embedding.weight).item())
        self.assertNotEqual(print_of(layer), print_of(embedding))


class TestDigest(unittest.TestCase):
    def test_what_differs_has_another_name(self):
        array = np.arange(4, dtype=np.int32)
        values = [
            *(None, True, 1, 1.0, "1", b"1", "a", b"a", "", [], {}, set(), [[]], [""]),
            *(["a", "b"], ["ab"], ["a", ["b"]], [["a"], "b"], ["a:1", "b"], [1, 2]),
            *({"a": 1}, {"a": "1"}, {"b": 1}, {"a": {"b": 1}}, {"a": 1, "b": 1}),
            *({"x", "y"}, ["x", "y"], SimpleNamespace(a=1), float("nan")),
            *(array, array[::-1], array.astype(np.int64), array.reshape(2, 2)),
            *(mx.array(array), mx.float32, mx.float16, nn.silu, nn.gelu, object()),
        ]
        self.assertEqual(len(set(map(digest, values))), len(values))
        self.assertNotEqual(digest("a", "b"), digest("ab"))

    def test_what_is_alike_has_one_name(self):
        for one, two in [
            ({"b": 1, "a": (None, True)}, {"a": [None, True], "b": 1}),
            ({"x", "y"}, frozenset({"y", "x"})),
            (np.float32(0.5), 0.5),
            (object(), object()),
            (iter([1, 2]), [1, 2]),
            (np.arange(6)[::2], np.array([0, 2, 4])),
            ({1: "a"}, {"1": "a"}),
        ]:
            self.assertEqual(digest(one), digest(two))


if __name__ == "__main__":
    unittest.main()
