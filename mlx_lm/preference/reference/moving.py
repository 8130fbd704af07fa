# Copyright © 2026 MLX Contributors

"""A reference that follows the policy."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import InputError
from ..features import Feature
from ..forward.frozen import FrozenStart
from ..objective.objective import check_has_reference
from ..update import fill
from .live import NoReference


class MovingReference:
    """A run's reference that moves every so many updates, as exact as it moved."""

    def __init__(self, reference: Any, mixing: float, updates: int):
        self._reference, self._mixing, self._updates = reference, mixing, updates
        start = reference.model
        self._start = start if isinstance(start, FrozenStart) else None

    def after_update(self, run: Any, it: int) -> None:
        """Let the reference follow the policy if it is due."""
        if run.updates % self._updates == 0:
            self._reference.sync(self._mixing)

    def state_dict(self) -> tuple[dict[str, mx.array], dict[str, Any]]:
        exact = self._start.exact if self._start else {}
        return dict(tree_flatten(exact)), {}

    def load_state_dict(self, arrays: dict[str, mx.array], info: dict) -> None:
        # A run that moves its reference may follow one that did not.
        if arrays and self._start:
            fill(self._start.exact, arrays)
            self._start.round()


class _Moving(Feature):
    brings = ("sync_reference", "sync_alpha", "sync_steps")

    def check(self, args: Any) -> None:
        check_has_reference(args, "sync_reference")
        if args.sync_reference and args.reference_model:
            raise InputError(
                "sync_reference lets the policy's own start follow it: leave out "
                "reference_model."
            )
        if not args.sync_reference and args.explicit & {"sync_alpha", "sync_steps"}:
            raise InputError("sync_alpha and sync_steps need sync_reference.")

    def after_weights(self, job: Any) -> None:
        # A test measures from the start, wherever training moves the reference to.
        if job.args.sync_reference and job.args.test:
            job.kept["start"] = FrozenStart(job.model)

    def header_rows(self, job: Any, rows: dict[str, str]) -> None:
        args = job.args
        if args.sync_reference and not isinstance(job.reference, NoReference):
            start = args.resume_adapter_file or "the start"
            count = args.sync_steps
            every = f"{count:,} updates" if count > 1 else "update"
            rows["reference"] = f"{start} · follows the policy every {every}"

    def after_training(self, job: Any) -> None:
        job.reference.model = job.kept.get("start") or job.reference.model

    def parts(self, run: Any) -> dict[str, Any]:
        args = run.args
        if not args.sync_reference:
            return {}
        moved = MovingReference(run.reference, args.sync_alpha, args.sync_steps)
        return {"moved": moved}


FEATURE = _Moving()
