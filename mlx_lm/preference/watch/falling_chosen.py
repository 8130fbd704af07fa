# Copyright © 2026 MLX Contributors

"""DPO's classic failure, seen while it happens: the chosen answers lose too."""

import math
from pathlib import Path

from ...tuner.callbacks import TrainingCallback
from ..run.reading import read_lines
from ..terminal import rprint

FALL = 0.2


class FallingChosen(TrainingCallback):
    """Warn once when mean ``logps/chosen`` is 20 % further below 0 than at first."""

    def __init__(
        self, metrics_file: str | Path | None = None, frozen_start: bool = True
    ):
        self.frozen_start = frozen_start
        self.start: float | None = None
        self.in_a_row, self.warned = 0, False
        for report in read_lines(metrics_file) if metrics_file else []:
            self._is_due(report)

    def _fall(self, info, part):
        """``logps/chosen`` over its start; None if that can't be told."""
        if not self.frozen_start:
            logps = info.get("val_logps/chosen")
            if logps is None or math.isnan(logps):
                return None
            self.start = self.start or logps
            return logps / self.start if self.start else None
        # The logarithms' ratio is what logps/chosen of the same pairs is over its start.
        names = (f"{part}perplexity/policy", f"{part}perplexity/reference")
        now, start = (info.get(name) for name in names)
        if now is None and info.get(f"{part}logps/chosen") is not None:
            now = math.inf  # What JSON has no number for.
        if now is None or start is None or math.isnan(now):
            return None
        if not 1 < start < math.inf:
            return None
        # Beyond what a float32 holds it is infinite, and has fallen all the more.
        return math.log(now) / math.log(start)

    def _is_due(self, info):
        part = "val_" if "val_loss" in info else ""
        fall = self._fall(info, part)
        if fall is None:
            return False
        self.in_a_row = self.in_a_row + 1 if fall > 1 + FALL else 0
        if self.warned or self.in_a_row < (1 if part else 2):
            return False
        self.warned = True
        return True

    def on_train_loss_report(self, train_info: dict) -> None:
        if self._is_due(train_info):
            rprint(
                f"[WARNING] Step {train_info['iteration']}: logps/chosen has fallen "
                "20 % below its start. Lower learning_rate, add sft or raise beta."
            )

    on_val_loss_report = on_train_loss_report
