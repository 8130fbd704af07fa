# Copyright © 2026 MLX Contributors

"""What sharing is made of: the check, a model's parts, caches and their masks."""

import unittest
from types import SimpleNamespace
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import model_zoo as zoo
import numpy as np
from test_shared_prompt import (
    PAIRS,
    RAGGED,
    distance,
    gradients,
    shared_gradients,
    whole_logps,
)
from tiny import tiny_model

from mlx_lm.models.cache import CacheList, make_prompt_cache
from mlx_lm.preference.batch.collate import collate_pairs
from mlx_lm.preference.batch.shape import BatchShape
from mlx_lm.preference.forward.caches import (
    PromptKeysValues,
    PromptState,
    leaves,
    prompt_caches,
)
from mlx_lm.preference.forward.parts import (
    RUN_WHOLE,
    calls_replaced,
    find_trunk,
    head_logits,
    trunk_states,
)
from mlx_lm.preference.forward.probe import Sharing, check_sharing
from mlx_lm.preference.forward.shared import shared_states
from mlx_lm.preference.forward.states import plain_states
from mlx_lm.preference.run.layouts import find_sharing


class TestCheck(unittest.TestCase):
    def test_numbers_that_differ_are_noticed(self):
        class Off(PromptKeysValues):
            def update_and_fetch(self, keys, values):
                keys, values = super().update_and_fetch(keys, values)
                return (keys, 1.01 * values) if self.forked else (keys, values)

        model = tiny_model()
        self.assertEqual(check_sharing(model), Sharing("ragged", ""))
        with mock.patch("mlx_lm.preference.forward.caches.PromptKeysValues", Off):
            sharing = check_sharing(model)
        self.assertEqual(sharing.grade, "plain")
        self.assertRegex(sharing.notice, r"\AThis model can't share prompts: .*\.\Z")

    def test_ragged_prompts_that_fail_leave_equal_ones(self):
        class OneOffset(PromptKeysValues):
            def fork(self, width, lengths):
                super().fork(width, None)

        with mock.patch("mlx_lm.preference.forward.caches.PromptKeysValues", OneOffset):
            self.assertEqual(check_sharing(tiny_model()).grade, "equal")

    def test_a_model_that_is_no_sum_of_its_parts_runs_whole(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = tiny_model()

            @property
            def layers(self):
                return self.inner.layers

            def __call__(self, tokens, cache=None):
                # The head asks for more than hidden states.
                bias = mx.eye(64)[tokens] * (1 + mx.arange(tokens.shape[1])[:, None])
                return self.inner(tokens, cache=cache) + bias

        model = Model()
        sharing = check_sharing(model)
        self.assertEqual(sharing.grade, "plain")
        self.assertIn("runs whole", sharing.notice)
        self.assertTrue(getattr(model, RUN_WHOLE))
        self.assertIsNone(find_trunk(model))
        batch = collate_pairs(PAIRS, shape=BatchShape(0, 24))
        logps, plain = gradients(model, batch, whole_logps)
        ours, gradient = shared_gradients(model, batch)
        np.testing.assert_allclose(ours, logps, rtol=1e-5)
        self.assertLess(distance(gradient, plain), 1e-6)

    def test_numbers_that_depend_on_padding(self):
        for name, depends in (("phi3small", True), ("qwen3_moe", False)):
            model = zoo.build(name)
            narrow, wide = (
                whole_logps(model, collate_pairs(PAIRS, shape=BatchShape(0, width)))
                for width in (24, 36)
            )
            off = mx.abs(narrow - wide).max().item()
            for share in (True, False):
                args = SimpleNamespace(pack=False, share_prompt=share)
                warning = find_sharing(args, tiny_model(), model).warning
                with self.subTest(name=name, off=off, share=share):
                    self.assertEqual(off > 0.05, depends)
                    pattern = r"depend on how far a batch is padded.* 0\.\d+ nats"
                    self.assertRegex(warning, pattern if depends else r"\A\Z")

    def test_training_mode_is_kept(self):
        for training in (False, True):
            model = tiny_model("lora", dropout=0.5).train(training)
            self.assertEqual(check_sharing(model).grade, "ragged")
            self.assertEqual(model.training, training)


class TestParts(unittest.TestCase):
    def test_trunk_and_head_make_the_model(self):
        tokens = mx.array([[1, 2, 3], [4, 5, 6]])
        for name in ("llama", "gemma2", "cohere", "granite", "minicpm", "gpt2"):
            model = zoo.build(name)
            with self.subTest(name=name):
                states = trunk_states(model, tokens)
                self.assertEqual(states.shape, (2, 3, 32))
                logits = head_logits(model, states.reshape(6, -1))
                expected = model(tokens).reshape(6, -1)
                np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)

    def test_plain_states_are_those_of_whole_rows(self):
        model, batch = tiny_model(), collate_pairs(PAIRS, shape=BatchShape(0, 24))
        expected = np.array(model.model(batch["inputs"]))
        np.testing.assert_allclose(plain_states(model, batch), expected, rtol=1e-5)
        shared = collate_pairs(PAIRS, shape=RAGGED)
        states = np.array(shared_states(model, shared))
        for row, (prompt, _, _, lengths) in enumerate(PAIRS):
            first = len(prompt) - 1
            count = lengths[1] - 1 - first
            np.testing.assert_allclose(
                states[row, :count],
                expected[row, first : first + count],
                rtol=2e-4,
                atol=1e-5,
            )

    def test_calls_are_given_back_after_an_error(self):
        layer = nn.Linear(1, 1)
        with self.assertRaises(KeyError), calls_replaced(
            [(layer, None), (layer, None)]
        ):
            raise KeyError
        self.assertIs(type(layer), nn.Linear)


class TestCaches(unittest.TestCase):
    def test_masks_by_their_rule(self):
        def seen(width, lengths, count, window):
            """Row, step and slot by slot: what a token of the rows may see."""
            result = np.zeros((len(lengths), 1, count, width + count), bool)
            for row, length in enumerate(lengths):
                for step in range(count):
                    at = length + step
                    for slot in range(width + count):
                        place = slot if slot < width else slot - width + length
                        real = slot >= width or slot < length
                        near = window is None or at - place < window
                        result[row, 0, step, slot] = real and place <= at and near
            return result

        for window in (None, 2, 4, 9):
            for lengths in ([5, 2], [0, 5], [5, 5]):
                cache = PromptKeysValues(window)
                ragged = mx.array(lengths)
                cache.fork(5, ragged)
                self.assertEqual(cache.offset.tolist(), lengths * 2)
                mask = np.array(cache.make_mask(3))
                expected = seen(5, lengths * 2, 3, window)
                with self.subTest(window=window, lengths=lengths):
                    np.testing.assert_array_equal(mask, expected)
            cache = PromptKeysValues(window)
            cache.fork(5, None)
            mask = cache.make_mask(3, return_array=True)
            np.testing.assert_array_equal(mask, seen(5, [5], 3, window)[0, 0])
            short = window is not None and window < 8
            self.assertEqual(isinstance(cache.make_mask(3), mx.array), short)

    def test_both_rows_go_on_from_their_prompt(self):
        cache = PromptKeysValues()
        prompts = mx.arange(2 * 4).reshape(2, 1, 4, 1)
        cache.update_and_fetch(prompts, 10 * prompts)
        # What lies behind the shared part is forgotten.
        cache.fork(3, None)
        self.assertEqual(cache.offset, 3)
        rows = 100 + mx.arange(4 * 2).reshape(4, 1, 2, 1)
        keys, values = cache.update_and_fetch(rows, rows)
        self.assertEqual(keys.shape, (4, 1, 5, 1))
        for row in range(4):
            expected = prompts[row % 2, 0, :3, 0].tolist() + rows[row, 0, :, 0].tolist()
            self.assertEqual(keys[row, 0, :, 0].tolist(), expected)
        self.assertIs(cache.keys_and_values()[1], values)
        cache.maybe_trim_front()
        self.assertEqual(cache.start_position, 0)

    def test_a_cache_goes_back_in_time(self):
        cache, x = PromptKeysValues(), mx.ones((1, 1, 2, 1))
        state, arrays = cache.saved(), cache.arrays
        cache.update_and_fetch(x, x)
        cache.fork(2, mx.array([1]))
        cache.restore(state, arrays)
        self.assertEqual((cache.forked, cache.offset), (False, 0))
        self.assertIsNone(cache.keys)
        state = PromptState(1)
        state.lengths = mx.array([3])
        saved = state.saved()
        state.lengths -= 1
        state.restore(saved, [x])
        self.assertEqual(state.lengths.tolist(), [3])
        self.assertIs(state[0], x)

    def test_states_are_handed_to_both_rows(self):
        cache = PromptState(2)
        cache[0] = mx.array([[1.0], [2.0]])
        cache.fork(3, mx.array([3, 2]))
        self.assertEqual(cache[0][:, 0].tolist(), [1, 2, 1, 2])
        self.assertIsNone(cache[1])
        self.assertIsNone(cache.lengths)

    def test_one_cache_for_each_of_the_models(self):
        for name in ("gemma3_text", "jamba", "deepseek_v32", "llama4_text"):
            model = zoo.build(name)
            theirs, ours = make_prompt_cache(model), prompt_caches(model)
            self.assertEqual(len(ours), len(theirs))
            number = sum(
                len(c.caches) if isinstance(c, CacheList) else 1 for c in theirs
            )
            self.assertEqual(len(leaves(ours)), number)

        class Odd(nn.Module):
            layers = [0]
            make_cache = staticmethod(lambda: [object()])

        with self.assertRaisesRegex(TypeError, "through a object"):
            prompt_caches(Odd())


if __name__ == "__main__":
    unittest.main()
