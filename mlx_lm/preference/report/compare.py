# Copyright © 2026 MLX Contributors

"""Several finished runs, tested on the same pairs and shown side by side."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...cli_ui import rprint
from ..errors import InputError
from .evaluate import show_metrics
from .table import short_names


def check_same_pairs(folder: str, dataset: Any, earlier: Any) -> None:
    """Rows without a number that a run needs are left out, here and not there."""
    if not np.array_equal(dataset.pair_lengths(), earlier.pair_lengths()):
        raise InputError(
            f"{folder} has another weight_feature or margin_feature, which leaves out "
            "other pairs: compare runs on the same pairs."
        )


def compare_runs(
    folders: Sequence[str],
    test: Callable[[str], dict[str, Any]],
    before: str | None,
    noun: str,
) -> dict[str, dict[str, Any]]:
    """Test finished runs one after the other, and print one table."""
    results = {folder: test(folder) for folder in folders}
    if before is None:
        rprint("The runs have different references: rewards and KL are from each own.")
    show_metrics(dict(zip(short_names(folders), results.values())), before, noun)
    return results
