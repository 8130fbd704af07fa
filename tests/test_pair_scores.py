# Copyright © 2026 MLX Contributors

import unittest
from types import SimpleNamespace
from unittest import mock

import mlx.core as mx
import numpy as np
from tiny import random_pairs, tiny_model

from mlx_lm.preference.batch.collate import iterate_preference_batches
from mlx_lm.preference.forward.answers import paired_sequence_logps
from mlx_lm.preference.measure import pair_scores
from mlx_lm.preference.measure.pair_scores import PairCollector, ScoredPairs
from mlx_lm.preference.objective.objective import Objective
from mlx_lm.tuner.trainer import evaluate_dpo


def float64_scores(models, prompt, answer):
    """Both models' log-prob of an answer and their KL, from logits in float64."""
    tokens = np.array([*prompt, *answer])
    log_probs = []
    for model in models:
        x = np.array(model(mx.array(tokens[None, :-1]))[0], dtype=np.float64)
        x = x[-len(answer) :] - x[-len(answer) :].max(axis=-1, keepdims=True)
        log_probs.append(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))
    p, q = log_probs
    picked = [x[np.arange(len(answer)), answer].sum() for x in log_probs]
    return [*picked, (np.exp(p) * (p - q)).sum()]


class TestPairCollector(unittest.TestCase):
    def setUp(self):
        self.pairs = random_pairs(7, seed=3)
        self.models = tiny_model(), tiny_model(seed=1)

    def scored(self, **kwargs):
        collector = PairCollector(self.pairs)
        means = evaluate_dpo(
            *self.models, self.pairs, beta=0.3, collector=collector, **kwargs
        )
        return means, collector.gather()

    def test_every_pair_once_in_order_as_in_float64(self):
        expected = np.array(
            [
                [float64_scores(self.models, prompt, a) for a in (chosen, rejected)]
                for prompt, chosen, rejected, _ in self.pairs
            ]
        )
        for batch_size in (1, 2, 4, 7):
            with self.subTest(batch_size=batch_size):
                _, scored = self.scored(batch_size=batch_size)
                np.testing.assert_array_equal(scored.indices, np.arange(7))
                for i, name in enumerate(("policy_logps", "reference_logps", "kl")):
                    ours = getattr(scored, name)
                    np.testing.assert_allclose(ours, expected[..., i], atol=2e-5)
                rewards = 0.3 * (expected[..., 0] - expected[..., 1])
                np.testing.assert_allclose(scored.rewards, rewards, atol=1e-5)
                tokens = [[len(c), len(r)] for _, c, r, _ in self.pairs]
                np.testing.assert_array_equal(scored.tokens, tokens)

    def test_the_averages_are_those_of_the_pairs(self):
        means, scored = self.scored(batch_size=3)
        self.assertIsInstance(scored, ScoredPairs)
        self.assertAlmostEqual(
            means["rewards/margins"], scored.margins.mean(), places=5
        )
        right = np.mean(scored.margins > 0)
        self.assertAlmostEqual(means["rewards/accuracies"], right, places=6)
        per_token = scored.kl.sum() / scored.tokens.sum()
        self.assertAlmostEqual(means["kl"], per_token, places=5)

    def test_a_sample_holds_what_was_scored(self):
        means, scored = self.scored(batch_size=2, num_batches=2)
        self.assertEqual(means["pairs"], len(scored))
        self.assertLess(len(scored), 7)
        _, whole = self.scored(batch_size=2)
        np.testing.assert_allclose(
            scored.policy_logps, whole.policy_logps[scored.indices], atol=1e-5
        )

    def test_only_rewards_are_of_weighted_sums(self):
        plain_means, plain = self.scored()
        objective = Objective(beta=0.3, ld_alpha=0.25)
        means, scored = self.scored(objective=objective)
        for name in ("policy_logps", "reference_logps", "kl"):
            expected = getattr(plain, name)
            np.testing.assert_allclose(getattr(scored, name), expected, atol=1e-5)
        self.assertGreater(abs(scored.rewards - plain.rewards).max(), 0.01)
        for name in ("perplexity/policy", "logps/rejected", "kl"):
            self.assertAlmostEqual(means[name], plain_means[name], places=4)

    def test_ranks_put_their_shares_together(self):
        _, expected = self.scored(batch_size=4)

        def score(batch):
            logps = paired_sequence_logps(*self.models, batch.arrays)
            values = dict(zip(("policy_logps", "reference_logps", "kl"), logps))
            rewards = 0.3 * (values["policy_logps"] - values["reference_logps"])
            names = ("chosen_rewards", "rejected_rewards")
            return values | dict(zip(names, mx.split(rewards, 2)))

        collectors = []
        for rank in range(2):
            group = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: 2)
            collectors.append(PairCollector(self.pairs))
            for batch in iterate_preference_batches(self.pairs, 4, comm_group=group):
                collectors[-1].add(batch, score(batch))
        sent: dict = {}

        def add(arrays, _):
            sent.update({k: x + sent.get(k, 0) for k, x in arrays.items()})
            return dict(sent)

        with mock.patch.object(pair_scores, "sum_over_ranks", add):
            _, ours = (collector.gather() for collector in collectors)
        np.testing.assert_array_equal(ours.indices, np.arange(7))
        for name in ("policy_logps", "reference_logps", "kl", "rewards", "tokens"):
            np.testing.assert_allclose(
                getattr(ours, name), getattr(expected, name), atol=1e-5
            )

    def test_select(self):
        _, scored = self.scored()
        some = scored.select([4, 0])
        np.testing.assert_array_equal(some.indices, [4, 0])
        np.testing.assert_array_equal(some.margins, scored.margins[[4, 0]])


if __name__ == "__main__":
    unittest.main()
