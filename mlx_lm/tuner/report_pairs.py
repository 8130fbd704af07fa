# Copyright © 2026 MLX Contributors

"""The pairs that a report shows: those a model is surest of, right and wrong."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .atomic_files import replace_file, writing

FILE_NAME = "test_pairs.json"
SHOWN = 10
LONGEST = 2000  # characters


def pick_pairs(
    dataset: Any, margins: Sequence[float], count: int = SHOWN
) -> list[dict[str, Any]]:
    """
    Decode the pairs of the largest and of the smallest margins.

    A pair is right if its margin is above 0.

    Args:
        dataset (PreferenceDataset): The pairs.
        margins (Sequence): The reward margin of each pair in nats.
        count (int): Most pairs of each kind. Default: ``10``.

    Returns:
        list: Dicts with ``pair`` (its place), ``prompt``, ``chosen``, ``rejected``,
        ``margin`` and ``right``: right ones first, the surest of each kind first.

    Example:
        >>> class Pairs(list):
        ...     class tokenizer:
        ...         decode = staticmethod(lambda ids: " ".join(map(str, ids)))
        >>> pairs = Pairs([([1], [2], [3], (1, 2, 2)), ([4], [5], [6], (1, 2, 2))])
        >>> [(p["prompt"], p["right"]) for p in pick_pairs(pairs, [-0.5, 0.5])]
        [('4', True), ('1', False)]
    """
    known = [i for i, margin in enumerate(margins) if math.isfinite(margin)]
    order = sorted(known, key=lambda i: (-margins[i], i))
    right = [i for i in order if margins[i] > 0][:count]
    wrong = [i for i in reversed(order) if margins[i] <= 0][:count]
    decode = lambda ids: _shortened(dataset.tokenizer.decode([int(x) for x in ids]))
    rows = []
    for i in right + wrong:
        prompt, chosen, rejected = (decode(ids) for ids in dataset[i][:3])
        texts = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        margin = float(margins[i])
        rows.append({"pair": i, **texts, "margin": margin, "right": margin > 0})
    return rows


def _shortened(text):
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]} […] {text[-half:]}"


def save_pairs(
    folder: str | Path,
    pairs: list[dict[str, Any]],
    before: Sequence[float],
    after: Sequence[float],
) -> None:
    """
    Keep what a report shows of single pairs, in ``test_pairs.json``.

    Args:
        folder (str or Path): The adapter's folder.
        pairs (list): What ``pick_pairs`` returned.
        before (Sequence): ``log p(chosen) - log p(rejected)`` of every pair in nats,
            under the reference.
        after (Sequence): The same under the policy.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pairs(folder, [], [0.0], [0.5])
        ...     read_pairs(folder)["after"]
        [0.5]
    """
    path = Path(folder) / FILE_NAME
    rounded = [[round(float(x), 4) for x in margins] for margins in (before, after)]
    content = {"before": rounded[0], "after": rounded[1], "pairs": pairs}
    text = json.dumps(content) + "\n"
    with writing(path):
        replace_file(path, lambda name: Path(name).write_text(text, "utf-8"))


def read_pairs(folder: str | Path) -> dict[str, Any]:
    """
    Read what ``save_pairs`` wrote.

    Args:
        folder (str or Path): The adapter's folder.

    Returns:
        dict: ``before``, ``after`` and ``pairs``; empty without a file.

    Example:
        >>> read_pairs("nowhere")
        {}
    """
    path = Path(folder) / FILE_NAME
    return json.loads(path.read_text("utf-8")) if path.exists() else {}
