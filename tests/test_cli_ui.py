# Copyright © 2026 MLX Contributors

import re
import unittest
from unittest import mock

from mlx_lm.cli_ui import make_console
from mlx_lm.preference.report.table import metrics_table, print_test_table
from mlx_lm.preference.run import notices as openblas
from mlx_lm.preference.run.notices import find_openblas, slow_blas_notice
from mlx_lm.preference.run.screen import (
    PreferenceTrainUI,
    format_duration,
)

METRICS = {
    "loss": 0.51,
    "rewards/accuracies": 0.875,
    "rewards/margins": 1.25,
    "tokens_per_second": 1234.0,
    "trained_pairs": 80.0,
    "logps/accuracies": 0.6,
    "logps/accuracies_per_token": 0.7,
}


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


class TestPreferenceUI(unittest.TestCase):
    def show(self, draw):
        with make_console().capture() as screen:
            draw()
        return plain(screen.get())

    def test_durations(self):
        for seconds, text in ((0.4, "0s"), (61, "1m 01s"), (7260, "2h 01m")):
            self.assertEqual(format_duration(seconds), text)

    def test_lines_show_loss_accuracy_margin_pairs_and_time_left(self):
        ui = PreferenceTrainUI(100)

        def draw():
            with ui, mock.patch("time.perf_counter", return_value=0.0):
                ui._last = (0, -10.0)
                ui.report_train(10, METRICS)
                ui.report_val(10, METRICS, 2.0)

        text = self.show(draw)
        for part in ("0.510 ▼", "87.5%", "+1.250", "1,234", "80", "1m 30s"):
            self.assertIn(part, text)
        self.assertIn("likelier 60.0%, per token 70.0%", text)
        self.assertIn("  tok/s    pairs     left", text)

    def test_what_a_validation_had_none_of_is_a_dash(self):
        # A batch of answers with one label has no margin.
        none = {"rewards/accuracies": float("nan"), "rewards/margins": float("nan")}
        ui = PreferenceTrainUI(10)
        text = self.show(lambda: ui.report_val(5, METRICS | none, 2.0))
        self.assertNotIn("nan", text)
        self.assertRegex(text, r"0\.510 +- +-  ")

    def test_validation_is_one_line_of_80_columns(self):
        metrics = dict.fromkeys(METRICS, 1.0)
        ui = PreferenceTrainUI(99_999)
        with mock.patch.dict("os.environ", COLUMNS="80"):
            ui._console = make_console()
            with ui._console.capture() as screen:
                ui.report_val(99_999, metrics, 123.4)
        lines = plain(screen.get()).splitlines()
        self.assertEqual(len(lines), 1, lines)
        self.assertLessEqual(len(lines[0]), 80)

    def test_labelled_data_has_answers(self):
        ui = PreferenceTrainUI(100, noun="answers")

        def draw():
            with ui:
                pass

        self.assertIn("  tok/s  answers     left", self.show(draw))
        table = metrics_table({"policy": {"pairs": 3.0}}, noun="answers")
        self.assertEqual(table[0][0], "test · 3 answers")
        table = metrics_table({"policy": {"pairs": 1.0}}, noun="answers")
        self.assertEqual(table[0][0], "test · 1 answer")

    def test_table(self):
        metrics = {"rewards/accuracies": 0.25, "pairs": 60.0}
        table = metrics_table({"policy": metrics})
        text = self.show(lambda: print_test_table(make_console(), table))
        self.assertIn("test · 60 pairs", text)
        # A policy that is its own reference has no reward accuracy.
        self.assertRegex(text, r"reward accuracy\s+-\s+25.0%")


class TestOpenBLAS(unittest.TestCase):
    def test_a_slow_blas_is_noticed_with_the_way_out(self):
        system = mock.patch.object(openblas.platform, "system", return_value="Linux")
        device = mock.patch.object(
            openblas.mx, "default_device", return_value=openblas.mx.cpu
        )
        with system, device:
            for path in ("/opt/libblas.so.3", None):
                found = mock.patch.object(openblas, "find_openblas", return_value=path)
                with found:
                    notice = slow_blas_notice("/usr/lib/libblas.so.3")
                self.assertIn(path or "apt-get install", notice)
            self.assertIsNone(slow_blas_notice("x /usr/lib/libopenblas.so.0"))

    def test_other_systems_need_none(self):
        with mock.patch.object(openblas.platform, "system", return_value="Darwin"):
            self.assertIsNone(find_openblas())
            self.assertIsNone(slow_blas_notice(""))


if __name__ == "__main__":
    unittest.main()
