# Copyright © 2026 MLX Contributors

"""What to watch in what was collected: agreement, order, length."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..terminal import counted
from .labels import Key, Label, agreements

# Winners longer than losers by so much teach length.
LONGER = 4 / 3


def length_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """How long chosen and rejected answers are."""
    pairs = [row for row in rows if "chosen" in row]
    if not pairs:
        return
    chosen, rejected = (
        sum(_words(row[name]) for row in pairs) / len(pairs)
        for name in ("chosen", "rejected")
    )
    warning = "[WARNING] " if chosen > LONGER * rejected else ""
    hint = ": the policy will learn to write more" if warning else ""
    yield (
        f"{warning}Chosen answers have {counted(round(chosen), 'word')}, rejected ones "
        f"{rejected:.0f} on average{hint}."
    )


def _words(answer: Any) -> int:
    texts = [answer] if isinstance(answer, str) else [m["content"] for m in answer]
    return sum(len(text.split()) for text in texts)


def agreement_lines(
    labels: Mapping[Key, Mapping[str, Label]], sizes: Mapping[Key, int]
) -> Iterator[str]:
    """How alike each two judges order answers."""
    for found in agreements(labels, sizes):
        kappa = "" if found.kappa is None else f", kappa {found.kappa:.2f}"
        yield (
            f"{found.first} and {found.second} agree on {found.share:.0%} of "
            f"{counted(found.pairs, 'pair')} of answers{kappa}."
        )


def order_lines(labels: Mapping[Key, Mapping[str, Label]], name: str) -> Iterator[str]:
    """How much what a judge says depends on the order in which answers are shown."""
    found = [
        by_judge[name].orders or [] for by_judge in labels.values() if name in by_judge
    ]
    orders = [one for some in found for one in some]
    if orders:
        first = sum((p > 0.5) + (q > 0.5) for *_, p, q in orders) / (2 * len(orders))
        same = sum((p - 0.5) * (0.5 - q) > 0 for *_, p, q in orders) / len(orders)
        yield (
            f"{name} takes the answer that is shown first in {first:.0%}. It says the "
            f"same in both orders of {same:.0%} of {counted(len(orders), 'pair')}; the "
            "others are ties."
        )
