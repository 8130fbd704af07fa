# Copyright © 2026 MLX Contributors

"""A run's reference, which is asked about every batch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx

from ..batch.collate import PairBatch
from ..errors import InputError
from ..forward.frozen import FrozenStart


def with_reference(
    model: Any,
    function: Callable,
    inputs: list,
    outputs: list | None,
    compile: bool,
) -> Callable:
    """Give a function its reference model, and compile it."""
    function = partial(function, model)
    if not compile:
        return function
    # An argument, not a constant: it may change during the run.
    return mx.compile(function, [*inputs, getattr(model, "state", {})], outputs)


class LiveReference:
    """A reference model that answers in every step."""

    def __init__(self, model: Callable[[mx.array], mx.array] | None = None):
        self.model = model

    @property
    def fingerprint(self) -> str:
        """A name of what it answers, if there is one."""
        return ""

    def recall(self, dataset: Any, batch: PairBatch) -> dict[str, mx.array]:
        """Add what is known to a batch."""
        return batch.arrays

    def remember(self, dataset: Any, batch: PairBatch, logps: mx.array) -> None:
        """Keep what the reference gave for a batch."""

    def check(self, dataset: Any, ld_alpha: float = 1.0) -> None:
        """Make sure that what is known is what the model gives."""

    def sync(self, mixing: float) -> None:
        """Move the reference towards the policy."""
        if not isinstance(self.model, FrozenStart):
            raise InputError(
                "sync_reference mixes the policy into its own frozen start, and this "
                "run's reference is not that. Leave out reference_model or "
                "sync_reference."
            )
        self.model.sync(mixing)

    def compiled(
        self,
        function: Callable,
        inputs: list,
        outputs: list | None = None,
        compile: bool = True,
    ) -> Callable:
        """Compile a function of the reference and a batch."""
        given = function, inputs, outputs, compile
        return self._choose(lambda model: with_reference(model, *given))

    def _choose(self, make: Callable[[Any], Callable]) -> Callable:
        """What runs, made for the model that it asks."""
        return make(self.model)


class NoReference(LiveReference):
    """What a loss without a reference gets: log-probs of 0, which cost nothing."""

    def recall(self, dataset: Any, batch: PairBatch) -> dict[str, mx.array]:
        zeros = mx.zeros((2 * len(batch.indices),))
        return batch.arrays | {"reference_logps": zeros}

    def _choose(self, make: Callable[[Any], Callable]) -> Callable:
        return make(None)
