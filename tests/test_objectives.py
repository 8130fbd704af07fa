# Copyright © 2026 MLX Contributors

"""Every preference loss against its formula in float64, and what goes together."""

import unittest
from dataclasses import replace
from unittest import mock

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from objective_formulas import (
    AT_START,
    FORMULAS,
    Case,
    Seen,
    alpha_reward,
    batch_for,
    case_for,
    logsig,
    make,
    token_mean,
)
from tiny import random_pairs, tiny_model

from mlx_lm.preference import coupled
from mlx_lm.preference import step as preference_step
from mlx_lm.preference.batch.collate import collate_pairs
from mlx_lm.preference.forward.answers import sequence_logps
from mlx_lm.preference.objective.losses import LOSSES, PreferenceLoss
from mlx_lm.preference.objective.objective import Objective, pair_losses, pair_rewards
from mlx_lm.preference.objective.pairs import (
    DIVERGENCES,
    PairLogps,
    kl_baseline,
    pair_logps,
)
from mlx_lm.preference.step import answer_logps, loss_and_values
from mlx_lm.tuner.trainer import dpo_step


class TestFormulas(unittest.TestCase):
    def test_every_loss_is_listed(self):
        self.assertEqual(set(FORMULAS), set(LOSSES))
        for name, spec in LOSSES.items():
            self.assertIsInstance(spec, PreferenceLoss, name)
            self.assertTrue(spec.formula and spec.paper, name)

    def test_against_float64(self):
        for name, (_, formula, _) in FORMULAS.items():
            for seed in range(3):
                k = case_for(name, seed)
                objective = make(name, k)
                pairs = pair_logps(*k.logps(), batch_for(name, k), objective)
                losses = pair_losses(pairs, objective)
                with self.subTest(loss=name, seed=seed):
                    np.testing.assert_allclose(losses, formula(k), rtol=2e-5, atol=2e-6)

    def test_gradient_against_finite_differences(self):
        for name, (_, formula, _) in FORMULAS.items():
            k = case_for(name, 4)
            objective, batch = make(name, k), batch_for(name, k)
            policy, reference = k.logps()
            loss = lambda x: pair_losses(
                pair_logps(x, reference, batch, objective), objective
            ).sum()
            gradient = np.array(mx.grad(loss)(policy))
            n = len(k.pc)
            # No gradient flows into KTO's baseline.
            count = n if name == "kto" else 2 * n
            for i in range(count):
                values = []
                for step in (1e-6, -1e-6):
                    moved = case_for(name, 4)
                    (moved.pc if i < n else moved.pr)[i % n] += step
                    values.append(formula(moved).sum())
                numeric = (values[0] - values[1]) / 2e-6
                with self.subTest(loss=name, row=i):
                    self.assertAlmostEqual(
                        gradient[i], numeric, delta=1e-4 * max(1, abs(numeric))
                    )
            if name == "kto":
                self.assertFalse(gradient[n:].any())

    def test_by_hand_at_the_start(self):
        for name, expected in AT_START.items():
            k = case_for(name)
            k.pc, k.pr = k.rc, k.rr
            e = 0.2 if name == "exo_pair" else 0.0
            objective = Objective(loss_type=name, label_smoothing=e)
            batch = {x: v for x, v in batch_for(name, k).items() if x != "margins"}
            pairs = pair_logps(*k.logps(), batch, objective)
            with self.subTest(loss=name):
                np.testing.assert_allclose(
                    pair_losses(pairs, objective), expected, rtol=1e-6
                )

    def test_finite_far_from_the_start(self):
        for name in LOSSES:
            k = case_for(name)
            for far in (1e4, -1e4):
                k.pc = k.rc + far
                objective, batch = make(name, k), batch_for(name, k)
                policy, reference = k.logps()
                f = lambda x: pair_losses(
                    pair_logps(x, reference, batch, objective), objective
                ).sum()
                if name == "orpo" and far > 0:
                    continue  # No log-prob is above 0.
                loss, gradient = mx.value_and_grad(f)(policy)
                with self.subTest(loss=name, far=far):
                    self.assertTrue(np.isfinite(loss.item()))
                    self.assertTrue(mx.isfinite(gradient).all().item())


class TestPairLogps(unittest.TestCase):
    def test_what_the_losses_read(self):
        k = Case(6)
        objective = Objective(f_divergence="js")
        pairs = pair_logps(*k.logps(), k.batch(), objective)
        js = lambda x: np.log(2) + logsig(x)
        for found, expected in (
            (pairs.logratios[0], k.c),
            (pairs.logratios[1], k.r),
            (pairs.scores[0], js(k.c)),
            (pairs.difference, js(k.c) - js(k.r)),
            (pairs.difference_per_token, js(k.c) / k.lc - js(k.r) / k.lr),
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


class TestModifiers(unittest.TestCase):
    def setUp(self):
        self.k = Case(1, scale=1.0)

    def losses(self, objective, **more):
        return pair_losses(
            pair_logps(*self.k.logps(), self.k.batch(), objective), objective, **more
        )

    def test_divergences(self):
        k = self.k
        scores = {
            "reverse_kl": lambda x: x,
            # f'(t) of t = exp(x)
            "forward_kl": lambda x: 1 - 1 / np.exp(x),
            "js": lambda x: np.log(2 * np.exp(x) / (1 + np.exp(x))),
            "alpha": lambda x: (np.exp(x) ** (0.3 - 1) - 1) / (0.3 - 1),
        }
        self.assertEqual(set(scores), set(DIVERGENCES))
        # Of means over tokens, a constant of a score counts too.
        names = [name for name, spec in LOSSES.items() if spec.by_difference]
        for name, f in scores.items():
            more = {"f_divergence": name}
            if name == "alpha":
                more["f_alpha"] = 0.3
            for loss in names:
                objective, batch = make(loss, k, **more), batch_for(loss, k)
                pairs = pair_logps(*k.logps(), batch, objective)
                with self.subTest(divergence=name, loss=loss):
                    np.testing.assert_allclose(
                        pair_losses(pairs, objective),
                        FORMULAS[loss][1](Seen(k, f)),
                        rtol=1e-4,
                        atol=1e-5,
                    )
                    # Rewards stay log-ratios.
                    chosen, _ = pair_rewards(pairs, objective)
                    expected = k.beta * k.c
                    np.testing.assert_allclose(chosen, expected, rtol=1e-4, atol=1e-6)

    def test_divergences_are_finite_far_out(self):
        for name in DIVERGENCES:
            for alpha in (0.5, 2.0) if name == "alpha" else (0.5,):
                for loss in ("sigmoid", "sigmoid_norm"):
                    objective = Objective(
                        loss_type=loss, f_divergence=name, f_alpha=alpha
                    )
                    for far in (1e4, -1e4):
                        k = Case()
                        k.pc, k.pr = k.rc + far, k.rr - far
                        policy, reference = k.logps()
                        f = lambda x, o=objective, k=k, y=reference: pair_losses(
                            pair_logps(x, y, k.batch(), o), o
                        ).sum()
                        value, gradient = mx.value_and_grad(f)(policy)
                        with self.subTest(divergence=name, alpha=alpha, far=far):
                            self.assertTrue(np.isfinite(value.item()))
                            self.assertTrue(mx.isfinite(gradient).all().item())

    def test_alpha_is_that_of_the_paper_from_the_other_end(self):
        k = self.k
        for paper in (0.25, 0.5, 0.75):
            objective = Objective(k.beta, f_divergence="alpha", f_alpha=1 - paper)
            # The reward is beta f'(t) of t = exp(log-ratio), and f'(t) is
            u = lambda x, a=paper: (1 - np.exp(x) ** -a) / a
            expected = -logsig(k.beta * (u(k.c) - u(k.r)))
            np.testing.assert_allclose(self.losses(objective), expected, rtol=1e-4)

    def test_alpha_of_one_is_the_limit(self):
        one = Objective(self.k.beta, f_divergence="alpha", f_alpha=1.0)
        near = Objective(self.k.beta, f_divergence="alpha", f_alpha=1.001)
        plain = self.losses(Objective(self.k.beta))
        np.testing.assert_array_equal(self.losses(one), plain)
        np.testing.assert_allclose(self.losses(near), plain, rtol=1e-2)

    def test_several_losses_are_added(self):
        k = self.k
        objective = Objective(
            k.beta, ["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]
        )
        expected = -0.8 * logsig(k.beta * k.h)
        expected -= 0.2 * (logsig(k.beta * k.c) + logsig(-k.beta * k.r))
        np.testing.assert_allclose(
            self.losses(objective), expected + token_mean(k), rtol=1e-5
        )

    def test_without_a_reference(self):
        k = self.k
        objective = Objective(k.beta, reference_free=True)
        self.assertFalse(objective.needs_reference)
        expected = -logsig(k.beta * (k.pc - k.pr))
        np.testing.assert_allclose(self.losses(objective), expected, rtol=1e-4)
        for name, reward in (
            ("cpo", k.beta * k.pc),
            ("simpo", k.beta * k.pc / k.lc),
            ("orpo", k.beta * k.pc / k.lc),
            ("alphapo", k.beta * alpha_reward(k.pc / k.lc, 0.25)),
        ):
            objective = Objective(k.beta, name)
            pairs = pair_logps(*k.logps(), k.batch(), objective)
            np.testing.assert_allclose(
                pair_rewards(pairs, objective)[0], reward, rtol=1e-5
            )

    def test_alphapo_of_zero_is_simpo(self):
        expected = self.losses(Objective(0.2, "simpo", gamma=0.3))
        for alpha, rtol in ((0.0, 0), (1e-5, 1e-3), (-1e-5, 1e-3)):
            objective = Objective(0.2, "alphapo", gamma=0.3, alphapo_alpha=alpha)
            np.testing.assert_allclose(self.losses(objective), expected, rtol=rtol)

    def test_confidences_multiply(self):
        doubled = self.losses(Objective(), confidences=2 * mx.ones((5,)))
        np.testing.assert_allclose(doubled, 2 * self.losses(Objective()))
        batch = self.k.batch()
        confidences = mx.arange(10.0)
        _, values = loss_and_values(
            *self.k.logps(), batch, Objective(use_weighting=True), confidences
        )
        expected = self.losses(Objective()) * (mx.arange(5.0) * mx.arange(5.0, 10.0))
        np.testing.assert_allclose(values["losses"], expected, rtol=1e-6)

    def test_logps_as_an_objective_reads_them(self):
        batch = {"any": 1}
        for settings, name in (
            ({}, "sequence_logps"),
            ({"ld_alpha": 0.5}, "sequence_logps"),
            ({"use_weighting": True}, "weighted_sequence_logps"),
        ):
            objective = Objective(**settings)
            with mock.patch.object(preference_step.answers, name) as called:
                answer_logps("model", batch, objective, gradient=True)
            called.assert_called_once_with(
                "model", batch, gradient=True, ld_alpha=objective.ld_alpha
            )

    def test_data_weights(self):
        # Of likelihoods they weigh each pair's tokens in the mean, too.
        for name, (_, formula, _) in FORMULAS.items():
            k = case_for(name)
            k.w = np.array([1.0, 1.0, 2.5, 2.5, 0.25])[: len(k.pc)]
            objective, batch = make(name, k), batch_for(name, k)
            loss, values = loss_and_values(*k.logps(), batch, objective)
            with self.subTest(loss=name):
                expected = (formula(k) * k.w).sum()
                self.assertAlmostEqual(loss.item() / expected, 1, places=5)
                self.assertEqual(values["losses"].shape, k.pc.shape)
        k = self.k
        k.w[3] = 0
        loss, _ = loss_and_values(*k.logps(), k.batch(), Objective(k.beta))
        expected = (-logsig(k.beta * k.h) * k.w).sum()
        self.assertAlmostEqual(loss.item(), expected, places=5)


class TestCoupled(unittest.TestCase):
    """Losses of whole batches: filling, and several ranks."""

    NAMES = [name for name, spec in LOSSES.items() if spec.couples]

    def loss(self, name, k, policy, **more):
        objective, batch = make(name, k), batch_for(name, k) | more
        _, reference = k.logps()
        return loss_and_values(policy, reference, batch, objective)

    def test_filling_changes_nothing(self):
        for name in self.NAMES:
            k, short = Case(2), Case(2)
            for field in Case.FIELDS:
                setattr(short, field, getattr(k, field)[:3])
            weights = mx.array([1.0, 1.0, 1.0, 0.0, 0.0])
            filled, _ = self.loss(name, k, k.logps()[0], weights=weights)
            alone, _ = self.loss(name, short, short.logps()[0])
            with self.subTest(loss=name):
                self.assertAlmostEqual(filled.item(), alone.item(), places=5)

    def test_ranks_together_are_one(self):
        for name in self.NAMES:
            k = Case(3, pairs=4)
            whole = lambda x: self.loss(name, k, x)[0]
            expected, gradient = mx.value_and_grad(whole)(k.logps()[0])
            total, found = 0.0, np.zeros(8)
            for rank in range(2):
                mine = slice(2 * rank, 2 * rank + 2)
                part = Case(3, pairs=4)
                for field in Case.FIELDS:
                    setattr(part, field, getattr(k, field)[mine])
                batch, objective = batch_for(name, k), make(name, k)
                everyone = pair_logps(*k.logps(), batch, objective)

                def gather(arrays, mine=mine, everyone=everyone):
                    def put(key, own):
                        x = mx.stop_gradient(getattr(everyone, key))
                        return mx.concatenate([x[: mine.start], own, x[mine.stop :]])

                    return {key: put(key, x) for key, x in arrays.items()}, mine

                with mock.patch.object(coupled, "gather_pairs", gather):
                    f = lambda x, part=part: self.loss(name, part, x)[0]
                    loss, grad = mx.value_and_grad(f)(part.logps()[0])
                total += loss.item()
                found.reshape(2, 4)[:, mine] = np.array(grad).reshape(2, 2)
            with self.subTest(loss=name):
                self.assertAlmostEqual(total, expected.item(), places=5)
                np.testing.assert_allclose(found, gradient, rtol=1e-4, atol=1e-6)

    def test_the_baseline_is_not_negative(self):
        k = Case(0)
        k.pr = k.rr - 3
        pairs = pair_logps(*k.logps(), batch_for("kto", k), make("kto", k))
        self.assertEqual(kl_baseline(pairs).item(), 0.0)
        ahead = replace(pairs, rejected=pairs.reference_rejected + 2)
        self.assertIsInstance(ahead, PairLogps)
        self.assertAlmostEqual(kl_baseline(ahead).item(), 2.0, places=5)
        above = lambda x: kl_baseline(replace(ahead, rejected=x))
        self.assertFalse(mx.grad(above)(ahead.rejected).any().item())

    def test_labelled_answers_are_right_beyond_the_scaled_baseline(self):
        model, batch = tiny_model("lora"), collate_pairs(random_pairs(4))
        # The baseline is 10 nats, 1 as a reward.
        moved = mx.array([15.0, 15.0, 5.0, 15.0, 10.0, 10.0, 10.0, 10.0])
        batch["reference_logps"] = sequence_logps(model, batch) - moved
        batch["labels"] = mx.array([1.0, 1.0, 1.0, 0.0])
        objective = Objective(0.1, "kto")
        _, metrics = dpo_step(model, None, batch, optim.SGD(0.0), objective=objective)
        self.assertEqual(metrics["rewards/accuracies"].item(), 0.5)
        self.assertAlmostEqual(metrics["rewards/chosen"].item(), 3.5 / 3, places=5)

    def test_rankings_of_three_and_two(self):
        # a > b > c, the last with a copy of the best; then d > e, and a copy of it.
        scores = np.array([1.0, 0.5, -1.0, 2.0, 0.3])
        chosen, rejected = scores[[0, 0, 3, 3]], scores[[1, 2, 4, 4]]
        places = [0, -1, 0, -1, 1, 2, 1, -1]
        objective = Objective(1.0, "plackett_luce")
        batch = {"weights": mx.ones((4,)), "places": mx.array(places)}
        logps = mx.array(np.concatenate([chosen, rejected]))
        pairs = pair_logps(logps, mx.zeros((8,)), batch, objective)
        three = sum(np.logaddexp.reduce(scores[i:3]) - scores[i] for i in range(2))
        two = np.logaddexp(2.0, 0.3) - 2.0
        np.testing.assert_allclose(
            pair_losses(pairs, objective), [three, three, two, two], rtol=1e-5
        )


if __name__ == "__main__":
    unittest.main()
