# Copyright © 2026 MLX Contributors

"""A reference that is asked once about each pair, and let go when all are known."""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from .preference_batches import PairBatch
from .reference import FrozenStart
from .reference_cache import ReferenceCache, pair_key


class RememberedReference:
    """
    A reference and the log-probs that it has given so far.

    Args:
        model (Callable, optional): A ``FrozenStart`` or another model. None if
            every number is in the cache.
        cache (ReferenceCache, optional): Default: one in memory alone.
        keep (bool): Keep the model when all numbers are known. Default: ``True``.
        moving (bool): ``sync`` will be called: the model is kept, and numbers are
            neither read from the disk nor written to it. Default: ``False``.

    Example:
        >>> dataset = [([1], [2], [3, 4], (1, 2, 3))]
        >>> reference = RememberedReference(lambda tokens: tokens)
        >>> batch = PairBatch([0], {"weights": mx.ones((1,))})
        >>> "reference_logps" in reference.recall(dataset, batch)
        False
        >>> reference.remember(dataset, batch, mx.array([-1.0, -2.0]))
        >>> reference.recall(dataset, batch)["reference_logps"].tolist()
        [-1.0, -2.0]
    """

    def __init__(
        self,
        model: Callable[[mx.array], mx.array] | None,
        cache: ReferenceCache | None = None,
        keep: bool = True,
        moving: bool = False,
    ):
        self.model = model
        # An empty one counts as False.
        self.cache = ReferenceCache(None, "") if cache is None else cache
        self.keep = keep or moving
        self._forms: list[dict[bool, Callable]] = []
        if moving:
            self.forget()

    def recall(self, dataset: Any, batch: PairBatch) -> dict[str, mx.array]:
        """
        Add what is known to a batch.

        Args:
            dataset (PreferenceDataset): Where the batch comes from.
            batch (PairBatch): A batch of it.

        Returns:
            dict: The batch's arrays, with ``reference_logps`` of shape ``(2B,)`` in
            nats if they are known for all of its pairs.

        Example:
            >>> reference = RememberedReference(None)
            >>> reference.recall([], PairBatch([], {}))["reference_logps"].shape
            (0,)
        """
        logps = self.cache.lookup(_keys(dataset, batch.indices))
        if np.isnan(logps).any():
            return batch.arrays
        return batch.arrays | {"reference_logps": mx.array(logps.T.reshape(-1))}

    def remember(self, dataset: Any, batch: PairBatch, logps: mx.array) -> None:
        """
        Keep what the reference gave for a batch.

        Args:
            dataset (PreferenceDataset): Where the batch comes from.
            batch (PairBatch): The batch.
            logps (mx.array): Summed log-probs in nats, chosen rows first. Shape:
                ``(2B,)``.

        Example:
            >>> reference = RememberedReference(None)
            >>> reference.remember([], PairBatch([], {}), mx.zeros((0,)))
        """
        # Copies that fill a batch up come last and are not scored.
        places = list(
            {index: i for i, index in reversed(list(enumerate(batch.indices)))}.items()
        )
        keys = _keys(dataset, [index for index, _ in places])
        rows = np.array(logps, dtype=np.float32).reshape(2, -1).T
        self.cache.store(keys, rows[[i for _, i in places]])

    def forget(self) -> None:
        """
        Drop all numbers; from now on they are remembered in memory alone.

        Example:
            >>> reference, batch = RememberedReference(None), PairBatch([0], {})
            >>> dataset = [([1], [2], [3], (1, 2, 2))]
            >>> reference.remember(dataset, batch, mx.zeros((2,)))
            >>> reference.forget()
            >>> reference.unknown(dataset)
            1
        """
        self.cache = ReferenceCache(None, self.cache.fingerprint)

    def sync(self, mixing: float) -> None:
        """
        Move the reference towards the policy, and forget what the old one gave.

        Args:
            mixing (float): See ``FrozenStart.sync``.

        Raises:
            ValueError: If the reference is another model, or was let go.

        Example:
            >>> from mlx.nn import Linear
            >>> policy = Linear(1, 1)
            >>> reference = RememberedReference(FrozenStart(policy), moving=True)
            >>> policy.bias = mx.array([3.0])
            >>> reference.sync(1.0)
            >>> reference.model.state["bias"].item()
            3.0
        """
        if not isinstance(self.model, FrozenStart):
            raise ValueError(
                "sync_reference mixes the policy into its own frozen start, and this "
                "run's reference is not that. Leave out reference_model or "
                "sync_reference."
            )
        self.model.sync(mixing)
        self.forget()

    def unknown(self, *datasets: Any) -> int:
        """
        Count the pairs that the reference has yet to see.

        Args:
            datasets (PreferenceDataset): The sets; empty ones are fine.

        Returns:
            int: How many of their pairs have no numbers.

        Example:
            >>> RememberedReference(None).unknown([([1], [2], [3], (1, 2, 2))])
            1
        """
        return sum(
            self.cache.unknown(_keys(dataset, range(len(dataset or []))))
            for dataset in datasets
        )

    def release(self, *datasets: Any) -> bool:
        """
        Let the model go if every pair of some data sets is known.

        Args:
            datasets (PreferenceDataset): The sets that will still be asked for.

        Returns:
            bool: True if the model went with this call.

        Example:
            >>> RememberedReference(lambda tokens: tokens, keep=False).release()
            True
        """
        if self.keep or self.model is None:
            return False
        for dataset in datasets:
            # Most often the first few pairs tell.
            for index in range(len(dataset)):
                if self.cache.unknown(_keys(dataset, [index])):
                    return False
        self.model = None
        for forms in self._forms:
            # Programs hold what they were compiled for.
            forms.pop(False, None)
        return True

    def compiled(
        self,
        function: Callable,
        inputs: list,
        outputs: list | None = None,
        compile: bool = True,
    ) -> Callable:
        """
        Compile a function of the reference and a batch, in both its forms.

        Args:
            function (Callable): Gets the model, or None where the batch brings
                ``reference_logps``; then the batch; then what else it is given.
            inputs (list): State that it reads.
            outputs (list, optional): State that it changes.
            compile (bool): ``False`` leaves it as it is. Default: ``True``.

        Returns:
            Callable: A function of the batch and the rest.

        Example:
            >>> known = lambda model, batch: batch["reference_logps"] + 1
            >>> run = RememberedReference(None).compiled(known, [])
            >>> run({"reference_logps": mx.array(1.0)}).item()
            2.0
        """
        compile_it = partial(mx.compile, outputs=outputs)
        forms: dict[bool, Callable] = {}
        self._forms.append(forms)

        def run(batch, *args):
            known = "reference_logps" in batch
            if known not in forms:
                # An argument, not a constant: it may change during the run.
                state = [] if known else [getattr(self.model, "state", {})]
                form = partial(function, None if known else self.model)
                forms[known] = form
                if compile:
                    forms[known] = compile_it(form, inputs=[*inputs, *state])
            return forms[known](batch, *args)

        return run


class NoReference(RememberedReference):
    """
    What a loss without a reference gets: log-probs of 0, which cost nothing.

    Args:
        model (Callable, optional): What a test after the run measures from.

    Example:
        >>> reference = NoReference()
        >>> reference.recall([], PairBatch([0], {}))["reference_logps"].tolist()
        [0.0, 0.0]
        >>> reference.unknown([([1], [2], [3], (1, 2, 2))]), reference.model
        (0, None)
    """

    def __init__(self, model: Callable[[mx.array], mx.array] | None = None):
        super().__init__(model)

    def recall(self, dataset: Any, batch: PairBatch) -> dict[str, mx.array]:
        """Add zeros to a batch, see ``RememberedReference.recall``."""
        zeros = mx.zeros((2 * len(batch.indices),))
        return batch.arrays | {"reference_logps": zeros}

    def remember(self, dataset: Any, batch: PairBatch, logps: mx.array) -> None:
        """Keep nothing."""

    def unknown(self, *datasets: Any) -> int:
        """Count the pairs that have to be computed: none."""
        return 0


def _keys(dataset, indices):
    return [pair_key(*dataset[i][:3]) for i in indices]
