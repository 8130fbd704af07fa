# Copyright © 2026 MLX Contributors

"""The gradient of every trained module, and how far it moved the weights."""

from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..features import Feature
from ..terminal import rprint


def _by_module(tree):
    modules: dict[str, list[np.ndarray]] = {}
    for name, x in tree_flatten(tree):
        module = name.rpartition(".")[0] or name
        modules.setdefault(module, []).append(np.array(x.astype(mx.float32)).ravel())
    return {name: np.concatenate(parts) for name, parts in modules.items()}


def gradient_report(
    gradients: Any, before: Any, after: Any
) -> dict[str, dict[str, float]]:
    """Describe the gradient of every trained module."""
    old, new = _by_module(before), _by_module(after)
    report = {}
    for name, gradient in _by_module(gradients).items():
        sizes = np.abs(gradient)
        weights = float(np.linalg.norm(old[name]))
        change = float(np.linalg.norm(new[name] - old[name]))
        report[name] = {
            "norm": float(np.linalg.norm(gradient)),
            "largest": float(sizes.max()),
            "median": float(np.median(sizes)),
            "p99": float(np.percentile(sizes, 99)),
            "zeros": float((sizes == 0).mean()),
            "update_ratio": change / weights if weights else 0.0,
        }
    return report


class ModuleGradients:
    """Each module's part in the last update."""

    def __init__(self) -> None:
        self._before: Any = None
        self._trees: tuple | None = None
        self._report: dict | None = None

    def begin(self, run: Any, it: int) -> None:
        """Note the weights of the start."""
        self._before = run.policy_model.trainable_parameters()

    def after_update(self, run: Any, it: int) -> None:
        """Keep an update's gradients, with the weights before and after."""
        after = run.policy_model.trainable_parameters()
        if run.gradients is not None:
            self._trees, self._report = (run.gradients, self._before, after), None
        self._before = after

    def reports(self) -> dict[str, Any]:
        """Describe the gradients, if there were any."""
        if self._trees is not None:
            trees, self._trees = self._trees, None
            try:
                self._report = gradient_report(*trees)
            except Exception as e:
                # What is looked at never ends a run.
                rprint(f"[WARNING] No gradients are reported: {type(e).__name__}: {e}")
        return {} if self._report is None else {"gradients": self._report}

    def state_dict(self) -> tuple[dict[str, mx.array], dict[str, Any]]:
        """What a checkpoint holds of it."""
        return {}, self.reports()

    def load_state_dict(
        self, arrays: dict[str, mx.array], info: dict[str, Any]
    ) -> None:
        """Go on where another run was."""
        self._report = info.get("gradients")


class _Gradients(Feature):
    brings = ("debug_gradients",)

    def parts(self, run: Any) -> dict[str, Any]:
        return {"gradients": ModuleGradients()} if run.args.debug_gradients else {}


FEATURE = _Gradients()
