# Copyright © 2026 MLX Contributors

"""Data sets that have a name, each with options of its own."""

import math
from collections.abc import Iterable
from typing import Any

from ..data.options import RowOptions
from ..data.secrets import without_secrets
from ..errors import InputError
from ..features import Feature
from ..setting import Setting, check_type
from ..terminal import rprint

# What an entry of hf_dataset has beside settings.
DATASET_KEYS = ["path", "config", "train_split", "valid_split", "test_split"]
DATASET_KEYS += ["mask_prompt"]
# Rows of a set too large for the memory: tokenized in seconds, and enough to choose
# validation pairs from. So many at most are held out.
FEWEST_ROWS, HELD_OUT = 10_000, 500


class _Datasets(Feature):
    def settings(self) -> dict[str, Iterable[Setting]]:
        what = "One or several Hugging Face datasets with options of their own."
        marks: dict[str, Any] = {"flag": False, "per_rank": True, "outside": True}
        named = Setting("hf_dataset", None, what, **marks)
        what = (
            "Training rows that are read, chosen at random. Default: all, or, where they "
            "do not fit into the memory, as many as iters uses."
        )
        count: dict[str, Any] = {"kind": int, "least": 1}
        return {"Rows and pairs": [named, Setting("max_rows", None, what, **count)]}

    def begin(self, args: Any) -> None:
        given = args.hf_dataset
        args.hf_dataset, secrets = without_secrets(given)
        if secrets:
            args.secrets = given
            rprint(
                f"Not saved: {', '.join(secrets)} of hf_dataset. To resume, give it "
                "again, or log in to the Hugging Face Hub."
            )

    def rows(self, args: Any) -> dict[str, Any]:
        data = getattr(args, "secrets", None) or args.hf_dataset or args.data
        rows = {"max_rows": args.max_rows, "enough_rows": _enough_rows(args)}
        return {"data": data, **rows}

    def after_loading(self, job: Any) -> None:
        if job.train_set and job.train_set.sample:
            # A run that goes on, however long, has the rows of its start.
            job.args.max_rows = job.train_set.sample.most

    def header_rows(self, job: Any, rows: dict[str, str]) -> None:
        if job.args.hf_dataset:
            rows["data"] = str(job.args.hf_dataset)

    def check(self, args: Any) -> None:
        # They read the table of settings, which has this one from here.
        from .checks import check_keys
        from .table import UNUSED_KEYS, names

        given = args.hf_dataset or []
        if not isinstance(given, (dict, list)):
            raise InputError(f"hf_dataset must be a mapping or a list, got {given!r}.")
        rows = RowOptions().updated(vars(args))
        for dataset in [given] if isinstance(given, dict) else given:
            if not isinstance(dataset, dict) or not dataset.get("path"):
                raise InputError(f"hf_dataset needs a path, got {dataset!r}.")
            known = [*DATASET_KEYS, *UNUSED_KEYS, *names(per_dataset=True)]
            check_keys(dataset, known, "hf_dataset")
            for key in ("path", "config", "train_split", "valid_split", "test_split"):
                kind = dict if key == "config" else str
                if dataset.get(key) is not None:
                    check_type(f"{key} of hf_dataset", dataset[key], kind)
            rows.updated(dataset)


def _enough_rows(args):
    """Rows with the pairs that a run uses, those held out, and some that are bad."""
    if not args.train or args.resume or args.epochs is not None:
        return None
    return max(FEWEST_ROWS, math.ceil(1.1 * args.iters * args.batch_size) + HELD_OUT)


FEATURE = _Datasets()
