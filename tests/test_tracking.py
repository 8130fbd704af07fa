# Copyright © 2026 MLX Contributors

import sys
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from mlx_lm.dpo import resolve_args
from mlx_lm.preference.settings.checks import check_args
from mlx_lm.preference.settings.parser import build_parser
from mlx_lm.preference.watch.trackers import (
    SERVICES,
    TensorBoardCallback,
    TrackioCallback,
    missing_package,
    missing_tracker,
    numbers,
    reporting_callbacks,
)

TRAIN = {"iteration": 4, "loss": 0.5, "skipped_steps": 0, "gradients": {"a": 1.0}}
VAL = {"iteration": 4, "val_loss": 0.25}


class TestTracking(unittest.TestCase):
    def test_numbers(self):
        self.assertEqual(numbers(TRAIN), {"loss": 0.5, "skipped_steps": 0.0})

    def test_tensorboard(self):
        writer = mock.Mock()
        module = SimpleNamespace(SummaryWriter=mock.Mock(return_value=writer))
        with mock.patch.dict(sys.modules, tensorboardX=module):
            tracker = TensorBoardCallback("p", "run", {"beta": 0.1})
        tracker.on_train_loss_report(TRAIN)
        tracker.on_val_loss_report(VAL)
        module.SummaryWriter.assert_called_once_with(str(Path("run/tensorboard")))
        self.assertIn("beta: 0.1", writer.add_text.call_args[0][1])
        got = [call.args for call in writer.add_scalar.call_args_list]
        wanted = [("loss", 0.5, 4), ("skipped_steps", 0.0, 4), ("val_loss", 0.25, 4)]
        self.assertEqual(got, wanted)
        self.assertEqual(writer.flush.call_count, 2)

    def test_trackio_beside_another(self):
        trackio, board = mock.Mock(), mock.Mock()
        with tempfile.TemporaryDirectory() as folder:
            modules = {"trackio": trackio, "tensorboardX": board}
            with mock.patch.dict(sys.modules, modules):
                tracker = reporting_callbacks(
                    "tensorboard, trackio", None, f"{folder}/run", {"beta": 0.1}
                )
            self.assertIsInstance(tracker.callbacks[1], TrackioCallback)
            tracker.on_train_loss_report(TRAIN)
            tracker.on_val_loss_report(VAL)
        trackio.init.assert_called_once_with(
            project="mlx_lm", name="run", config={"beta": 0.1}
        )
        got = [(call.args[0], call.kwargs) for call in trackio.log.call_args_list]
        self.assertEqual(
            got, [(numbers(TRAIN), {"step": 4}), (numbers(VAL), {"step": 4})]
        )
        self.assertEqual(board.SummaryWriter.return_value.flush.call_count, 2)

    def test_help_names_them_all(self):
        (action,) = [a for a in build_parser()._actions if a.dest == "report_to"]
        for name in SERVICES:
            self.assertIn(name, action.help)

    def test_a_missing_package_is_named_before_anything_loads(self):
        for name, package in (("tensorboard", "tensorboardX"), ("trackio", "trackio")):
            with mock.patch.dict(sys.modules, {package: None}):
                self.assertEqual(missing_package(package), package)
                self.assertEqual(missing_tracker(name), package)
                args = resolve_args(["--train", "--data", "d", "--report-to", name])
                message = f"report_to needs {package}: pip install {package}"
                with self.assertRaisesRegex(ValueError, message):
                    check_args(args)
                with self.assertRaisesRegex(ValueError, message):
                    reporting_callbacks(name, None, "run", {})
            with mock.patch.dict(sys.modules, {package: mock.Mock()}):
                self.assertIsNone(missing_tracker(name))
                check_args(args)


if __name__ == "__main__":
    unittest.main()
