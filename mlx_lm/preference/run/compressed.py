# Copyright © 2026 MLX Contributors

"""Another model as the reference, or a quantized one, and what it loses by that."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..batch.collate import collate_pairs
from ..device import device_memory
from ..errors import InputError
from ..features import Feature
from ..forward.answers import sequence_logps
from ..forward.frozen import running
from ..objective.objective import check_has_reference
from ..policy.model import load_model
from ..policy.reference import load_reference_model
from ..setting import Setting

# How many of a run's first pairs it is measured on.
MEASURED = 4


class FirstPairs(NamedTuple):
    """What a reference says of a run's first pairs, and what it takes."""

    logps: np.ndarray  # of chosen and rejected answers, in nats
    counts: np.ndarray  # tokens that are scored
    nbytes: int


def _weight_bytes(model):
    return sum(x.nbytes for _, x in tree_flatten(model.parameters()))


def ask_first_pairs(model: nn.Module, dataset: Any) -> FirstPairs:
    """Ask a reference about a run's first pairs."""
    logps: list[float] = []
    counts: list[int] = []
    with running(model) as asked:
        for i in range(min(MEASURED, len(dataset))):
            pair = dataset[i]
            prompt, *ends = pair[3]
            counts += [end - max(prompt, 1) for end in ends]
            logps += sequence_logps(asked, collate_pairs([pair])).tolist()
    return FirstPairs(np.array(logps), np.array(counts), _weight_bytes(model))


def describe_error(bits: int, before: FirstPairs | None, after: FirstPairs) -> str:
    """Say how far the log-probs are from those of the whole weights."""
    size = f"{after.nbytes / 1e9:.2f}"
    if before is None:
        return (
            f"The reference in {bits} bits: {size} GB. What that changes is not "
            "measured, since the whole one does not fit into memory."
        )
    scored = after.counts > 0
    error = np.abs(after.logps - before.logps)[scored] / after.counts[scored]
    return (
        f"The reference in {bits} bits: {size} GB instead of {before.nbytes / 1e9:.2f}; "
        f"answers of the first {len(after.counts) // 2} pairs are off by "
        f"{error.mean():.4f} nats a token, at most {error.max():.4f}."
    )


class _OtherReference(Feature):
    def settings(self) -> dict[str, Iterable[Setting]]:
        what = (
            "Quantize the reference to so many bits, 4 or 8, as it is loaded: a "
            "reference_model, or a copy of the start of fine_tune_type full."
        )
        marks: dict[str, Any] = {"kind": int, "choices": (4, 8), "metavar": "N"}
        bits = Setting("reference_bits", None, what, tested=True, **marks)
        what = "Another model as the reference. Default: the policy's frozen start."
        marks = {"kind": str, "tested": True, "per_rank": True, "outside": True}
        model = Setting("reference_model", None, what, **marks)
        return {"Model and optimizer": [model, bits]}

    def reference_model(self, args: Any, tokenizer: Any) -> Any:
        path, start = args.reference_model, None
        if args.reference_bits and path is None:
            path, start = args.model, args.resume_adapter_file
        given = path, tokenizer, args.trust_remote_code, start, args.reference_bits
        return load_reference_model(*given)

    def check(self, args: Any) -> None:
        for name in ("reference_model", "reference_bits"):
            check_has_reference(args, name)
        if args.reference_bits and args.sync_reference:
            raise InputError(
                "sync_reference mixes the policy into its start, which can't be "
                "quantized: leave out reference_bits."
            )
        is_full = args.fine_tune_type == "full"
        if args.reference_bits and not (args.reference_model or is_full):
            raise InputError(
                "reference_bits quantizes a reference of its own, and an adapter's "
                "start takes no second model: leave it out, or name a reference_model."
            )

    def header_rows(self, job: Any, rows: dict[str, str]) -> None:
        args = job.args
        rows["reference"] = args.reference_model or rows["reference"]
        if args.reference_bits:
            rows["reference"] += f" in {args.reference_bits} bits"

    def _applies(self, job):
        args = job.args
        is_first = mx.distributed.init().rank() == 0
        asked = args.reference_bits and not (args.resume or args.dry_run)
        return asked and is_first

    def before_weights(self, job: Any) -> None:
        # The policy's weights are still on the disk: the whole one is there alone.
        if self._applies(job) and job.args.reference_model:
            given = job.args.reference_model, job.args.trust_remote_code
            whole, _ = load_model(*given)
            if _weight_bytes(whole) < 0.9 * (device_memory() or math.inf):
                job.kept["whole"] = ask_first_pairs(whole, job.train_set)

    def after_weights(self, job: Any) -> None:
        if not self._applies(job):
            return
        whole = job.kept.pop("whole", None)
        if not job.args.reference_model:
            whole = ask_first_pairs(job.model, job.train_set)
        after = ask_first_pairs(job.reference_model, job.train_set)
        job.lines.append(describe_error(job.args.reference_bits, whole, after))


FEATURE = _OtherReference()
