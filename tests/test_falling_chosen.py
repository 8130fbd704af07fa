# Copyright © 2026 MLX Contributors

import contextlib
import io
import json
import math
import tempfile
import unittest
from pathlib import Path

from mlx_lm.preference.files import json_text
from mlx_lm.preference.watch.falling_chosen import FallingChosen


def report(it, ratio, part=""):
    """A report whose chosen answers' log-probs are so many times their start's."""
    start = -1.7
    values = {
        "loss": 0.5,
        "perplexity/policy": math.exp(-ratio * start),
        "perplexity/reference": math.exp(-start),
        "logps/chosen": 60 * ratio * start,
    }
    return {"iteration": it, **{f"{part}{k}": v for k, v in values.items()}}


def said(watch, reports):
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
        for info in reports:
            is_val = "val_loss" in info
            kind = watch.on_val_loss_report if is_val else watch.on_train_loss_report
            kind(info)
    return screen.getvalue().splitlines()


class TestFallingChosen(unittest.TestCase):
    def test_once_and_not_before(self):
        reports = [report(i, 1 + i / 100) for i in range(0, 60, 5)]
        (line,) = said(FallingChosen(), reports)
        # 1.25 is the first above 1.2, 1.30 the second in a row.
        self.assertIn("Step 30: logps/chosen has fallen 20 %", line)
        for word in ("learning_rate", "sft", "beta"):
            self.assertIn(word, line)
        self.assertLessEqual(len(line), 120)
        reports = [report(i, 1 + i / 100, "val_") for i in range(0, 60, 5)]
        (line,) = said(FallingChosen(), reports)
        self.assertIn("Step 25", line)

    def test_a_single_odd_report_or_a_rise_is_none(self):
        ratios = (1.0, 1.3, 1.1, 1.3, 1.1, 0.5, 1.19, 1.2)
        reports = [report(i, ratio) for i, ratio in enumerate(ratios)]
        self.assertEqual(said(FallingChosen(), reports), [])

    def test_another_reference_compares_validations(self):
        watch = FallingChosen(frozen_start=False)
        reports = [report(0, 2.0, "val_"), report(5, 9.0), report(10, 9.0)]
        reports += [report(10, 2.3, "val_")]
        self.assertEqual(said(watch, reports), [])
        (line,) = said(watch, [report(20, 2.5, "val_"), report(30, 3.0, "val_")])
        self.assertIn("Step 20", line)

    def test_numbers_that_say_nothing(self):
        nothing = [{"iteration": 1, "loss": 0.5}, report(2, math.nan, "val_")]
        sure = {"perplexity/policy": 1.5, "perplexity/reference": 1.0}
        self.assertEqual(said(FallingChosen(), nothing + [{**sure, **nothing[0]}]), [])

    def test_a_perplexity_that_is_infinite(self):
        broken = report(5, 9.0, "val_") | {"val_perplexity/policy": math.inf}
        (line,) = said(FallingChosen(), [report(0, 1.0, "val_"), broken])
        self.assertIn("Step 5", line)
        # Neither is it forgotten when a file, which has no such number, is read.
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "metrics.jsonl"
            file.write_text(json_text(broken))
            watch = FallingChosen(file)
        self.assertEqual(said(watch, [report(6, 9.0, "val_")]), [])

    def test_a_resumed_run_knows(self):
        for frozen in (True, False):
            first = [report(0, 1.0, "val_"), report(5, 1.05), report(10, 1.25)]
            then = [report(15, 1.25), report(20, 1.3, "val_")]
            for done, wanted in ((first, 1), (first + then, 0)):
                with tempfile.TemporaryDirectory() as folder:
                    file = Path(folder) / "metrics.jsonl"
                    file.write_text("".join(json.dumps(x) + "\n" for x in done))
                    watch = FallingChosen(file, frozen)
                    rest = then + [report(25, 1.4, "val_")]
                    lines = said(watch, rest if wanted else [report(25, 1.4, "val_")])
                    self.assertEqual(len(lines), wanted)
                    if wanted:
                        step = 15 if frozen else 20
                        self.assertIn(f"Step {step}:", lines[0])


if __name__ == "__main__":
    unittest.main()
