# Copyright © 2026 MLX Contributors

"""The optimizers that a preference run may use."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

OPTIMIZERS = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "muon": optim.Muon,
    "sgd": optim.SGD,
    "adafactor": optim.Adafactor,
}


def build_optimizer(
    name: str, rate: float | Callable[[mx.array], mx.array], config: dict[str, Any]
) -> optim.Optimizer:
    """
    Make an optimizer of ``mlx.optimizers``.

    Args:
        name (str): A key of ``OPTIMIZERS``.
        rate (float or Callable): The learning rate, or a schedule.
        config (dict): For each optimizer its own options.

    Returns:
        optim.Optimizer: The optimizer.

    Raises:
        ValueError: If it does not take an option.

    Example:
        >>> build_optimizer("adamw", 0.1, {"adamw": {"weight_decay": 0.5}}).weight_decay
        0.5
    """
    options = config.get(name) or {}
    try:
        return OPTIMIZERS[name](learning_rate=rate, **options)
    except TypeError as e:
        raise ValueError(f"optimizer_config.{name} {options!r} is wrong: {e}") from e
