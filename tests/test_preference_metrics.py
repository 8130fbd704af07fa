# Copyright © 2026 MLX Contributors

import io
import math
import unittest
from unittest import mock

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from tiny import (
    Pairs,
    Recorder,
    pair,
    random_pairs,
    tiny_model,
    train,
    weights_of,
)

from mlx_lm.preference.measure.metrics import (
    OVER,
    SUMS,
    hidden_metrics,
    mean_metrics,
    preference_sums,
)
from mlx_lm.preference.measure.window import MetricsWindow
from mlx_lm.preference.objective.objective import Objective
from mlx_lm.preference.watch import gradients
from mlx_lm.preference.watch.gradients import gradient_report


def sums_by_hand(weights=(1.0, 1.0), kl=True):
    """Two pairs with answers of 2, 4 (chosen) and 1, 5 (rejected) tokens."""
    return preference_sums(
        losses=mx.array([0.2, 0.6]),
        chosen_rewards=mx.array([0.5, -0.5]),
        rejected_rewards=mx.array([0.1, 0.5]),
        policy_logps=mx.array([-4.0, -12.0, -3.0, -20.0]),
        reference_logps=mx.array([-5.0, -10.0, -3.0, -9.0]),
        lengths=mx.array([[3, 5], [1, 5], [3, 4], [1, 6]]),
        weights=mx.array(weights),
        kl=mx.array([0.4, 0.4, 0.2, 1.4]) if kl else None,
    )


class TestPreferenceMetrics(unittest.TestCase):
    def check(self, metrics, **expected):
        for key, value in expected.items():
            key = key.replace("__", "/")
            self.assertAlmostEqual(metrics[key].item(), value, places=5, msg=key)

    def test_two_pairs_by_hand(self):
        expected = dict(
            loss=0.4,
            rewards__chosen=0.0,
            rewards__rejected=0.3,
            rewards__margins=-0.3,
            rewards__accuracies=0.5,
            logps__chosen=-8.0,
            logps__rejected=-11.5,
            # -4 < -3 and -12 > -20
            logps__accuracies=0.5,
            # -2 > -3 and -3 > -4
            logps__accuracies_per_token=1.0,
            reference_logps__accuracies=0.0,
            # -2.5 > -3 and -2.5 < -1.8
            reference_logps__accuracies_per_token=0.5,
            kl=2.4 / 12,
            perplexity__policy=math.exp(16 / 6),
            perplexity__reference=math.exp(15 / 6),
        )
        self.check(mean_metrics(sums_by_hand()), **expected)
        # Whatever is summed is tested here.
        summed = {*OVER} - {"kl_estimate"}
        self.assertLessEqual(summed, {k.replace("__", "/") for k in expected})

    def test_estimate_has_its_own_name(self):
        metrics = mean_metrics(sums_by_hand(kl=False))
        self.assertNotIn("kl", metrics)
        # Log-ratios 1, -2, 0 and -11: half their squares, a token.
        self.check(metrics, kl_estimate=(0.5 + 2.0 + 60.5) / 12)

    def test_labelled_answers(self):
        sums = preference_sums(
            losses=mx.array([0.2, 0.6, 0.4, 9.0]),
            chosen_rewards=mx.array([0.5, -0.5, 0.2, 9.0]),
            rejected_rewards=mx.array([9.0, 9.0, 9.0, 9.0]),
            policy_logps=mx.array([-4.0, -12.0, -6.0, 9.0, 9.0, 9.0, 9.0, 9.0]),
            reference_logps=mx.zeros((8,)),
            lengths=mx.array([[1, 3], [1, 5], [1, 4], [1, 9]] + [[1, 9]] * 4),
            weights=mx.array([1.0, 1.0, 1.0, 0.0]),
            labels=mx.array([1.0, 0.0, 1.0, 1.0]),
            baseline=mx.array(0.3),
        )
        objective = Objective(loss_type="kto")
        metrics = mean_metrics(sums, hidden=hidden_metrics(objective))
        self.assertNotIn("logps/accuracies", metrics)
        self.check(
            metrics,
            loss=0.4,
            rewards__chosen=0.35,
            rewards__rejected=-0.5,
            rewards__margins=0.85,
            # 0.5 and -0.5 are on their side of 0.3, 0.2 is not.
            rewards__accuracies=2 / 3,
            logps__chosen=-5.0,
            logps__rejected=-12.0,
            perplexity__policy=math.exp(10 / 5),
        )

    def test_at_the_start_no_labelled_answer_is_right(self):
        two, zeros = mx.ones((2,)), mx.zeros((4,))
        sums = preference_sums(
            *(two, 0 * two, 0 * two, zeros, zeros, mx.array([[1, 2]] * 4), two),
            labels=mx.array([1.0, 0.0]),
            baseline=mx.array(0.0),
        )
        self.assertEqual(sums["rewards/accuracies"].item(), 0)

    def test_weights_are_for_the_loss_alone(self):
        self.check(
            mean_metrics(sums_by_hand((3.0, 1.0))),
            # 3 x 0.2 and 1 x 0.6, of two pairs.
            loss=0.6,
            rewards__accuracies=0.5,
            kl=2.4 / 12,
        )

    def test_without_a_reference_nothing_is_said_of_it(self):
        hidden = hidden_metrics(Objective(loss_type="orpo"))
        metrics = mean_metrics(sums_by_hand(kl=False), hidden=hidden)
        self.assertFalse([k for k in metrics if "reference" in k or "kl" in k])
        # A test runs one.
        for name, hides in (("orpo", False), ("kto", True)):
            hidden = hidden_metrics(Objective(loss_type=name), tested=True)
            self.assertEqual("reference_logps/accuracies" in hidden, hides)
            self.assertNotIn("perplexity/reference", hidden)

    def test_filling_does_not_count(self):
        metrics = mean_metrics(sums_by_hand((1.0, 0.0)))
        self.check(metrics, loss=0.2, rewards__accuracies=1.0, kl=0.6 / 3)

    def test_equal_rewards_are_not_accurate(self):
        one, two = mx.ones((1,)), mx.zeros((2,))
        lengths = mx.array([[1, 2], [1, 2]])
        sums = preference_sums(one, one, one, two, two, lengths, one)
        self.check(mean_metrics(sums), rewards__accuracies=0.0, logps__accuracies=0.0)

    def test_the_perplexity_of_one_token(self):
        one, logps = mx.ones((1,)), mx.array([-2.0, -7.0])
        lengths = mx.array([[1, 2], [1, 4]])
        sums = preference_sums(one, one, one, logps, logps / 2, lengths, one)
        found = mean_metrics(sums)
        self.check(found, perplexity__policy=math.exp(2), perplexity__reference=math.e)

    def test_an_empty_answer_gives_no_nan(self):
        one, zero = mx.ones((1,)), mx.zeros((2,))
        lengths = mx.array([[4, 4], [4, 4]])
        sums = preference_sums(one, one, one, zero, zero, lengths, one)
        for name, value in mean_metrics(sums).items():
            self.assertTrue(math.isfinite(value.item()), name)

    def test_sums_may_be_added(self):
        single = mean_metrics(sums_by_hand())
        triple = mean_metrics({k: 3 * x for k, x in sums_by_hand().items()})
        for name, value in single.items():
            self.assertAlmostEqual(value.item(), triple[name].item(), places=5)

    def test_window_counts_and_starts_anew(self):
        window = MetricsWindow()
        window.add(sums_by_hand(kl=False), 18, 30)
        window.seconds = 2.0
        report = window.report()
        self.assertAlmostEqual(report["padding"], 1 - 18 / 30)
        self.assertAlmostEqual(report["pairs_per_second"], 1.0)
        self.assertAlmostEqual(report["tokens_per_second"], 10.0)
        window.add(sums_by_hand(kl=False), 20, 20)
        report = MetricsWindow.report(window)
        self.assertEqual((report["trained_pairs"], report["padding"]), (4.0, 0.0))


class TestSpeed(unittest.TestCase):
    def test_compiling_is_no_part_of_the_speed(self):
        model = tiny_model("lora")
        recorder = Recorder()
        pairs = Pairs([pair([1, 2, 3], [4, 5], [6, 7])] * 8)
        settings = {"batch_size": 2, "iters": 4, "steps_per_report": 2}
        train(model, pairs, callback=recorder, compile=True, **settings)
        first, second = recorder.train
        self.assertGreater(first["compile_seconds"], 0)
        self.assertEqual(second["compile_seconds"], 0)
        self.assertGreater(first["pairs_per_second"], 0)
        self.assertEqual(first["trained_pairs"], 4)
        train(model, pairs, callback=recorder, compile=False, **settings)
        self.assertEqual(recorder.train[2]["compile_seconds"], 0)

    def test_untimed_pairs_are_left_out(self):
        window = MetricsWindow()
        for seconds, compiled in ((10.0, True), (2.0, False)):
            sums = dict.fromkeys(SUMS, mx.array(3.0))
            window.add(sums, 6, 6)
            window.time(seconds, sums if compiled else None)
        report = window.report()
        self.assertEqual(report["pairs_per_second"], 1.5)
        self.assertEqual((report["compile_seconds"], report["trained_pairs"]), (10, 6))


class TestGradientReport(unittest.TestCase):
    def test_numbers_by_hand(self):
        gradients = {"a": {"x": mx.array([0.0, -3.0]), "y": mx.array([[4.0, 0, 0]])}}
        before = {"a": {"x": mx.array([1.0, 0.0]), "y": mx.array([[0.0, 0, 0]])}}
        after = {"a": {"x": mx.array([1.0, 0.3]), "y": mx.array([[-0.4, 0, 0]])}}
        (row,) = gradient_report(gradients, before, after).values()
        expected = {"norm": 5, "largest": 4, "median": 0, "zeros": 0.6}
        for key, value in expected.items():
            self.assertAlmostEqual(row[key], value)
        self.assertAlmostEqual(row["update_ratio"], 0.5, places=6)
        self.assertAlmostEqual(row["p99"], np.percentile([0, 3, 4, 0, 0], 99))

    def test_a_run_reports_every_module(self):
        model, recorder = tiny_model("lora"), Recorder()
        start = weights_of(model)
        train(
            model,
            random_pairs(4),
            optimizer=optim.SGD(0.5),
            callback=recorder,
            iters=2,
            steps_per_report=1,
            max_grad_norm=None,
            debug_gradients=True,
        )
        for info in recorder.train:
            modules = info["gradients"]
            self.assertEqual(set(modules), {name.rpartition(".")[0] for name in start})
            total = math.sqrt(sum(m["norm"] ** 2 for m in modules.values()))
            self.assertAlmostEqual(total, info["grad_norm"], places=5)
        # A fresh adapter's first matrix has no gradient, its second one has.
        first = recorder.train[0]["gradients"]
        self.assertTrue(all(m["zeros"] >= 0.2 for m in first.values()))
        self.assertGreater(max(m["update_ratio"] for m in first.values()), 0)

    def test_weights_of_16_bits(self):
        for dtype in (mx.bfloat16, mx.float16):
            model, recorder = tiny_model("full"), Recorder()
            model.set_dtype(dtype)
            more = {"iters": 1, "debug_gradients": True}
            train(model, random_pairs(4), callback=recorder, **more)
            modules = recorder.train[0]["gradients"]
            self.assertGreater(max(m["update_ratio"] for m in modules.values()), 0)

    def test_a_report_that_fails_ends_no_run(self):
        recorder, screen = Recorder(), io.StringIO()
        more = {"iters": 2, "steps_per_report": 1, "debug_gradients": True}
        with (
            mock.patch.object(
                gradients, "gradient_report", side_effect=KeyError("odd")
            ),
            mock.patch.object(gradients, "rprint", screen.write),
        ):
            train(tiny_model("lora"), random_pairs(4), callback=recorder, **more)
        self.assertEqual(len(recorder.train), 2)
        self.assertNotIn("gradients", recorder.train[-1])
        self.assertIn("No gradients are reported: KeyError: 'odd'", screen.getvalue())

    def test_without_the_flag_nothing_is_added(self):
        recorder = Recorder()
        train(tiny_model("lora"), random_pairs(4), callback=recorder, iters=1)
        self.assertNotIn("gradients", recorder.train[0])


if __name__ == "__main__":
    unittest.main()
