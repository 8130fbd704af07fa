# Copyright © 2026 MLX Contributors

"""Settings of an objective that make no sense, alone or together."""

import math
import unittest
from dataclasses import fields

import mlx.core as mx
import numpy as np

from mlx_lm.preference.objective.losses import LOSSES
from mlx_lm.preference.objective.objective import Objective, objective_of
from mlx_lm.tuner.losses import dpo_loss, preference_loss


class TestChecks(unittest.TestCase):
    REFUSED = {
        "beta must be a finite number, got nan": {"beta": float("nan")},
        "beta must be a number, got True": {"beta": True},
        "Unknown loss_type 'dop'": {"loss_type": "dop"},
        r"Unknown loss_type \['sigmoid'\]": {"loss_type": [["sigmoid"]]},
        "f_divergence does not go with sft": {
            "loss_type": "sft",
            "f_divergence": "js",
        },
        "loss_type must be a name or a list": {"loss_type": []},
        "names a loss twice": {"loss_type": ["sft", "sft"]},
        "list of 2, one for each": {
            "loss_type": ["sigmoid", "sft"],
            "loss_weights": [1],
        },
        "loss_weights must be positive": {"loss_weights": [0.0]},
        "kto learns from labels": {"loss_type": ["kto", "sigmoid"]},
        "sigmoid measures from a reference and simpo does not": {
            "loss_type": ["sigmoid", "simpo"]
        },
        "label_smoothing must be at least 0 and below 0.5": {"label_smoothing": 0.5},
        "hinge can't be smoothed": {"loss_type": "hinge", "label_smoothing": 0.1},
        "exo_pair needs label_smoothing": {"loss_type": "exo_pair"},
        "Unknown f_divergence 'kl'": {"f_divergence": "kl"},
        "f_divergence does not go with nca_pair": {
            "loss_type": "nca_pair",
            "f_divergence": "js",
        },
        "f_divergence needs a reference": {
            "f_divergence": "js",
            "reference_free": True,
        },
        "f_alpha is a setting of f_divergence alpha": {"f_alpha": 0.9},
        "reference_free does not go with dpop": {
            "loss_type": "dpop",
            "reference_free": True,
        },
        "use_weighting does not go with aot": {
            "loss_type": "aot",
            "use_weighting": True,
        },
        "use_weighting does not go with sft": {
            "loss_type": ["sigmoid", "sft"],
            "use_weighting": True,
        },
        "ld_alpha must be at least 0 and at most 1": {"ld_alpha": 2},
        "ld_alpha does not go with simpo": {"loss_type": "simpo", "ld_alpha": 0.5},
        "ld_alpha does not go with kto": {"loss_type": "kto", "ld_alpha": 0.5},
        "gamma is a setting of simpo": {"gamma": 0.2},
        "dpop_lambda is a setting of dpop": {"dpop_lambda": 1.0},
        "desirable_weight is a setting of kto": {"desirable_weight": 2.0},
        "discopop_tau must be above 0": {
            "loss_type": "discopop",
            "discopop_tau": 0,
        },
    }

    def test_refused(self):
        for message, settings in self.REFUSED.items():
            with self.subTest(message=message):
                with self.assertRaisesRegex(ValueError, message):
                    Objective(**settings)

    def test_every_number_has_a_range(self):
        for field in fields(Objective):
            if isinstance(field.default, float):
                with self.assertRaisesRegex(ValueError, f"{field.name} must be"):
                    Objective(**{field.name: float("nan")})

    def test_what_an_objective_needs(self):
        for name, spec in LOSSES.items():
            e = 0.1 if spec.smoothing == "must" else 0.0
            objective = Objective(loss_type=name, label_smoothing=e)
            with self.subTest(loss=name):
                self.assertEqual(objective.needs_reference, spec.reference)
                self.assertEqual(objective.couples, spec.couples)
                self.assertEqual(objective.data, spec.data)
                if spec.reference:
                    self.assertEqual(objective.rewards_are, "log-ratios")
        for names, takes in (
            (["sigmoid", "sft"], True),
            (["sft"], False),
            (["sigmoid", "apo_zero"], False),
        ):
            self.assertIs(Objective(loss_type=names).takes_margins, takes)
        self.assertEqual(Objective(loss_type="kto").noun, "answers")
        for name in LOSSES:
            compares = Objective(
                label_smoothing=0.1 * (name == "exo_pair"), loss_type=name
            )
            self.assertEqual(compares.compares_prompts, name == "kto")
        self.assertEqual(Objective(loss_type="plackett_luce").noun, "pairs")
        self.assertEqual(Objective(loss_type="aot").least_batch, 2)

    def test_settings_have_help_and_are_taken_from_others(self):
        for field in fields(Objective):
            self.assertTrue(field.metadata["help"], field.name)
        settings = Objective(0.3, "simpo", gamma=0.2)
        self.assertEqual(objective_of(settings), settings)

    def test_lengths_and_data_are_asked_for(self):
        x = mx.zeros((2,))
        with self.assertRaisesRegex(ValueError, "ipo needs the answers' lengths"):
            preference_loss(x, x, x, x, loss_type="ipo")
        with self.assertRaisesRegex(ValueError, "kto learns from labels"):
            preference_loss(x, x, x, x, loss_type="kto", lengths=mx.ones((2, 2)))
        losses, *_ = preference_loss(
            x - 4, x - 4, x, x, 0.5, loss_type="sigmoid_norm", lengths=mx.ones((2, 2))
        )
        np.testing.assert_allclose(losses, np.log(2), rtol=1e-6)


class TestLengths(unittest.TestCase):
    def test_lengths_come_from_the_masks(self):
        x, targets = mx.zeros((1, 3, 4)), mx.array([[1, 2, 3]])
        mask = mx.array([[1, 1, 0]])
        kwargs = {"chosen_targets": targets, "rejected_targets": targets}
        loss = dpo_loss(x, x, x, x, **kwargs, chosen_mask=mask, loss_type="sft")
        self.assertAlmostEqual(loss.item(), math.log(4), places=6)


if __name__ == "__main__":
    unittest.main()
