# Copyright © 2026 MLX Contributors

import io
import json
import math
import re
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from rich.console import Console

from mlx_lm.cli_ui import _make_theme
from mlx_lm.preference.measure.pair_metrics import (
    brier_score,
    expected_calibration_error,
    length_groups,
    pair_metrics,
    preference_probabilities,
    reliability_curve,
    wilson_interval,
)
from mlx_lm.preference.measure.pair_scores import ScoredPairs
from mlx_lm.preference.objective.objective import Objective
from mlx_lm.preference.report.evaluate import keep_test
from mlx_lm.preference.report.table import metrics_table, print_test_table, short_names

# Three pairs: a right one whose chosen answer is shorter, a wrong one that is about
# as long, and a right one whose chosen answer is longer.
POLICY = np.array([[-2.0, -9.0], [-6.0, -5.0], [-4.0, -5.0]])
REFERENCE = np.array([[-3.0, -8.0], [-5.0, -5.5], [-6.0, -5.0]])
KL = np.array([[0.2, 0.6], [1.0, 0.4], [0.3, 0.5]])
TOKENS = np.array([[2, 6], [10, 9], [8, 4]])
MEANS = {"pairs": 3.0, "rewards/accuracies": 2 / 3, "kl": 3.0 / 39}


def scored():
    rewards = 0.5 * (POLICY - REFERENCE)
    return ScoredPairs(np.arange(3), POLICY, REFERENCE, KL, rewards, TOKENS)


def printed(runs, width):
    """The printed table of some runs."""
    console = Console(width=width, file=io.StringIO(), theme=_make_theme())
    print_test_table(console, metrics_table(runs))
    return console.file.getvalue()


class TestPairMetrics(unittest.TestCase):
    def test_wilson_interval(self):
        # From the closed form in rational steps: n = 10, 8 right.
        low, high = wilson_interval(0.8, 10)
        self.assertAlmostEqual(low, 0.4901625, places=6)
        self.assertAlmostEqual(high, 0.9433178, places=6)
        # Its ends are where |share - p| is 1.96 standard errors of p.
        for share, n in ((0.62, 200), (0.05, 40)):
            for p in wilson_interval(share, n):
                error = (p * (1 - p) / n) ** 0.5
                self.assertAlmostEqual(abs(share - p) / error, 1.959964, places=5)
        self.assertEqual(wilson_interval(0.0, 0), (0.0, 1.0))
        for share in (0.0, 1.0):
            low, high = wilson_interval(share, 30)
            self.assertTrue(0 <= low < high <= 1)

    def test_length_groups_are_a_partition(self):
        masks = length_groups(TOKENS)
        np.testing.assert_array_equal(sum(m.astype(int) for m in masks.values()), 1)
        self.assertEqual(
            [np.flatnonzero(m).tolist() for m in masks.values()], [[0], [1], [2]]
        )
        # A tenth of the longer answer is about as long.
        edge = np.array([[9, 10], [10, 9], [88, 99], [99, 88]])
        groups = [np.flatnonzero(m).tolist() for m in length_groups(edge).values()]
        self.assertEqual(groups, [[2], [0, 1], [3]])

    def test_by_hand(self):
        metrics = pair_metrics(MEANS, scored())
        expected = {
            "pairs": 3.0,
            "kl/chosen": 1.5 / 20,
            "kl/rejected": 1.5 / 19,
            "kl_per_answer/chosen": 0.5,
            "kl_per_answer/rejected": 0.5,
            "pairs/chosen_shorter": 1,
            "rewards/accuracies/chosen_shorter": 1.0,
            "rewards/accuracies/equal_length": 0.0,
            "rewards/accuracies/chosen_longer": 1.0,
            "logps/accuracies/equal_length": 0.0,
            "reference_logps/accuracies/equal_length": 1.0,
            "reference_logps/accuracies/chosen_longer": 0.0,
            "reference_calibration/brier": 0.25,
            "reference_calibration/ece": 0.0,
        }
        for name, value in expected.items():
            self.assertAlmostEqual(metrics[name], value, msg=name)
        margins = np.array([1.0, -0.75, 1.0])
        brier = np.mean((1 - 1 / (1 + np.exp(-margins))) ** 2)
        self.assertAlmostEqual(metrics["calibration/brier"], brier)
        self.assertEqual(sum(metrics["calibration/pairs"]), 3)
        self.assertLess(metrics["rewards/accuracies_low"], 2 / 3)
        self.assertGreater(metrics["rewards/accuracies_high"], 2 / 3)

    def test_what_other_data_has(self):
        metrics = pair_metrics(MEANS, scored(), Objective(loss_type="kto"))
        self.assertEqual(
            set(metrics) - set(MEANS),
            {"rewards/accuracies_low", "rewards/accuracies_high"},
        )
        free = pair_metrics(MEANS, scored(), Objective(loss_type="orpo"))
        self.assertFalse([k for k in free if k.startswith("reference_calibration")])

    def test_file_is_json_whatever_the_numbers(self):
        with tempfile.TemporaryDirectory() as folder:
            metrics = pair_metrics(MEANS, scored()) | {"loss": float("inf")}
            rows = SimpleNamespace(kind="labels")
            keep_test(folder, metrics, rows, scored(), {"test/data": "d"})
            (path,) = Path(folder).iterdir()
            self.assertEqual(path.name, "test_metrics.json")
            read = json.loads(path.read_text(), parse_constant=self.fail)
        self.assertIsNone(read["loss"])
        self.assertIn(None, read["calibration/accuracy"])
        for name, value in read.items():
            self.assertIsInstance(value, (int, float, list, str, type(None)), name)


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
        error = expected_calibration_error(reliability_curve(np.array([])))
        self.assertTrue(math.isnan(error))


class TestTable(unittest.TestCase):
    def test_start_has_no_rewards(self):
        table = metrics_table({"policy": pair_metrics(MEANS, scored())})
        rows = {row[0]: row[1:] for row in table}
        self.assertEqual(table[0], ["test · 3 pairs", "start", "policy"])
        self.assertEqual(rows["reward accuracy"], ["-", "66.7%"])
        self.assertEqual(rows["  95 % interval"], ["-", "20.8%-93.9%"])
        self.assertEqual(rows["Brier score"][0], "0.250")
        # The same label stands below reward accuracy and below chosen likelier.
        longer = [r[1:] for r in table if r[0] == "  chosen is longer (n = 1)"]
        self.assertEqual(longer, [["-", "100.0%"], ["0.0%", "100.0%"]])
        self.assertTrue(all(len(row) == 3 for row in table))

    def test_missing_numbers(self):
        runs = {"a": {"pairs": 3.0, "kl": 0.5}, "b": {"pairs": 3.0}}
        self.assertEqual(
            metrics_table(runs, None)[1:],
            [["KL from it, per token (nats)", "0.5000", "-"]],
        )

    def test_another_model_is_not_what_the_text_was_before(self):
        text = {"retained_text/before": 10.0, "retained_text/after": 12.0}
        for before, cell in (("start", "10.00"), ("reference", "-")):
            (_, row) = metrics_table({"policy": {"pairs": 3.0} | text}, before)
            self.assertEqual(row[1:], [cell, "12.00"])

    def test_several_runs_fit_80_columns(self):
        metrics = pair_metrics(MEANS, scored())
        # Not as markup.
        names = [f"[b]run {i}" for i in range(8)]
        text = printed(dict.fromkeys(names, metrics), 80)
        self.assertLessEqual(max(map(len, text.splitlines())), 80)
        heads = [x for x in text.splitlines() if "test ·" in x]
        self.assertGreater(len(heads), 1)
        self.assertTrue(all("start" in head for head in heads))
        self.assertEqual(re.findall(r"\[b\]run \d", "".join(heads)), names)

    def test_a_narrow_terminal_cuts_nothing_off(self):
        text = printed({"policy": pair_metrics(MEANS, scored())}, 20)
        self.assertIn("  reward accuracy                    -        66.7%\n", text)

    def test_short_names(self):
        long = "an_adapter_folder_with_a_long_name"
        for folders, names in (
            (["runs/a", "runs/b"], ["a", "b"]),
            (["x/run", "y/run/"], ["x/run", "y/run"]),
            ([f"x/{long}"], ["…ith_a_long_name"]),
            ([f"a/{long}", f"b/{long}"], ["1 h_a_long_name", "2 h_a_long_name"]),
        ):
            self.assertEqual(short_names(folders), names)


if __name__ == "__main__":
    unittest.main()
