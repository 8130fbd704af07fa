# Copyright © 2026 MLX Contributors

"""Where a gradient is large, small or missing, module by module."""

from typing import Any

import numpy as np
from mlx.utils import tree_flatten


def _by_module(tree):
    modules: dict[str, list[np.ndarray]] = {}
    for name, x in tree_flatten(tree):
        module = name.rpartition(".")[0] or name
        modules.setdefault(module, []).append(np.array(x, dtype=np.float32).ravel())
    return {name: np.concatenate(parts) for name, parts in modules.items()}


def gradient_report(
    gradients: Any, before: Any, after: Any
) -> dict[str, dict[str, float]]:
    """
    Describe the gradient of every trained module.

    Args:
        gradients (dict): The gradient as it went into the update, clipped.
        before (dict): The trained parameters before the update.
        after (dict): The same after it.

    Returns:
        dict: For each module ``norm``; ``largest``, ``median`` and ``p99`` of the
        elements' sizes; ``zeros``, the share of elements that are 0; and
        ``update_ratio``, the norm of the change to the norm of the weights.

    Example:
        >>> import mlx.core as mx
        >>> tree = {"layer": {"weight": mx.array([3.0, -4.0])}}
        >>> report = gradient_report(tree, tree, {"layer": {"weight": mx.zeros((2,))}})
        >>> report["layer"]["norm"], report["layer"]["update_ratio"]
        (5.0, 1.0)
    """
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
