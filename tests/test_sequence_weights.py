# Copyright © 2026 MLX Contributors

import unittest
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from tiny import Pairs, pair, random_pairs, tiny_model

from mlx_lm.preference.batch.collate import collate_pairs
from mlx_lm.preference.batch.shape import BatchShape
from mlx_lm.preference.forward import head as completion_head
from mlx_lm.preference.forward.answers import (
    completion_states,
    length_weights,
    paired_sequence_logps,
    sequence_logps,
    sum_by_row,
    weighted_sequence_logps,
)
from mlx_lm.preference.forward.frozen import FrozenStart
from mlx_lm.preference.forward.head import completion_scores
from mlx_lm.preference.forward.tokens import token_log_sum_squares, token_logps
from mlx_lm.preference.objective.objective import Objective
from mlx_lm.preference.policy.head import unfreeze_head
from mlx_lm.preference.step import reference_pass
from mlx_lm.tuner.trainer import dpo_step, evaluate_dpo

# Equal lengths, either one longer, one token, and no prompt.
PAIRS = Pairs(
    [
        pair([3, 4, 5], [6, 7], [8, 9]),
        pair([3], [6, 7, 8, 9, 10], [8, 9]),
        pair([5, 3], [9], [8, 9, 11, 12]),
        pair([], [9, 10, 11, 12], [8, 9]),
        *random_pairs(3),
    ]
)
SHAPES = {
    "plain": None,
    "shared": BatchShape(9, 16, True),
    "packed": BatchShape(0, 48, packed=1),
}


def float64_log_softmax(x):
    x = np.asarray(x, dtype=np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def expected_rows(model, pairs, ld_alpha=1.0):
    """Each answer's weighted log-prob and confidence, token by token in float64."""
    logps, confidences = [], []
    for answer in (1, 2):
        for item in pairs:
            prompt, tokens, other = item[0], item[answer], item[3 - answer]
            sequence = [*prompt, *tokens]
            log_p = float64_log_softmax(model(mx.array([sequence]))[0])
            first = max(len(prompt), 1)
            shared = min(len(tokens), len(other)) - (first - len(prompt))
            total, aligned, count = 0.0, 0.0, 0
            for t in range(first, len(sequence)):
                row = log_p[t - 1]
                factor = 1.0 if count < shared else ld_alpha
                total += factor * row[sequence[t]]
                aligned += row[sequence[t]] - np.log(np.exp(2 * row).sum())
                count += 1
            logps.append(total)
            confidences.append(np.exp(aligned / max(count, 1)))
    return np.array(logps), np.array(confidences)


class TestLengths(unittest.TestCase):
    def test_tokens_beyond_the_shorter_answer_count_less(self):
        batch = collate_pairs(PAIRS[:4])
        expected = [1, 1] + [1, 1, 0.25, 0.25, 0.25] + [1] + [1, 0.25, 0.25]
        expected += [1, 1] + [1, 1] + [1, 0.25, 0.25, 0.25] + [1]
        ours = length_weights(batch, 0.25)
        self.assertEqual(ours.tolist()[: len(expected)], expected)
        self.assertEqual(ours.dtype, mx.float32)
        self.assertTrue((length_weights(batch, 1.0) == 1).all().item())

    def test_equals_float64_in_every_layout(self):
        model = tiny_model()
        for name, shape in SHAPES.items():
            pairs = [p for p in PAIRS if p[0] or name == "plain"]
            count = len(pairs)
            for ld_alpha in (0.0, 0.3, 1.0):
                expected, _ = expected_rows(model, pairs, ld_alpha)
                batch = collate_pairs(pairs, count + 2, shape)
                with self.subTest(layout=name, ld_alpha=ld_alpha):
                    logps = np.array(sequence_logps(model, batch, ld_alpha=ld_alpha))
                    filling = np.concatenate([logps[count:][:2], logps[-2:]])
                    np.testing.assert_array_equal(filling, 0)
                    ours = np.concatenate([logps[:count], logps[count + 2 : -2]])
                    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)

    def test_the_reference_counts_alike_and_the_kl_counts_all(self):
        policy, other = tiny_model(), tiny_model(seed=5)
        batch = collate_pairs(PAIRS)
        p, q, kl = paired_sequence_logps(policy, other, batch, ld_alpha=0.3)
        np.testing.assert_allclose(p, expected_rows(policy, PAIRS, 0.3)[0], rtol=1e-5)
        np.testing.assert_allclose(q, expected_rows(other, PAIRS, 0.3)[0], rtol=1e-5)
        *_, plain = paired_sequence_logps(policy, other, batch)
        np.testing.assert_array_equal(kl, plain)

    def test_a_step_weighs_both_alike(self):
        policy, other = tiny_model(), tiny_model(seed=5)
        batch, objective = collate_pairs(PAIRS), Objective(ld_alpha=0.3)
        expected, _ = expected_rows(other, PAIRS, 0.3)
        logps, _ = reference_pass(policy, other, batch, objective)
        np.testing.assert_allclose(logps, expected, rtol=1e-5)
        # A policy that is its own reference has no reward, however long answers are.
        loss, metrics = dpo_step(
            *(policy, FrozenStart(policy), batch, optim.SGD(0.0)), objective=objective
        )
        self.assertAlmostEqual(loss.item(), np.log(2), places=6)
        self.assertAlmostEqual(metrics["rewards/chosen"].item(), 0, places=6)

    def test_gradients_follow_finite_differences(self):
        batch = collate_pairs(PAIRS[1:3])
        table = mx.random.normal((64, 64), key=mx.random.key(0))
        factors = mx.array([1.0, -2.0, 0.5, 3.0])
        moved = np.zeros((64, 64))
        # What follows 9 in an answer's tail.
        moved[9, 10] = 1.0

        def loss(step):
            model = lambda tokens: (table + step * mx.array(moved, mx.float32))[tokens]
            logps = sequence_logps(model, batch, gradient=True, ld_alpha=0.3)
            return (factors * logps).sum()

        def exact(step):
            t = np.array(table, dtype=np.float64) + step * moved
            model = lambda tokens: t[np.array(tokens)]
            logps, _ = expected_rows(model, PAIRS[1:3], 0.3)
            return (np.array(factors) * logps).sum()

        slope = (exact(1e-4) - exact(-1e-4)) / 2e-4
        self.assertAlmostEqual(mx.grad(loss)(mx.array(0.0)).item(), slope, places=4)

    def test_without_the_setting_nothing_is_weighed(self):
        values = mx.array([1.0, 2.0, 4.0])
        batch = {"rows": mx.array([0, 1, 1]), "lengths": mx.zeros((2, 2))}
        weights = mx.array([1.0, 1.0, 0.5])
        self.assertEqual(sum_by_row(values, batch, weights).tolist(), [1.0, 4.0])
        with mock.patch("mlx_lm.preference.forward.answers.length_weights") as weigh:
            sequence_logps(tiny_model(), collate_pairs(PAIRS))
        weigh.assert_not_called()


class TestEvaluation(unittest.TestCase):
    """A test's loss, pair by pair in float64, one of them without a prompt."""

    def losses(self, objective):
        policy, other = tiny_model(), tiny_model(seed=5)
        found = evaluate_dpo(policy, other, PAIRS, 3, objective=objective)
        logps, confidences = expected_rows(policy, PAIRS)
        ratios = logps - expected_rows(other, PAIRS)[0]
        return found, ratios.reshape(2, -1), confidences.reshape(2, -1)

    def test_pairs_are_weighed(self):
        found, (c, r), sure = self.losses(Objective(0.3, use_weighting=True))
        expected = (np.logaddexp(0, -0.3 * (c - r)) * sure.prod(axis=0)).mean()
        self.assertAlmostEqual(found["loss"] / expected, 1, places=4)

    def test_tokens_are_counted(self):
        # Without a prompt an answer's first token is not scored.
        tokens = [[len(x[i]) - (not x[0]) for x in PAIRS] for i in (1, 2)]
        for name, loss in (
            ("sigmoid_norm", lambda c, r: np.logaddexp(0, -0.3 * (c - r))),
            ("ipo", lambda c, r: (c - r - 0.5 / 0.3) ** 2),
        ):
            found, ratios, _ = self.losses(Objective(0.3, name))
            expected = loss(*(ratios / np.array(tokens))).mean()
            self.assertAlmostEqual(found["loss"] / expected, 1, places=4, msg=name)
        total = np.sum(tokens)
        self.assertAlmostEqual(found["kl"] * total, self.kl().sum(), places=3)
        logps = expected_rows(tiny_model(), PAIRS)[0].reshape(2, -1)
        nll = -logps[0].sum() / np.sum(tokens[0])
        self.assertAlmostEqual(found["perplexity/policy"] / np.exp(nll), 1, places=4)
        likelier = (logps / np.array(tokens))[0] > (logps / np.array(tokens))[1]
        self.assertAlmostEqual(found["logps/accuracies_per_token"], likelier.mean())

    def kl(self):
        """The exact KL of every answer."""
        policy, other, found = tiny_model(), tiny_model(seed=5), []
        for answer in (1, 2):
            for item in PAIRS:
                sequence = mx.array([[*item[0], *item[answer]]])
                p, q = (float64_log_softmax(m(sequence)[0]) for m in (policy, other))
                kl = (np.exp(p) * (p - q)).sum(axis=-1)
                found.append(kl[max(len(item[0]), 1) - 1 : -1].sum())
        return np.array(found)


class TestConfidence(unittest.TestCase):
    def test_sum_of_squares_over_long_and_wide_vocabularies(self):
        rng = np.random.default_rng(0)
        for V, scale, offset in (
            *((V, 3.0, 0.0) for V in (1, 127, 1000, 49152, 151936)),
            (1000, 1e3, 0.0),
            (49152, 0.1, 3e3),
        ):
            x = (rng.normal(size=(3, V)) * scale + offset).astype(np.float32)
            x[0, V // 2 + 1 :] = -np.inf
            with np.errstate(divide="ignore"):
                expected = np.log(np.exp(2 * float64_log_softmax(x)).sum(axis=-1))
            with self.subTest(vocabulary=V, scale=scale, offset=offset):
                ours = token_log_sum_squares(mx.array(x))
                self.assertEqual(ours.dtype, mx.float32)
                np.testing.assert_allclose(ours, expected, atol=5e-6, rtol=1e-6)
        gradient = mx.grad(lambda x: token_log_sum_squares(x).sum())(mx.array(x))
        self.assertFalse(gradient.any().item())

    def test_equals_float64_in_every_layout(self):
        model = tiny_model()
        for name, shape in SHAPES.items():
            pairs = [p for p in PAIRS if p[0] or name == "plain"]
            count = len(pairs)
            batch = collate_pairs(pairs, count + 1, shape)
            for gradient in (False, True):
                logps, confidences = weighted_sequence_logps(
                    model, batch, gradient=gradient, ld_alpha=0.3
                )
                with self.subTest(layout=name, gradient=gradient):
                    expected = expected_rows(model, pairs, 0.3)
                    for ours, right in zip((logps, confidences), expected):
                        ours = np.array(ours)
                        rows = np.concatenate([ours[:count], ours[count + 1 : -1]])
                        np.testing.assert_allclose(rows, right, rtol=2e-5)
                    # Filling weighs nothing, but must stay finite.
                    self.assertEqual(confidences[count].item(), 1.0)

    def test_chunks_and_the_plain_scores_agree(self):
        model = tiny_model(tie_word_embeddings=False)
        batch = collate_pairs(PAIRS)
        states = completion_states(model, batch)
        plain = completion_head.completion_logps(model, states, batch["targets"])
        given = (model, states, batch["targets"], (token_logps, token_log_sum_squares))
        whole = completion_scores(*given)
        for chunk in (1, 5):
            for gradient in (False, True):
                ours = completion_scores(
                    *given, gradient=gradient, chunk_bytes=4 * 64 * chunk
                )
                np.testing.assert_allclose(ours[0], plain, rtol=1e-5)
                np.testing.assert_allclose(ours[1], whole[1], rtol=1e-5)

    def test_only_the_log_probs_carry_gradients(self):
        batch = collate_pairs(PAIRS)
        for trained in (False, True):
            model = tiny_model(tie_word_embeddings=False)
            if trained:
                unfreeze_head(model)
            parameters = model.trainable_parameters()

            def weighted(batch, model=model):
                logps, confidences = weighted_sequence_logps(
                    model, batch, gradient=True, ld_alpha=0.3
                )
                return (mx.stop_gradient(confidences) * logps).sum(), confidences

            def plain(batch, weights, model=model):
                logps = sequence_logps(model, batch, gradient=True, ld_alpha=0.3)
                return (weights * logps).sum()

            def live(batch, model=model):
                return weighted_sequence_logps(model, batch, gradient=True)[1].sum()

            with mock.patch.object(
                completion_head, "default_chunk_bytes", lambda: 1024
            ):
                (_, weights), ours = nn.value_and_grad(model, weighted)(batch)
                model.update(parameters)
                _, expected = nn.value_and_grad(model, plain)(batch, weights)
                model.update(parameters)
                _, nothing = nn.value_and_grad(model, live)(batch)
                model.update(parameters)
            for (name, a), (_, b) in zip(tree_flatten(ours), tree_flatten(expected)):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=name)
            for name, x in tree_flatten(nothing):
                self.assertFalse(x.any().item(), name)

    def test_the_frozen_start_and_compiled_steps(self):
        model = tiny_model("lora")
        reference, batch = FrozenStart(model), collate_pairs(PAIRS)
        run = lambda batch: weighted_sequence_logps(model, batch, ld_alpha=0.5)
        compiled = mx.compile(run, inputs=[model.state])
        for a, b in zip(compiled(batch), run(batch)):
            np.testing.assert_allclose(a, b, rtol=1e-5)
        logps = sequence_logps(reference, batch, ld_alpha=0.5)
        np.testing.assert_allclose(logps, run(batch)[0], rtol=1e-5)


if __name__ == "__main__":
    unittest.main()
