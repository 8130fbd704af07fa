# Copyright © 2026 MLX Contributors

"""The sets of each split, of one or several sources."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .. import terminal
from ..plug_ins import load
from .sources import SPLIT_NAMES

_NO_VALIDATION = "[WARNING] There is no validation set: the run has no validation loss."
# What leaves as many of the training rows as are asked for, and tells how many.
SAMPLERS: list[Callable[..., Any]] = []


def load_splits(
    sources: Iterable[tuple],
    names: Iterable[str],
    make: Callable[[Any, str, Mapping[str, Any]], Any],
    fraction: float,
    seed: int,
    *most: int | None,
) -> tuple[dict[str, list], Any]:
    """Sets of the splits with these names; a share is held out if none validates."""
    results: dict[str, list] = {name: [] for name in SPLIT_NAMES}
    opened = [{n: x[n]() for n in names if n in x} for *_, x in sources]
    sample = SAMPLERS[-1](opened, *most, seed) if SAMPLERS else None
    for (source, own, _), rows in zip(sources, opened):
        sets = {
            # Not to be held while others are read.
            name: make(rows.pop(name), f"{source} ({SPLIT_NAMES[name]})", own)
            for name in [*rows]
        }
        if "train" in sets and "valid" not in sets:
            total = len(sets["train"])
            sets["train"], valid = sets["train"].hold_out(fraction, seed)
            if valid:
                sets["valid"] = valid
                terminal.rprint(
                    f"No validation set: held out {len(valid):,} of {total:,} training "
                    f"pairs (valid_fraction {fraction:g}, seed {seed})."
                )
        for name, dataset in sets.items():
            results[name].append(dataset)
    if results["train"] and not results["valid"]:
        terminal.rprint(_NO_VALIDATION)
    return results, sample


# Each adds to the list.
PLUG_INS = ("sample",)
load(__package__, PLUG_INS)
