# Copyright © 2026 MLX Contributors

import math
import unittest

import mlx.core as mx
import mlx.optimizers as optim
from tiny import Recorder, random_pairs, tiny_model, train

from mlx_lm.dpo import resolve_args
from mlx_lm.preference.policy.optimizer import build_learning_rate
from mlx_lm.preference.run.setup import make_optimizer
from mlx_lm.tuner.utils import build_schedule


def rates(schedule, steps):
    return [schedule(mx.array(step)).item() for step in steps]


class TestSchedules(unittest.TestCase):
    def assert_close(self, got, expected):
        self.assertEqual(len(got), len(expected))
        for a, b in zip(got, expected):
            self.assertAlmostEqual(a, b, places=6)

    def test_constant(self):
        for schedule in (None, "constant", {"name": "constant"}):
            self.assertEqual(build_learning_rate(0.5, 10, schedule), (0.5, []))
        rate, notices = build_learning_rate(0.5, 10, None, 4)
        self.assert_close(rates(rate, range(7)), [0, 1 / 8, 1 / 4, 3 / 8] + [0.5] * 3)
        self.assertEqual(notices, [])

    def test_linear(self):
        rate, _ = build_learning_rate(1.0, 10, {"name": "linear", "warmup_steps": 2})
        expected = [k / 2 if k < 2 else (10 - k) / 8 for k in range(11)]
        self.assert_close(rates(rate, range(11)), expected)

    def test_cosine(self):
        rate, _ = build_learning_rate(2.0, 12, {"name": "cosine", "warmup_steps": 4})
        expected = [
            k / 2 if k < 4 else 1 + math.cos(math.pi * (k - 4) / 8) for k in range(13)
        ]
        self.assert_close(rates(rate, range(13)), expected)

    def test_argument_wins_over_the_schedules_own_warmup(self):
        rate, _ = build_learning_rate(1.0, 9, {"name": "linear", "warmup_steps": 2}, 4)
        self.assert_close(rates(rate, [2, 4]), [0.5, 1])
        rate, _ = build_learning_rate(1.0, 9, {"name": "linear", "warmup_steps": 2}, 0)
        self.assert_close(rates(rate, [0]), [1])

    def test_warmup_longer_than_the_run_is_cut(self):
        rate, notices = build_learning_rate(
            1.0, 5, {"name": "cosine", "warmup_steps": 100}
        )
        self.assert_close(rates(rate, range(5)), [0, 0.25, 0.5, 0.75, 1])
        self.assertEqual(
            notices, ["warmup_steps 100 is longer than the run: cut to 4 of 5 updates."]
        )

    def test_mlx_lms_own_form(self):
        form = {"name": "cosine_decay", "arguments": [0.1, 20, 0.01], "warmup": 5}
        rate, notices = build_learning_rate(1.0, 7, form)
        self.assertEqual(notices, [])
        self.assert_close(rates(rate, range(9)), rates(build_schedule(form), range(9)))
        # The other spelling of warmup, in the form or as an argument.
        form.pop("warmup")
        want = rates(build_schedule({**form, "warmup": 3}), range(9))
        for got in (
            build_learning_rate(1.0, 7, {**form, "warmup_steps": 3}),
            build_learning_rate(1.0, 7, form, 3),
            build_learning_rate(1.0, 7, {**form, "warmup": 5}, 3),
        ):
            self.assert_close(rates(got[0], range(9)), want)

    def test_counts_are_optimizer_updates(self):
        rate, _ = build_learning_rate(1.0, 4, "linear", 2)
        optimizer = optim.SGD(learning_rate=rate)
        seen = []
        for _ in range(4):
            optimizer.apply_gradients({"w": mx.ones(1)}, {"w": mx.ones(1)})
            seen.append(optimizer.learning_rate.item())
        self.assert_close(seen, [0, 0.5, 1, 0.5])

    def test_a_run_that_accumulates_is_as_long_as_its_updates(self):
        args = resolve_args(["--iters", "7", "--learning-rate", "0.6"])
        args.lr_schedule, args.grad_accumulation_steps = "linear", 3
        optimizer, _ = make_optimizer(args, 9)
        recorder = Recorder()
        train(
            tiny_model("lora"),
            random_pairs(2),
            optimizer=optimizer,
            callback=recorder,
            **{"iters": 7, "grad_accumulation_steps": 3, "steps_per_report": 1},
        )
        # Updates follow batches 3, 6 and, because it is the last, 7.
        seen = [line["learning_rate"] for line in recorder.train]
        self.assert_close(seen[2:], [0.6] * 3 + [0.4, 0.2])

    def test_rates_that_an_optimizer_ignores(self):
        args = resolve_args(["--optimizer", "adafactor", "--learning-rate", "1e-5"])
        for own, notices in ((True, 1), (False, 0)):
            args.optimizer_config = {"adafactor": {"relative_step": own}}
            self.assertEqual(len(make_optimizer(args, 9)[1]), notices)

    def test_mistakes(self):
        cases = {
            "constant, linear, cosine": [
                {"name": "cosin"},
                {"name": "cosine", "warmup_step": 5},
                {"warmup_steps": 5},
                {"name": "no_such", "arguments": [1.0]},
                {"name": "cosine_decay", "arguments": [1.0, 5], "warm_up": 5},
            ],
            "lr_schedule .* is wrong": [
                {"name": "cosine_decay", "arguments": [1.0]},
                {"name": "cosine_decay", "arguments": []},
                {"name": "cosine_decay", "arguments": None},
                {"name": "cosine_decay", "arguments": {"init": 1.0}},
                {"name": "cosine_decay", "arguments": ["1e-5", 5]},
            ],
            "lr_schedule must have a name": [["cosine"], 5],
            "warmup_steps must be": [
                {"name": "cosine", "warmup_steps": "5"},
                {"name": "cosine", "warmup_steps": -1},
            ],
        }
        for pattern, schedules in cases.items():
            for schedule in schedules:
                with self.subTest(schedule=schedule):
                    with self.assertRaisesRegex(ValueError, pattern):
                        build_learning_rate(1.0, 10, schedule)


if __name__ == "__main__":
    unittest.main()
