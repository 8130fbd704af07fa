# Copyright © 2026 MLX Contributors

"""Which pairs to hold out for validation."""

from collections.abc import Sequence

import numpy as np

MAX_VALID_PAIRS = 500


def choose_held_out(
    prompts: Sequence[bytes],
    rows: Sequence[int],
    size: int,
    seed: int = 0,
    two_prompts: bool = False,
) -> list[int]:
    """
    Choose some pairs at random: whole rows, and whole prompts where that is possible.

    Args:
        prompts (Sequence): A name of each pair's prompt, empty where it has none.
        rows (Sequence): A number of the row that each pair comes from.
        size (int): The most pairs to choose; more if the first choice has more.
        seed (int): Seed of the choice. Default: ``0``.
        two_prompts (bool): Both parts need pairs of two prompts at least.
            Default: ``False``.

    Returns:
        list: The chosen pairs in their order; none if there are too few.

    Example:
        >>> choose_held_out([b"a", b"a", b"b"], [0, 1, 2], 1)
        [2]
    """
    pairs: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        pairs.setdefault(row, []).append(i)
    numbers = list(pairs)
    # RandomState keeps its numbers across NumPy versions.
    shuffled = np.random.RandomState(seed).permutation(len(numbers)).tolist()
    groups: dict[bytes, list[int]] = {}
    for i in shuffled:
        group = pairs[numbers[i]]
        name = prompts[group[0]]
        if not two_prompts:
            name = name or b"row %d" % i
        groups.setdefault(name, []).extend(group)
    if two_prompts:
        # Two prompts remain, whatever the size.
        rest = list(groups.values())[:-2]
        held = _fill(rest, size, 2) if len(rest) >= 2 else set()
    else:
        by_row = [pairs[numbers[i]] for i in shuffled]
        held = _fill(list(groups.values()), size) or _fill(by_row, size, 1)
    return sorted(held) if len(held) < len(rows) else []


def _fill(groups: list[list[int]], size: int, least: int = 0) -> set[int]:
    """All groups that still fit, and the first ones in any case."""
    held: set[int] = set()
    for number, group in enumerate(groups):
        if number < least or len(held) + len(group) <= size:
            held.update(group)
    return held
