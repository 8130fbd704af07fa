# Copyright © 2026 MLX Contributors

"""Learning rates that follow the length of the run."""

from typing import Any, Callable

import mlx.core as mx
import mlx.optimizers as optim

from .utils import build_schedule

SHAPES = ("constant", "linear", "cosine")


def build_learning_rate(
    learning_rate: float,
    updates: int,
    schedule: dict[str, Any] | str | None = None,
    warmup_steps: int | None = None,
) -> tuple[float | Callable[[mx.array], mx.array], list[str]]:
    """
    The learning rate of a run of known length.

    Takes mlx-lm's own form (name, arguments, warmup) as it is, and a short one:
    ``{"name": "cosine", "warmup_steps": 100}`` rises linearly to
    ``learning_rate`` and falls to 0 at the end of the run.

    Args:
        learning_rate (float): The peak.
        updates (int): Optimizer updates in the run.
        schedule (dict or str, optional): Either form, or only a name. Default:
            constant.
        warmup_steps (int, optional): Optimizer updates of the linear rise, for
            the short form and the constant rate.

    Returns:
        tuple: A number or a schedule for an optimizer, and notices to print.

    Raises:
        ValueError: If the schedule is not known; the message lists those that are.

    Example:
        >>> rate, _ = build_learning_rate(1.0, 10, {"name": "linear"}, 2)
        >>> [round(rate(mx.array(k)).item(), 3) for k in (0, 1, 2, 6, 10)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if isinstance(schedule, str):
        schedule = {"name": schedule}
    if not isinstance(schedule, dict | None):
        raise ValueError(f"lr_schedule must have a name, got {schedule!r}.")
    schedule = dict(schedule or {"name": "constant"})
    if "arguments" in schedule:
        rate = _named_schedule(schedule, warmup_steps)
        warmup = warmup_steps or schedule.get("warmup") or 0
        if warmup < updates:
            return rate, []
        return rate, [f"The warmup of {warmup} updates is the whole run ({updates})."]
    name = schedule.pop("name", None)
    warmup = schedule.pop("warmup_steps", None) or schedule.pop("warmup", None) or 0
    warmup = warmup_steps if warmup_steps is not None else warmup
    if not isinstance(warmup, int) or warmup < 0:
        raise ValueError(f"warmup_steps must be a whole number, got {warmup!r}.")
    if name not in SHAPES or schedule:
        raise ValueError(
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
    after = updates - warmup
    if name == "constant":
        body = None
    elif name == "linear":
        body = optim.linear_schedule(learning_rate, 0.0, after)
    else:
        body = optim.cosine_decay(learning_rate, after)
    if not warmup:
        return body or learning_rate, notices
    rise = optim.linear_schedule(0.0, learning_rate, warmup)
    return optim.join_schedules([rise, body or _constant(learning_rate)], [warmup]), (
        notices
    )


def _constant(learning_rate):
    return lambda step: mx.array(learning_rate)


def _named_schedule(schedule, warmup_steps):
    warmup = schedule.pop("warmup_steps", None)
    warmup = warmup_steps if warmup_steps is not None else warmup
    if warmup is not None:
        schedule["warmup"] = warmup
    name = schedule.get("name")
    unknown = schedule.keys() - {"name", "arguments", "warmup", "warmup_init"}
    if unknown or not callable(getattr(optim.schedulers, str(name), None)):
        raise ValueError(
            f"Unknown lr_schedule {name!r} with {', '.join(sorted(schedule))}: name a "
            "function of mlx.optimizers such as cosine_decay with arguments, warmup "
            f"and warmup_init, or use {', '.join(SHAPES)}."
        )
    try:
        return build_schedule(schedule)
    except (TypeError, IndexError) as e:
        raise ValueError(f"lr_schedule {schedule} is wrong: {e}") from e
