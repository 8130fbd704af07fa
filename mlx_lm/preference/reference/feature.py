# Copyright © 2026 MLX Contributors

"""A run asks its reference once about each pair."""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.nn as nn

from ..features import Feature
from ..files import remove_leftovers, user_cache_folder
from ..forward.frozen import FrozenStart
from ..objective.objective import objective_of
from ..setting import Setting
from .cache import ReferenceCache
from .fingerprint import model_fingerprint, variant_fingerprint
from .live import LiveReference, NoReference
from .remembered import RememberedReference


def remember_reference(
    args: SimpleNamespace,
    policy: nn.Module,
    reference_model: nn.Module | None,
    *datasets: Any,
) -> LiveReference:
    """The run's reference, with what earlier runs found out about the same one."""
    objective = objective_of(args)
    if not objective.needs_reference:
        return NoReference(FrozenStart(policy) if args.test else None)
    folder = args.reference_cache
    if folder is not False:
        folder = Path(folder) if folder else user_cache_folder("references")
        remove_leftovers(folder)
    variant = f"ld_alpha={objective.ld_alpha}" if objective.ld_alpha < 1 else ""
    name = variant_fingerprint(model_fingerprint(reference_model or policy), variant)
    reference = RememberedReference(
        reference_model or FrozenStart(policy),
        ReferenceCache(folder or None, name),
        # The test compares both models' whole distributions.
        keep=bool(args.test or args.inspect),
        moving=args.sync_reference,
    )
    if datasets:
        reference.check(datasets[0], objective.ld_alpha)
    reference.release(*datasets)
    return reference


class _Remembered(Feature):
    def settings(self) -> dict[str, Iterable[Setting]]:
        what = (
            "Folder that keeps the reference's log-probs for later runs. Default: in "
            "the user's cache folder; false: nowhere."
        )
        marks: dict[str, Any] = {"off": True, "metavar": "DIR", "resume": "free"}
        marks |= {"kind": str, "per_rank": True, "outside": True}
        return {"Rows and pairs": [Setting("reference_cache", None, what, **marks)]}

    def reference(self, start: Any, args: Any) -> Any:
        return RememberedReference(start, moving=args.sync_reference)

    def after_weights(self, job: Any) -> None:
        sets = job.train_set, job.valid_set or []
        given = job.args, job.model, job.reference_model
        job.reference = remember_reference(*given, *sets)

    def header_rows(self, job: Any, rows: dict[str, str]) -> None:
        if not isinstance(job.reference, RememberedReference):
            return
        pairs, noun = len(job.train_set), objective_of(job.args).noun
        if known := pairs - job.reference.unknown(job.train_set):
            rows["reference"] += f" · {known:,} of {pairs:,} {noun} known"


FEATURE = _Remembered()
