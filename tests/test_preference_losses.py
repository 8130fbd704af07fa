# Copyright © 2026 MLX Contributors

import math
import unittest

import mlx.core as mx
import numpy as np
from float64 import float64_logps

from mlx_lm.preference.forward.tokens import score_tokens, token_logps
from mlx_lm.tuner.losses import dpo_loss, preference_loss


def _logits(rng, shape, scale=3.0):
    return mx.array(rng.normal(size=shape).astype(np.float32) * scale)


class TestPreferenceLosses(unittest.TestCase):
    def setUp(self):
        self.rng = np.random.default_rng(1)

    def test_two_pairs_by_hand(self):
        # h = (-4 + 6) - (-5 + 6) = 1 and (-3 + 1) - (-2 + 2) = -2
        logps = [[-4.0, -3.0], [-6.0, -1.0], [-5.0, -2.0], [-6.0, -2.0]]
        losses, chosen, rejected = preference_loss(*map(mx.array, logps), beta=0.5)
        expected = [math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(1.0))]
        np.testing.assert_allclose(losses, expected, rtol=1e-6)
        np.testing.assert_allclose(chosen, [0.5, -0.5])
        np.testing.assert_allclose(rejected, [0.0, 0.5])

    def test_swapping_the_answers_flips_the_margin(self):
        a, b, c, d = (mx.array(self.rng.normal(size=4)) for _ in range(4))
        _, chosen, rejected = preference_loss(a, b, c, d)
        _, swapped_chosen, swapped_rejected = preference_loss(b, a, d, c)
        np.testing.assert_allclose(
            chosen - rejected, -swapped_chosen + swapped_rejected
        )

    def test_rewards_carry_no_gradient(self):
        def reward(x):
            return preference_loss(x, x, x, x)[1].sum()

        self.assertEqual(mx.grad(reward)(mx.array([1.0])).item(), 0.0)

    def test_gradient_against_finite_differences(self):
        B, L, V, beta = 2, 3, 5, 0.4
        x = [self.rng.normal(size=(B, L, V)) for _ in range(4)]
        targets = [self.rng.integers(0, V, (B, L)) for _ in range(2)]
        mask = np.array([[1, 1, 1], [1, 1, 0]], dtype=bool)

        def loss64(x):
            pc, pr, rc, rr = (
                float64_logps(a, targets[i % 2], mask) for i, a in enumerate(x)
            )
            return np.log1p(np.exp(-beta * ((pc - pr) - (rc - rr)))).mean()

        def loss(pc, pr):
            return dpo_loss(
                pc,
                pr,
                mx.array(x[2].astype(np.float32)),
                mx.array(x[3].astype(np.float32)),
                beta,
                chosen_targets=mx.array(targets[0]),
                rejected_targets=mx.array(targets[1]),
                chosen_mask=mx.array(mask),
                rejected_mask=mx.array(mask),
            )

        policy = [mx.array(a.astype(np.float32)) for a in x[:2]]
        grads = mx.grad(loss, argnums=(0, 1))(*policy)
        for which, grad in enumerate(grads):
            for index in np.ndindex(B, L, V):
                moved = [a.copy() for a in x]
                moved[which][index] += 1e-6
                up = loss64(moved)
                moved[which][index] -= 2e-6
                numeric = (up - loss64(moved)) / 2e-6
                self.assertAlmostEqual(grad[index].item(), numeric, places=5)
        self.assertEqual(mx.abs(grads[0][1, 2]).max().item(), 0.0)

    def test_the_reference_receives_no_gradient(self):
        x = _logits(self.rng, (1, 2, 6))
        targets = mx.array([[1, 2]])

        def loss(reference):
            return dpo_loss(
                x,
                x,
                reference,
                reference,
                chosen_targets=targets,
                rejected_targets=targets + 1,
            )

        self.assertEqual(mx.abs(mx.grad(loss)(x)).max().item(), 0.0)

    def test_extreme_logits_and_empty_masks_stay_finite(self):
        targets = mx.array([[0, 3]])
        for scale in (1e4, -1e4):
            x = mx.zeros((1, 2, 4))
            x[0, 0, 0] = scale
            y = mx.zeros((1, 2, 4))
            for mask in (mx.ones((1, 2)), mx.zeros((1, 2))):
                kwargs = {
                    "chosen_targets": targets,
                    "rejected_targets": targets,
                    "chosen_mask": mask,
                    "rejected_mask": mask,
                }
                f = lambda x: dpo_loss(x, y, y, y, 0.5, **kwargs)
                loss, grad = mx.value_and_grad(f)(x)
                self.assertTrue(math.isfinite(loss.item()))
                self.assertTrue(mx.isfinite(grad).all().item())
        self.assertAlmostEqual(loss.item(), math.log(2), places=6)

    def test_token_logps_over_odd_vocabularies(self):
        for V in (1, 2, 127, 128, 129, 1000, 50257):
            x = _logits(self.rng, (2, 3, V))
            targets = self.rng.integers(0, V, (2, 3))
            logps = token_logps(x, mx.array(targets))
            for i, j in np.ndindex(2, 3):
                expected = float64_logps(x[i, j][None], [targets[i, j]], [1])
                np.testing.assert_allclose(logps[i, j], expected, atol=3e-6, rtol=1e-6)

    def test_long_vocabulary_is_not_biased(self):
        # One float32 sum over 150,000 terms loses 2e-4 nats, always one way.
        x = _logits(self.rng, (4, 8, 151936), scale=1.0)
        targets = np.zeros((4, 8), dtype=int)
        error = np.array(token_logps(x, mx.array(targets))).sum(-1)
        error -= float64_logps(x, targets, np.ones((4, 8)))
        self.assertLess(np.abs(error).max() / 8, 1e-5)

    def test_score_tokens_against_float64(self):
        for V, scale in ((7, 1.0), (1000, 30.0), (50257, 3.0)):
            with self.subTest(V=V):
                p = _logits(self.rng, (2, 3, V), scale)
                q = p + _logits(self.rng, (2, 3, V), 0.3)
                targets = mx.array(self.rng.integers(0, V, (2, 3)))
                mask = mx.array([[True, True, False], [True, False, True]])
                x = np.asarray(p, dtype=np.float64)
                y = np.asarray(q, dtype=np.float64)
                x = x - np.log(np.exp(x - x.max()).sum(-1, keepdims=True)) - x.max()
                y = y - np.log(np.exp(y - y.max()).sum(-1, keepdims=True)) - y.max()
                kl = (np.exp(x) * (x - y)).sum(-1) * np.array(mask)
                ours = score_tokens(p, q, targets, mask)
                for logps, logits in zip(ours, (p, q)):
                    expected = float64_logps(logits, targets, mask)
                    np.testing.assert_allclose(logps.sum(-1), expected, rtol=1e-5)
                np.testing.assert_allclose(ours[2], kl, atol=3e-5)
                for x in ours:
                    self.assertEqual(x[0, 2].item(), 0.0)

    def test_kl_skips_tokens_of_probability_zero(self):
        p = mx.array([[[0.0, 0.0, -mx.inf]]])
        q = mx.array([[[0.0, 1.0, -mx.inf]]])
        *_, kl = score_tokens(p, q, mx.array([[0]]), mx.array([[True]]))
        expected = 0.5 * (math.log(0.5) - math.log(1 / (1 + math.e)))
        expected += 0.5 * (math.log(0.5) - math.log(math.e / (1 + math.e)))
        self.assertAlmostEqual(kl.item(), expected, places=6)

    def test_16_bit_logits_are_summed_in_float32(self):
        x = _logits(self.rng, (1, 4, 4096))
        targets = mx.array([[0, 1, 2, 3]])
        for dtype in (mx.bfloat16, mx.float16):
            logits = x.astype(dtype)
            logps = token_logps(logits, targets)
            self.assertEqual(logps.dtype, mx.float32)
            exact = logits.astype(mx.float32)
            expected = float64_logps(exact, targets, np.ones((1, 4)))
            np.testing.assert_allclose(logps.sum(-1), expected, rtol=1e-5)

    def test_targets_are_needed_and_the_message_shows_the_call(self):
        x = mx.zeros((1, 2, 4))
        with self.assertRaisesRegex(ValueError, r"chosen_targets=chosen_tokens\[:, 1:"):
            dpo_loss(x, x, x, x)

    def test_shapes_and_options_are_checked(self):
        x, targets = mx.zeros((1, 2, 4)), mx.zeros((1, 2), dtype=mx.int32)
        kwargs = {"chosen_targets": targets, "rejected_targets": targets}
        for message, args, more in (
            ("beta must be", (x, x, x, x, -1.0), {}),
            ("beta must be", (x, x, x, x, float("nan")), {}),
            ("label_smoothing must", (x, x, x, x), {"label_smoothing": 0.5}),
            ("Unknown loss_type 'dop'", (x, x, x, x), {"loss_type": "dop"}),
            ("differ in shape", (x, x, x[:, :1], x), {}),
            ("must have shape", (x[0], x, x[0], x), {}),
            ("chosen_mask must have", (x, x, x, x), {"chosen_mask": targets[:, :1]}),
            (
                r"all four of one shape .* \(1,\), \(2,\)",
                (x, mx.zeros((2, 2, 4)), x, mx.zeros((2, 2, 4))),
                {"rejected_targets": mx.zeros((2, 2), dtype=mx.int32)},
            ),
        ):
            with self.subTest(message=message):
                with self.assertRaisesRegex(ValueError, message):
                    dpo_loss(*args, **kwargs | more)

    def test_log_probs_of_tokens_are_no_sums(self):
        for shapes in ([(2, 3)] * 4, [()] * 4, [(1,), (1,), (1, 1), (1, 1)]):
            with self.subTest(shapes=shapes):
                with self.assertRaisesRegex(ValueError, "summed over answers"):
                    preference_loss(*map(mx.zeros, shapes))


if __name__ == "__main__":
    unittest.main()
