# Copyright © 2026 MLX Contributors

"""A reference that is asked once about each pair, and let go when all are known."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..batch.collate import PairBatch, collate_pairs
from ..forward.answers import sequence_logps
from ..forward.frozen import FrozenStart, running
from ..terminal import rprint
from .cache import ReferenceCache, pair_key, pair_keys
from .live import LiveReference

# How many remembered pairs a run compares with its model, out of how many.
CHECKED, LOOKED_AT = 3, 64
# What rounding may come to, as a share of an answer's log-prob.
SHARE = {mx.float32: 2e-3, mx.float16: 1e-2, mx.bfloat16: 3e-2}


class RememberedReference(LiveReference):
    """A reference and the log-probs that it has given so far."""

    def __init__(
        self,
        model: Callable[[mx.array], mx.array] | None = None,
        cache: ReferenceCache | None = None,
        keep: bool = True,
        moving: bool = False,
    ):
        super().__init__(model)
        # An empty one counts as False.
        self.cache = ReferenceCache(None, "") if cache is None else cache
        self.keep, self.moving = keep or moving, moving
        self._forms: list[dict[bool, Callable]] = []
        if moving:
            self.forget()

    def recall(self, dataset: Any, batch: PairBatch) -> dict[str, mx.array]:
        """Add what is known to a batch."""
        logps = self.cache.lookup(_keys(dataset, batch.indices))
        if np.isnan(logps).any():
            return batch.arrays
        return batch.arrays | {"reference_logps": mx.array(logps.T.reshape(-1))}

    def remember(self, dataset: Any, batch: PairBatch, logps: mx.array) -> None:
        """Keep what the reference gave for a batch."""
        # Copies that fill a batch up come last and are not scored.
        places = {index: i for i, index in reversed(list(enumerate(batch.indices)))}
        rows = np.array(logps, dtype=np.float32).reshape(2, -1).T
        self.cache.store(_keys(dataset, places), rows[list(places.values())])

    def forget(self) -> None:
        """Drop all numbers; from now on they are remembered in memory alone."""
        self.cache = ReferenceCache(None, self.cache.fingerprint)

    def sync(self, mixing: float) -> None:
        """Move the reference towards the policy, and forget what the old one gave."""
        super().sync(mixing)
        self.forget()

    @property
    def fingerprint(self) -> str:
        return self.cache.fingerprint

    def begin(self, run: Any, it: int) -> None:
        """Tell other ranks what is known."""
        self.cache.exchange(run.world)

    def after_report(self, run: Any, it: int, metrics: dict[str, float]) -> None:
        """Tell other ranks what is known, and let the model go once that is all."""
        self.cache.exchange(run.world)
        if self.release(run.train_set, run.validated):
            mx.clear_cache()

    def after_save(self, run: Any, it: int) -> None:
        """Keep on disk what is known."""
        self.cache.save()

    def end(self, run: Any, it: int) -> None:
        """Keep on disk what is known."""
        if run.rank == 0:
            self.cache.save()

    def state_dict(self) -> tuple[dict[str, mx.array], dict[str, Any]]:
        """What a checkpoint holds: the numbers that any rank knows."""
        self.cache.exchange(mx.distributed.init())
        return self.cache.arrays(), self._name()

    def load_state_dict(
        self, arrays: dict[str, mx.array], info: dict[str, Any]
    ) -> None:
        """Take the numbers of another run."""
        # Of another reference they would be wrong.
        if info == self._name():
            self.cache.absorb(**arrays)

    def _name(self):
        return {"fingerprint": self.cache.fingerprint, "moving": self.moving}

    def check(self, dataset: Any, ld_alpha: float = 1.0) -> None:
        """Ask about a few pairs that are known, and forget all if that differs."""
        if not isinstance(self.model, (nn.Module, FrozenStart)):
            return
        places = np.linspace(0, len(dataset) - 1, LOOKED_AT).astype(int)
        pairs = [dataset[i] for i in sorted(set(places.tolist()))]
        keys = [pair_key(*pair[:3]) for pair in pairs]
        known = [x for x in zip(pairs, keys) if not self.cache.unknown(x[1:])]
        if not known:
            return
        short = sorted(known, key=lambda x: max(x[0][3]))[:CHECKED]
        remembered = self.cache.lookup([key for _, key in short]).T.reshape(-1)
        batch = collate_pairs([pair for pair, _ in short])
        with running(self.model) as model:
            found = np.array(sequence_logps(model, batch, ld_alpha=ld_alpha))
            dtypes = {x.dtype for _, x in tree_flatten(model.parameters())}
        share = max(x for dtype, x in SHARE.items() if dtype in dtypes)
        if not (np.abs(found - remembered) <= share * (1 + np.abs(found))).all():
            rprint(
                "[WARNING] The reference's log-probs that were kept are not what the "
                "model gives now: all are computed again."
            )
            self.cache.discard()

    def unknown(self, *datasets: Any) -> int:
        """Count the pairs that the reference has yet to see."""
        if not len(self.cache):
            return sum(len(dataset or []) for dataset in datasets)
        return sum(self.cache.unknown(pair_keys(dataset)) for dataset in datasets)

    def release(self, *datasets: Any) -> bool:
        """Let the model go if every pair of some data sets is known."""
        if self.keep or self.model is None:
            return False
        # Most often the first few pairs tell.
        pairs = ((dataset, i) for dataset in datasets for i in range(len(dataset)))
        if any(self.cache.unknown(_keys(dataset, [i])) for dataset, i in pairs):
            return False
        self.model = None
        for forms in self._forms:
            # Programs hold what they were compiled for.
            forms.pop(False, None)
        return True

    def _choose(self, make: Callable[[Any], Callable]) -> Callable:
        """Both forms: of batches whose numbers are known, and of others."""
        forms: dict[bool, Callable] = {}
        self._forms.append(forms)

        def run(batch, *args):
            known = "reference_logps" in batch
            if known not in forms:
                forms[known] = make(None if known else self.model)
            return forms[known](batch, *args)

        return run


def _keys(dataset, indices):
    return [pair_key(*dataset[i][:3]) for i in indices]
