# Copyright © 2026 MLX Contributors

"""Learning rates that follow the length of the run."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

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
        warmup = warmup_steps or schedule.get("warmup") or 0
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
        return build_schedule(schedule)
    except (TypeError, ValueError, IndexError) as e:
        raise InputError(f"lr_schedule {schedule} is wrong: {e}") from e


class MasterWeights:
    """An optimizer that updates float32 copies and rounds them into the model."""

    # A step of 1e-6 on a bfloat16 weight of 0.02 is lost in rounding.
    masters = True  # A step hands it float32 gradients.

    def __init__(self, optimizer: optim.Optimizer, model: nn.Module):
        self._optimizer = optimizer
        weights = tree_map(as_float32, model.trainable_parameters())
        optimizer.init(weights)
        self.state: dict = {"optimizer": optimizer.state, "weights": weights}

    @property
    def learning_rate(self) -> mx.array:
        """The rate of the last update."""
        return self._optimizer.learning_rate

    def update(self, model: nn.Module, gradients: dict) -> None:
        """Apply the gradients to the copies and round them into the model."""
        weights = self._optimizer.apply_gradients(
            tree_map(as_float32, gradients), self.state["weights"]
        )
        self.state["weights"] = weights
        parameters = model.trainable_parameters()
        model.update(tree_map(lambda w, p: w.astype(p.dtype), weights, parameters))


def as_float32(x: mx.array) -> mx.array:
    """The same numbers, with room for small changes."""
    return x.astype(mx.float32)


class JoinedWeights:
    """An optimizer that updates all trained weights as one array."""

    # An adapter has hundreds of small arrays, and starting ten kernels for each takes
    # a GPU as long as the model's own work on a small batch.
    masters = True

    def __init__(self, optimizer: optim.Optimizer, model: nn.Module):
        self._optimizer = optimizer
        parameters = model.trainable_parameters()
        self._shapes = [(k, x.shape, x.size) for k, x in tree_flatten(parameters)]
        weights = self.join(parameters)
        optimizer.init(weights)
        self.state: dict = {"optimizer": optimizer.state, "weights": weights}

    @property
    def learning_rate(self) -> mx.array:
        """The rate of the last update."""
        return self._optimizer.learning_rate

    def join(self, tree: dict) -> dict[str, mx.array]:
        """The arrays of a tree such as the trained weights' one after another."""
        parts = []
        for _, x in tree_flatten(tree):
            parts.append(as_float32(x).reshape(-1))
            if gap := -x.size % _ALIGNED:
                parts.append(mx.zeros((gap,)))
        return {"joined": mx.concatenate(parts)}

    def update(self, model: nn.Module, gradients: dict[str, mx.array]) -> None:
        """Apply joined gradients, and write the weights into the model."""
        weights = self.state["weights"]
        self.state["weights"] = self._optimizer.apply_gradients(gradients, weights)
        self.write(model)

    def write(self, model: nn.Module) -> None:
        """Give the model its weights: views of the joined array."""
        joined, start, found = self.state["weights"]["joined"], 0, []
        for name, shape, size in self._shapes:
            found.append((name, joined[start : start + size].reshape(shape)))
            start += size + -size % _ALIGNED
        model.update(tree_unflatten(found))


# Matrix products want their arrays to begin at a multiple of 256 bytes.
_ALIGNED = 64
# The joined gradient of more weights than adapters have would be felt in the memory.
_MOST_JOINED = 2**26
# They treat every number alike, whatever array it is in.
_ELEMENTWISE = (optim.Adam, optim.AdamW, optim.SGD)


def with_master_weights(
    optimizer: optim.Optimizer, model: nn.Module, join: bool = False
) -> optim.Optimizer | MasterWeights | JoinedWeights:
    """Wrap the optimizer if any trained weight has fewer than 32 bits, or to join."""
    trained = [p for _, p in tree_flatten(model.trainable_parameters())]
    if not {p.dtype for p in trained} <= {mx.float32}:
        return MasterWeights(optimizer, model)
    is_small = sum(p.size for p in trained) <= _MOST_JOINED and len(trained) > 1
    if join and is_small and type(optimizer) in _ELEMENTWISE:
        return JoinedWeights(optimizer, model)
    return optimizer


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
        return OPTIMIZERS[name](learning_rate=rate, **options)
    except (TypeError, ValueError) as e:
        raise InputError(f"optimizer_config.{name} {options!r} is wrong: {e}") from e
