# Copyright © 2026 MLX Contributors

"""Learning rates that follow the length of the run."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from ...tuner.utils import build_schedule
from ..errors import InputError

SHAPES = ("constant", "linear", "cosine")


def build_learning_rate(
    learning_rate: float,
    updates: int,
    schedule: dict[str, Any] | str | None = None,
    warmup_steps: int | None = None,
) -> tuple[float | Callable[[mx.array], mx.array], list[str]]:
    """The learning rate of a run of known length."""
    if isinstance(schedule, str):
        schedule = {"name": schedule}
    if not isinstance(schedule, dict | None):
        raise InputError(f"lr_schedule must have a name, got {schedule!r}.")
    schedule = dict(schedule or {"name": "constant"})
    if "arguments" in schedule:
        rate = _named_schedule(schedule, warmup_steps)
        warmup = schedule.get("warmup") or 0
        if warmup < updates:
            return rate, []
        return rate, [f"The warmup of {warmup} updates is the whole run ({updates})."]
    name = schedule.pop("name", None)
    warmup = schedule.pop("warmup_steps", None) or schedule.pop("warmup", None) or 0
    warmup = warmup_steps if warmup_steps is not None else warmup
    if not isinstance(warmup, int) or warmup < 0:
        raise InputError(f"warmup_steps must be a whole number, got {warmup!r}.")
    if name not in SHAPES or schedule:
        raise InputError(
            f"Unknown lr_schedule {name!r} {schedule or ''}: use name "
            f"{', '.join(SHAPES)} with warmup_steps, or mlx-lm's form with the name "
            "of a function of mlx.optimizers and its arguments."
        )
    notices = []
    if warmup >= updates:
        notices.append(
            f"warmup_steps {warmup} is longer than the run: cut to {updates - 1} "
            f"of {updates} updates."
        )
        warmup = max(updates - 1, 0)
    after, body = updates - warmup, None
    if name == "linear":
        body = optim.linear_schedule(learning_rate, 0.0, after)
    elif name == "cosine":
        body = optim.cosine_decay(learning_rate, after)
    if not warmup:
        return body or learning_rate, notices
    rise = optim.linear_schedule(0.0, learning_rate, warmup)
    body = body or (lambda step: mx.array(learning_rate))
    return optim.join_schedules([rise, body], [warmup]), notices


def _named_schedule(schedule, warmup_steps):
    warmup = schedule.pop("warmup_steps", None)
    warmup = warmup_steps if warmup_steps is not None else warmup
    if warmup is not None:
        schedule["warmup"] = warmup
    name = schedule.get("name")
    unknown = schedule.keys() - {"name", "arguments", "warmup", "warmup_init"}
    if unknown or not callable(getattr(optim.schedulers, str(name), None)):
        raise InputError(
            f"Unknown lr_schedule {name!r} with {', '.join(sorted(schedule))}: name a "
            "function of mlx.optimizers such as cosine_decay with arguments, warmup "
            f"and warmup_init, or use {', '.join(SHAPES)}."
        )
    try:
        rate = build_schedule(schedule)
        # Some mistakes show only when it is asked.
        rate(mx.array(0))
        return rate
    except (TypeError, ValueError, LookupError) as e:
        raise InputError(f"lr_schedule {schedule} is wrong: {e}") from e


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
    """Make an optimizer of ``mlx.optimizers``."""
    options = config.get(name) or {}
    try:
        # Some mistakes show only in an update.
        trial, weights = OPTIMIZERS[name](rate, **options), {"w": mx.zeros((2, 2))}
        trial.apply_gradients(weights, weights)
        return OPTIMIZERS[name](rate, **options)
    except (TypeError, ValueError, LookupError) as e:
        raise InputError(f"optimizer_config.{name} {options!r} is wrong: {e}") from e
