# Copyright © 2026 MLX Contributors

"""The check of shared prompts, in every precision: what it accepts and refuses."""

import unittest
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import model_zoo as zoo

from mlx_lm.preference.forward import caches, probe
from mlx_lm.preference.forward.caches import PromptKeysValues, PromptState
from mlx_lm.preference.forward.parts import calls_replaced
from mlx_lm.preference.forward.probe import check_sharing

# Families that float32 finds ragged: plain, windows, other norms and positions,
# recurrent states, and experts, which the CPU computes in float32 alone.
ATTENTION = ("llama", "qwen3", "cohere2", "gemma3_text")
STATES = ("mamba2", "falcon_h1", "lfm2")
EXPERTS = ("qwen3_moe", "deepseek_v3", "gpt_oss")
KINDS = ("float32", "bfloat16", "float16", "4 bits", "8 bits")


def built(name, kind, seed=0):
    model = zoo.build(name, seed)
    if kind.endswith("bits"):
        # As such models are kept: scales of 16 bits.
        model.set_dtype(mx.bfloat16 if name not in EXPERTS else mx.float32)
        whole = lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0
        nn.quantize(model, 32, int(kind[0]), class_predicate=whole)
    else:
        model.set_dtype(getattr(mx, kind))
    return model


def rounded_otherwise(model):
    """What kernels for other shapes do to 16 bits: the last of them differs."""

    def call(original, x):
        y = original(x)
        if y.dtype == mx.float32:
            return y
        last = mx.random.randint(-1, 2, y.shape) * (mx.finfo(y.dtype).eps / 2)
        return (y * (1 + last)).astype(y.dtype)

    linears = (nn.Linear, nn.QuantizedLinear)
    return calls_replaced((m, call) for m in model.modules() if isinstance(m, linears))


def _mask(change):
    def make_mask(self, N, return_array=False, window_size=None):
        return change(self, N, window_size or self.window)

    return mock.patch.object(PromptKeysValues, "make_mask", make_mask)


def _array(cache, N, window):
    """The right mask as an array, window or not."""
    if isinstance(cache.offset, mx.array):
        return cache._ragged_mask(N, window)
    return caches.create_causal_mask(N, cache._width, window_size=window)


def _fork(change):
    real = PromptKeysValues.fork

    def fork(self, width, lengths):
        real(self, width, lengths)
        change(self)

    return mock.patch.object(PromptKeysValues, "fork", fork)


def _sees_padding(cache, N, window):
    return caches.create_causal_mask(N, cache._width, window_size=window)


def _one_too_few(cache, N, window):
    mask = _array(cache, N, window)
    return mask & (mx.arange(mask.shape[-1]) != 0)


def _one_too_many(cache, N, window):
    mask = _array(cache, N, window)
    return mask | (
        mx.arange(mask.shape[-1]) == mx.arange(N)[:, None] + 1 + cache._width
    )


def _other_rows(self, width, lengths):
    self.forked, self.lengths = True, None
    # The rejected rows go on from where another pair's prompt ended.
    self.cache = [mx.concatenate([x, x[::-1]]) for x in self.cache if x is not None]


def _other_prompts(cache):
    """Let one rejected row read the prompt of another pair."""
    cache.update_and_fetch = lambda keys, values: (
        mx.concatenate([mx.concatenate([cache.keys, cache.keys[::-1]]), keys], axis=2),
        mx.concatenate([mx.concatenate([cache.values] * 2), values], axis=2),
    )


def _move(cache):
    cache.offset = cache.offset + 1


# What is wrong, and the best grade that is left: one prompt for all has no padding.
FAULTS = {
    "padding attended": (lambda: _mask(_sees_padding), "equal"),
    "one key too few": (lambda: _mask(_one_too_few), "plain"),
    "one key too many": (lambda: _mask(_one_too_many), "plain"),
    "a position off by one": (lambda: _fork(_move), "plain"),
    "another pair's prompt": (lambda: _fork(_other_prompts), "plain"),
}


class TestEveryPrecision(unittest.TestCase):
    def test_accepts_what_float32_accepts(self):
        for kind in KINDS:
            exact = kind in ("float32", "4 bits", "8 bits")
            for name in ATTENTION + STATES + (EXPERTS if exact else ()):
                for seed in (0, 1):
                    model = built(name, kind, seed)
                    with self.subTest(kind=kind, name=name, seed=seed):
                        self.assertEqual(check_sharing(model).grade, "ragged")

    def test_accepts_what_rounds_otherwise(self):
        for kind in ("bfloat16", "float16", "4 bits"):
            for name in ("llama", "qwen3", "mamba2"):
                for seed in (0, 1, 2):
                    model = built(name, kind, seed)
                    mx.random.seed(seed)
                    with self.subTest(kind=kind, name=name, seed=seed):
                        with rounded_otherwise(model):
                            self.assertEqual(check_sharing(model).grade, "ragged")

    def test_refuses_faults(self):
        for what, (fault, left) in FAULTS.items():
            for kind in KINDS:
                for name, seed in (("llama", 0), ("qwen3", 1)):
                    model = built(name, kind, seed)
                    with self.subTest(what=what, kind=kind, name=name), fault():
                        self.assertEqual(check_sharing(model).grade, left)

    def test_refuses_a_forgotten_window(self):
        real = PromptKeysValues.make_mask

        def forget(self, N, return_array=False, window_size=None):
            window, self.window = self.window, None
            try:
                return real(self, N, return_array, None)
            finally:
                self.window = window

        for kind in KINDS:
            model = built("cohere2", kind)
            with mock.patch.object(PromptKeysValues, "make_mask", forget):
                with self.subTest(kind=kind):
                    self.assertEqual(check_sharing(model).grade, "plain")

    def test_refuses_a_state_of_another_row(self):
        for kind in KINDS:
            model = built("mamba2", kind)
            with mock.patch.object(PromptState, "fork", _other_rows):
                with self.subTest(kind=kind):
                    self.assertEqual(check_sharing(model).grade, "plain")

    def test_own_numbers_that_are_far_off_count(self):
        """A kernel that reads a mask otherwise in 16 bits alone."""
        real = PromptKeysValues.keys_and_values

        def zeros(self):
            keys, values = real(self)
            is_wrong = self.forked and keys.dtype != mx.float32
            return keys, mx.zeros_like(values) if is_wrong else values

        for kind, grade in (("bfloat16", "plain"), ("float32", "ragged")):
            with mock.patch.object(PromptKeysValues, "keys_and_values", zeros):
                model = built("llama", kind)
                self.assertEqual(check_sharing(model).grade, grade)

    def test_flat_and_masked_logits(self):
        class Masked(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = built("llama", "bfloat16")

            @property
            def layers(self):
                return self.inner.layers

            def __call__(self, tokens, cache=None):
                logits = self.inner(tokens, cache=cache)
                return mx.where(mx.arange(logits.shape[-1]) < 64, logits, -mx.inf)

        self.assertEqual(check_sharing(Masked()).grade, "ragged")
        flat = built("llama", "bfloat16")
        flat.lm_head.weight = mx.zeros_like(flat.lm_head.weight)
        self.assertEqual(check_sharing(flat).grade, "ragged")

    def test_the_bound_grows_with_depth_alone(self):
        pairs = probe._probe_pairs(64)
        model = built("llama", "float32")
        before = probe._expected(model, pairs).rounding.mean()
        model.model.layers = model.model.layers * 4
        after = probe._expected(model, pairs).rounding.mean()
        self.assertAlmostEqual(after / before, 2, delta=0.4)


if __name__ == "__main__":
    unittest.main()
