# Copyright © 2026 MLX Contributors

"""The texts of single pairs, with what ``max_seq_length`` cut off."""

import contextlib
import copy
import io
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from .datasets import load_preference_dataset
from .inspection import PairTexts

NO_CUT = 2**30


def pair_texts(
    dataset: Any, indices: Sequence[int], whole: dict[int, tuple] | None = None
) -> list[PairTexts]:
    """
    Decode some pairs of a data set.

    Args:
        dataset (PreferenceDataset): The pairs.
        indices (Sequence): Which ones.
        whole (dict, optional): Of those that were cut the uncut pair.

    Returns:
        list: Their texts.

    Example:
        >>> class Pairs(list):
        ...     class tokenizer:
        ...         decode = staticmethod(lambda ids: " ".join(map(str, ids)))
        ...     source_row = staticmethod(lambda index: index)
        >>> pairs = Pairs([([1, 2], [3], [4], (2, 3, 3))])
        >>> uncut = {0: ([1, 2], [3, 5], [4], (2, 4, 3))}
        >>> text = pair_texts(pairs, [0], uncut)[0]
        >>> text.prompt, text.answers, text.cut, text.place
        ('1 2', ('3', '4'), ('5', ''), 'row 0')
    """
    decode = lambda ids: dataset.tokenizer.decode([int(x) for x in ids])
    texts = []
    for i in indices:
        prompt, *answers, _ = dataset[i]
        full = (whole or {}).get(i, dataset[i])[1:3]
        rest = [ids[len(kept) :] for ids, kept in zip(full, answers)]
        place = dataset.source_row(i)
        texts.append(
            PairTexts(
                place=place if isinstance(place, str) else f"row {place}",
                prompt=decode(prompt),
                answers=(decode(answers[0]), decode(answers[1])),
                cut=(decode(rest[0]), decode(rest[1])),
                cut_tokens=(len(rest[0]), len(rest[1])),
                prompt_tokens=len(prompt),
            )
        )
    return texts


def uncut_pairs(
    args: SimpleNamespace, dataset: Any, indices: Sequence[int], is_test: bool = True
) -> dict[int, tuple]:
    """
    Find the whole of pairs that may have been cut: their data is read once more.

    Args:
        args (SimpleNamespace): What ``load_preference_dataset`` took.
        dataset (PreferenceDataset): The pairs.
        indices (Sequence): Which ones.
        is_test (bool): Whether it is the test set, or that of validation, which may
            be a part of the training set. Default: ``True``.

    Returns:
        dict: For each index that was found the pair as the tokenizer made it.

    Example:
        >>> class Pairs(list):
        ...     max_length = 8
        >>> uncut_pairs(None, Pairs([([1], [2], [3], (1, 2, 2))]), [0])
        {}
    """
    long = [i for i in indices if max(dataset[i][3]) >= dataset.max_length]
    if not long:
        return {}
    again = copy.copy(args)
    again.max_seq_length, again.token_cache = NO_CUT, False
    if is_test:
        again.train, again.test = False, True
    # The same lines were printed when the data was read first.
    with contextlib.redirect_stdout(io.StringIO()):
        sets = load_preference_dataset(again, dataset.tokenizer)
    places: dict[str | int, list[tuple]] = {}
    wanted = {dataset.source_row(i) for i in long}
    for other in sets:
        for i in range(len(other)):
            if (place := other.source_row(i)) in wanted:
                places.setdefault(place, []).append(other[i])
    found = {}
    for i in long:
        candidates = places.get(dataset.source_row(i), [])
        match = next((pair for pair in candidates if _begins(pair, dataset[i])), None)
        if match is not None:
            found[i] = match
    return found


def _begins(whole, cut):
    """Whether a pair is the start of another one: one place may hold several."""
    return np.array_equal(whole[0], cut[0]) and all(
        np.array_equal(a[: len(b)], b) for a, b in zip(whole[1:3], cut[1:3])
    )
