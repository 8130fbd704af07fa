# Copyright © 2026 MLX Contributors

"""What a run needs to go on, taken from its parts and given back to them."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..ranks import sum_over_ranks
from ..update import fill

Arrays = dict[str, mx.array]
# What has state_dict() -> (arrays, what JSON can hold) and load_state_dict of both.
Part = Any
# Each rank holds its own share of these. Summed, any number of ranks can go on.
APART = ("accumulator", "window")


def stateful(parts: dict[str, Part]) -> dict[str, Part]:
    """The parts of a run that a checkpoint holds something of."""
    return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}


def take_snapshot(
    parts: dict[str, Part], group: mx.distributed.Group
) -> tuple[Arrays, dict[str, Any]]:
    """Collect the states of all parts of a run; every rank has to call it."""
    arrays: Arrays = {}
    info: dict[str, Any] = {}
    for name, part in stateful(parts).items():
        found, info[name] = part.state_dict()
        if name in APART and group.size() > 1:
            found = sum_over_ranks(found, group)
        arrays |= {f"{name}.{key}": x for key, x in found.items()}
    return arrays, info


def apply_snapshot(
    parts: dict[str, Part],
    arrays: Arrays,
    info: dict[str, Any],
    group: mx.distributed.Group,
) -> None:
    """Give the parts of a new run the states of a run that was stopped."""
    for name, part in stateful(parts).items():
        prefix = f"{name}."
        saved = [(k, x) for k, x in arrays.items() if k.startswith(prefix)]
        found = {k.removeprefix(prefix): x for k, x in saved}
        if name in APART and group.rank() > 0:
            # The sums of all ranks go on in the first one.
            found = {key: mx.zeros_like(x) for key, x in found.items()}
        part.load_state_dict(found, info.get(name, {}))


class TreeState:
    """Arrays in dicts and lists that compiled steps hold on to."""

    def __init__(self, tree: Any):
        self.tree = tree

    def state_dict(self) -> tuple[Arrays, dict[str, Any]]:
        return dict(tree_flatten(self.tree)), {}

    def load_state_dict(self, arrays: Arrays, info: dict[str, Any]) -> None:
        # A run that accumulates, or moves its reference, may follow one that did not.
        if arrays:
            fill(self.tree, arrays)


class OptimizerState(TreeState):
    """An optimizer's state, with the master weights if it has them."""

    def __init__(self, optimizer: Any):
        super().__init__(optimizer.state)
        self._inner = getattr(optimizer, "_optimizer", optimizer)

    def load_state_dict(self, arrays: Arrays, info: dict[str, Any]) -> None:
        rate = self._inner.state.get("learning_rate")
        fill(self.tree, arrays)
        # A constant rate may have been changed by the user.
        if rate is not None and "learning_rate" not in self._inner._schedulers:
            self._inner.state["learning_rate"] = rate
        mx.eval(self.tree)
