# Copyright © 2026 MLX Contributors

"""What the command makes a run of."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import mlx.nn as nn

from ...tuner.trainer import DPOTrainingArgs


@dataclass(eq=False)
class Job:
    """What the settings ask for, as far as it is loaded. Features complete it."""

    args: SimpleNamespace
    model: nn.Module
    tokenizer: Any
    train_set: Any = None
    valid_set: Any = None
    test_set: Any = None
    reference_model: nn.Module | None = None
    # What a run is trained with.
    settings: DPOTrainingArgs = field(default_factory=DPOTrainingArgs)
    optimizer: Any = None
    reference: Any = None
    # The checkpoint to go on from, what it must agree with, and how long the file of
    # metrics was then.
    state: Any = None
    identity: dict[str, str] = field(default_factory=dict)
    metrics_bytes: int = 0
    # What is printed below the header.
    lines: list[str] = field(default_factory=list)
    # What features keep from one moment to another, by their names.
    kept: dict[str, Any] = field(default_factory=dict)
