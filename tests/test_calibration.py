# Copyright © 2026 MLX Contributors

import math
import unittest

import numpy as np

from mlx_lm.preference.measure.pair_metrics import (
    Reliability,
    brier_score,
    expected_calibration_error,
    preference_probabilities,
    reliability_curve,
)


class TestCalibration(unittest.TestCase):
    def test_probabilities_are_a_sigmoid_at_any_margin(self):
        margins = np.array([-1e4, -2.0, 0.0, 0.3, 1e4])
        expected = [0.0, 1 / (1 + math.exp(2.0)), 0.5, 1 / (1 + math.exp(-0.3)), 1.0]
        with np.errstate(over="raise"):
            ours = preference_probabilities(margins)
        np.testing.assert_allclose(ours, expected, atol=1e-15)

    def test_by_hand(self):
        # Confidences .55, .58 (wrong, right) and .92 (right), .92 (wrong), 1 (right).
        p = np.array([0.45, 0.58, 0.92, 0.08, 1.0])
        curve = reliability_curve(p)
        self.assertEqual(curve.pairs.tolist(), [0, 2, 0, 0, 0, 0, 0, 0, 2, 1])
        self.assertAlmostEqual(curve.confidence[1], 0.565)
        self.assertAlmostEqual(curve.accuracy[1], 0.5)
        self.assertAlmostEqual(curve.confidence[8], 0.92)
        self.assertTrue(np.isnan(curve.accuracy[0]))
        ece = (2 * 0.065 + 2 * 0.42 + 1 * 0.0) / 5
        self.assertAlmostEqual(expected_calibration_error(curve), ece)
        brier = (0.55**2 + 0.42**2 + 0.08**2 + 0.92**2 + 0) / 5
        self.assertAlmostEqual(brier_score(p), brier)

    def test_who_knows_nothing_is_calibrated(self):
        p = preference_probabilities(np.zeros(9))
        self.assertEqual(brier_score(p), 0.25)
        self.assertEqual(expected_calibration_error(reliability_curve(p)), 0.0)

    def test_a_drawn_world_is_calibrated_and_a_surer_policy_is_not(self):
        rng = np.random.default_rng(0)
        margins = rng.normal(size=40_000) * 2
        # Whoever is preferred is drawn with the probability that the margin says.
        flips = rng.random(len(margins)) > preference_probabilities(margins)
        drawn = np.where(flips, -margins, margins)
        fair, sure = (
            expected_calibration_error(
                reliability_curve(preference_probabilities(scale * drawn))
            )
            for scale in (1, 3)
        )
        self.assertLess(fair, 0.01)
        self.assertGreater(sure, 0.08)

    def test_no_pairs(self):
        curve = reliability_curve(np.array([]))
        self.assertIsInstance(curve, Reliability)
        self.assertTrue(math.isnan(expected_calibration_error(curve)))


if __name__ == "__main__":
    unittest.main()
