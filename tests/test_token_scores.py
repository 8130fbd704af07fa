# Copyright © 2026 MLX Contributors

import unittest
from unittest import mock

import mlx.core as mx
import numpy as np
from kernel_emulator import COMPILER, emulated_logps
from tiny import pair, random_pairs, tiny_model, train

from mlx_lm.preference.batch.collate import collate_pairs
from mlx_lm.preference.batch.shape import BatchShape
from mlx_lm.preference.forward import fused
from mlx_lm.preference.forward import tokens as token_scores
from mlx_lm.preference.forward.answers import paired_sequence_logps, sequence_logps
from mlx_lm.tuner.losses import dpo_loss
from mlx_lm.tuner.trainer import evaluate_dpo


class TestLongRows(unittest.TestCase):
    def test_a_large_vocabulary_is_not_added_into_one_number(self):
        # The CPU's float32 sum loses 5e-5 to 2e-4 nats of such a row.
        rng = np.random.default_rng(0)
        for V in (49152, 151936, 50257):
            x = rng.normal(size=(4, V)).astype(np.float32) * 3
            targets = np.arange(4)
            exact = -np.log(np.exp(x.astype(np.float64)).sum(axis=-1))
            exact = exact + x[targets, targets]
            arrays = mx.array(x)[None], mx.array(targets)[None]
            with mock.patch.object(fused, "preference_backend", lambda: None):
                logps = token_scores.token_logps(*arrays)[0]
            with self.subTest(vocabulary=V):
                np.testing.assert_allclose(logps, exact, atol=5e-6)


@unittest.skipUnless(COMPILER, "needs Linux and g++")
class TestScoreTokens(unittest.TestCase):
    """The path through a kernel, with the emulator in the place of the GPU."""

    def setUp(self):
        self.calls = []
        forward, backward = emulated_logps("metal", self.calls)
        fakes = {
            "preference_backend": lambda: "metal",
            "preference_logps": forward,
            "preference_logps_vjp": backward,
        }
        for name, fake in fakes.items():
            patch = mock.patch.object(fused, name, fake)
            patch.start()
            self.addCleanup(patch.stop)
        rng = np.random.default_rng(0)
        self.x = mx.array(rng.normal(size=(2, 3, 70)), mx.float32) * 3
        self.y = self.x + mx.array(rng.normal(size=(2, 3, 70)), mx.float32)
        self.targets = mx.array(rng.integers(0, 70, (2, 3)))
        self.mask = mx.array([[True, True, False], [True, False, False]])
        self.weights = mx.array(rng.normal(size=(3, 2, 3)), mx.float32)

    def loss(self, score, **kwargs):
        def loss(x, y):
            out = score(x, y, self.targets, self.mask, **kwargs)
            return sum((w * o).sum() for w, o in zip(self.weights, out))

        return loss

    def test_kernel_and_plain_operations_agree(self):
        arrays = (self.x, self.y)
        plain = token_scores._plain_score_tokens
        expected, gradients = mx.value_and_grad(self.loss(plain), (0, 1))(*arrays)
        fused = self.loss(token_scores.score_tokens, kl_gradient=True)
        value, ours = mx.value_and_grad(fused, (0, 1))(*arrays)
        self.assertAlmostEqual(value.item(), expected.item(), places=4)
        np.testing.assert_allclose(ours[0], gradients[0], atol=2e-6)
        self.assertFalse(ours[1].any().item())
        self.assertFalse(ours[0][0, 2].any().item())
        self.assertEqual(self.calls, [("forward", True), ("backward", True)])

    def test_kl_carries_no_gradient_unless_asked(self):
        gradient = mx.grad(self.loss(token_scores.score_tokens))(self.x, self.y)
        self.weights[2] = 0
        plain = self.loss(token_scores._plain_score_tokens)
        expected = mx.grad(plain)(self.x, self.y)
        np.testing.assert_allclose(gradient, expected, atol=2e-6)
        self.assertEqual(self.calls, [("forward", True), ("backward", False)])

    def test_every_way_to_a_log_prob_takes_the_kernel(self):
        model, other = (lambda tokens, x=x: x for x in (self.x, self.y))
        batch = collate_pairs([pair([1, 2], [3, 4], [5])], shape=BatchShape(0, 3))
        targets = {"chosen_targets": self.targets, "rejected_targets": self.targets}
        for run, forms in (
            (lambda: sequence_logps(model, batch), [False]),
            (lambda: paired_sequence_logps(model, other, batch), [True]),
            (lambda: dpo_loss(self.x, self.x, self.y, self.y, **targets), [True] * 2),
        ):
            self.calls.clear()
            ours = run()
            self.assertEqual(self.calls, [("forward", dual) for dual in forms])
            with mock.patch.object(fused, "preference_backend", lambda: None):
                expected = run()
            for a, b in zip(
                *((x if isinstance(x, tuple) else (x,)) for x in (ours, expected))
            ):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    def test_the_path_is_chosen_at_each_call(self):
        arrays = (self.x, self.targets, self.mask)
        expected = token_scores.token_logps(*arrays)
        self.assertEqual(len(self.calls), 1)
        with mock.patch.object(fused, "preference_backend", lambda: None):
            plain = token_scores.token_logps(*arrays)
        self.assertEqual(len(self.calls), 1)
        np.testing.assert_allclose(plain, expected, rtol=1e-5)

    def test_other_widths_take_plain_operations(self):
        padded = mx.pad(self.y, ((0, 0), (0, 0), (0, 6)), constant_values=-mx.inf)
        arrays = (self.targets, self.mask)
        expected = token_scores.score_tokens(self.x, self.y, *arrays)
        self.calls.clear()
        ours = token_scores.score_tokens(self.x, padded, *arrays)
        self.assertEqual(self.calls, [])
        for a, b in zip(ours, expected):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    def test_unknown_targets_and_masks_of_any_kind(self):
        targets = mx.array([[70, -1, 3], [0, 999, 69]])
        for mask in (None, self.mask, self.mask.astype(mx.float32)):
            ours = token_scores.token_logps(self.x, targets, mask)
            with mock.patch.object(fused, "preference_backend", lambda: None):
                plain = token_scores.token_logps(self.x, targets, mask)
            np.testing.assert_allclose(ours, plain, rtol=1e-5)
        self.assertTrue(mx.isnan(token_scores.token_logps(self.x, targets))[0, 0])

    def test_a_run_trains_and_validates_through_the_kernel(self):
        # The emulator can't run inside a compiled step.
        mx.disable_compile()
        self.addCleanup(mx.enable_compile)
        pairs = random_pairs(4)
        ours = train(tiny_model("lora"), pairs, pairs, iters=2)
        steps, validations = 2, 2 * 2  # before the first step and after the last
        # The first validation asks the start alone, which is policy and reference.
        forwards = steps + validations
        self.assertEqual(self.calls.count(("forward", False)), forwards)
        self.assertEqual(self.calls.count(("backward", False)), steps)
        self.assertEqual(len(self.calls), forwards + steps)
        with mock.patch.object(fused, "preference_backend", lambda: None):
            plain = train(tiny_model("lora"), pairs, pairs, iters=2)
        for key in ("loss", "kl_estimate", "grad_norm", "rewards/margins"):
            self.assertAlmostEqual(ours[key], plain[key], places=4, msg=key)

    def test_an_evaluation_scores_both_models_in_one_kernel(self):
        mx.disable_compile()
        self.addCleanup(mx.enable_compile)
        models = tiny_model(), tiny_model(seed=2)
        ours = evaluate_dpo(*models, random_pairs(4), batch_size=2)
        self.assertEqual(self.calls, [("forward", True)] * 2)
        with mock.patch.object(fused, "preference_backend", lambda: None):
            plain = evaluate_dpo(*models, random_pairs(4), batch_size=2)
        for key in ("loss", "kl", "rewards/margins"):
            self.assertAlmostEqual(ours[key], plain[key], places=4, msg=key)


if __name__ == "__main__":
    unittest.main()
